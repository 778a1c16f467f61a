"""One case, several providers, up to three modes: gate, memory, interleaved times, rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..routes.small import without_eager
from .accuracy import check
from .case import Case
from .memory import kept_bytes, peak_bytes
from .providers import FP32
from .record import Row
from .timing import Spread, Step, clock_for, clock_name, interleave, paired_ratio

__all__ = ["MODES", "Contestant", "gate", "layer_step", "measure", "ratios"]

MODES = ("forward", "backward", "both")
CPU_GATE_TOKENS = 256  # float64 on a CPU takes longer than what it guards; a GPU is checked at full size
BASELINE, FLOOR = "eager", "frozen"


class Contestant(Protocol):
    """A provider of a layer or of a block: what it computes from operands of its own making."""

    @property
    def name(self) -> str: ...
    @property
    def adapter_dtype(self) -> torch.dtype | None: ...
    @property
    def has_adapter(self) -> bool: ...
    def operands(self, case: Any) -> Any: ...
    def chosen_routes(self, o: Any, dropout_p: float) -> str | None: ...
    def leaves(self, o: Any) -> tuple[Tensor, ...]: ...
    def __call__(self, o: Any, dropout_p: float) -> Any: ...


def gate(provider: Contestant, case: Case, judge: Callable[[Any, Any], None] = check) -> str:
    """ "ok", or in a line why this provider gets no number; the judge raises AssertionError where it is wrong."""
    if case.device.type == "cpu":
        case = case.with_tokens(min(case.tokens, CPU_GATE_TOKENS))
    try:
        with without_eager():
            judge(provider, case)
    except AssertionError as wrong:
        return f"wrong: {wrong}"
    except Exception as failure:  # a compiler or driver may raise anything; the other providers go on
        return f"failed: {type(failure).__name__}: {failure}".strip().splitlines()[0]
    return "ok"


def layer_step(provider: Contestant, o: Any, dropout_p: float, mode: str) -> Step:
    """Forward, backward (the forward untimed before it) or both, of one layer or block."""

    def forward() -> Any:
        return provider(o, dropout_p)

    def backward(y: Any) -> Any:
        return torch.autograd.grad(y, provider.leaves(o), o.dy)

    if mode == "forward":
        return Step(lambda _: forward())
    if mode == "backward":
        return Step(backward, prepare=forward)
    return Step(lambda _: backward(forward()))


def measure(
    case: Case,
    providers: Sequence[Contestant],
    modes: Sequence[str] = ("both",),
    *,
    judge: Callable[[Any, Any], None] = check,
    budget_s: float = 5.0,
    flush_l2: bool = True,
    on_round: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Rows for every provider and mode; a provider that fails the gate is listed without a number."""
    verdicts = {provider.name: gate(provider, case, judge) for provider in providers}
    able = [provider for provider in providers if verdicts[provider.name] == "ok"]
    rows = [
        Row.of(case, name, mode, status=verdict)
        for name, verdict in verdicts.items()
        if verdict != "ok"
        for mode in modes
    ]
    by_dtype = {provider.adapter_dtype: provider.operands(case) for provider in able}
    operands = {provider.name: by_dtype[provider.adapter_dtype] for provider in able}
    clock = clock_for(case.device, flush_l2)
    for mode in modes:
        steps = {p.name: layer_step(p, operands[p.name], case.dropout, mode) for p in able}
        if not steps:
            break
        times = interleave(steps, clock, budget_s=budget_s, on_round=on_round)
        for provider in able:
            row = _row(case, provider, operands[provider.name], mode, times, steps[provider.name])
            row.clock = clock_name(case.device, flush_l2)
            rows.append(row)
    return rows


def ratios(times: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
    """Speed-up over PEFT's arithmetic with its spread, and overhead over the frozen linear, where those were timed.

    An adapter in fp32 is compared with PEFT's in fp32.
    """
    found: dict[str, float] = {}
    baseline = BASELINE + FP32 if name.endswith(FP32) else BASELINE
    if baseline in times and name != FLOOR:
        speedup = paired_ratio(times[baseline], times[name])
        found |= {"speedup": speedup.p50, "speedup_p20": speedup.p20, "speedup_p80": speedup.p80}
    if FLOOR in times:
        found["overhead"] = paired_ratio(times[name], times[FLOOR]).p50
    return found


def _row(case: Case, provider: Contestant, o: Any, mode: str, times: Mapping[str, Sequence[float]], step: Step) -> Row:
    spread = Spread.of(times[provider.name])
    peak = peak_bytes(lambda: step.run(step.prepare()), case.device)
    kept = None
    if not provider.name.startswith("compile"):  # compiled code keeps its tensors where hooks do not see them
        kept = kept_bytes(lambda: provider(o, case.dropout), o.parameters()) / case.tokens
    return Row.of(
        case,
        provider.name,
        mode,
        routes=provider.chosen_routes(o, case.dropout),
        rounds=len(times[provider.name]),
        ms_p20=spread.p20,
        ms_p50=spread.p50,
        ms_p80=spread.p80,
        **ratios(times, provider.name),
        tflops=case.flops(mode) / spread.p50 * 1e-9 if provider.has_adapter else None,
        kept_bytes_per_token=kept,
        peak_mib=None if peak is None else peak / 2**20,
    )
