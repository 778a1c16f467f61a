"""CUDA graphs: every replay draws a new dropout mask and uses it throughout; times of steps that are replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.causal import CausalCase, causal_steps, factors_of
from lowrank_fused.benchmark import Case as LayerCase
from lowrank_fused.benchmark import Operands, Row, Spread, Step, clock_for, interleave, providers_for
from lowrank_fused.benchmark.block import BlockCase, BlockProvider
from lowrank_fused.benchmark.linears import check_linears
from lowrank_fused.benchmark.measure import gate, layer_step, ratios

__all__ = ["Capture", "replayed_masks", "replayed_step", "time_replays", "timed_row"]

# What `benchmark.graph.captured` does; tests put another in its place, where there is no GPU.
Capture = Callable[[Callable[[], Any], torch.device], tuple[Step, Any]]
CLOCK = "CUDA graph, cold L2"
REPLAYS = 3  # of each graph


def replayed_masks(route: str, layer: LayerCase, capture: Capture) -> dict[str, Any]:
    """Raise unless each replay of a layer's forward and backward has a mask of its own, the same in y, dx and dA.

    Two graphs are captured and replayed in turn, the later one first: neither may need what the other left behind.
    With W = 0, A = 1, B = 1/N and dy = 1, dx shows where elements were kept, y their number in each row, and dA their
    number in each column.
    """
    (provider,) = providers_for([route], layer)
    o = Operands.random(layer)
    probe = Operands(
        x=torch.ones_like(o.x).requires_grad_(),
        weight=torch.zeros_like(o.weight),
        a=torch.ones_like(o.a).requires_grad_(),
        b=torch.full_like(o.b, 1.0 / layer.out_features).requires_grad_(),
        bias=None,
        dy=torch.ones_like(o.dy),
        scale=1.0,
    )

    def run() -> tuple[Tensor, ...]:
        y = provider(probe, layer.dropout)
        return y.detach(), *torch.autograd.grad(y, (probe.x, probe.a), probe.dy)

    graphs = [capture(run, layer.device) for _ in range(2)]
    masks = []
    for replay, result in graphs[::-1] * REPLAYS:
        replay.run(None)
        masks.append(_consistent_mask(layer, *(t.clone() for t in result)))
    rates = [mask.double().mean().item() for mask in masks]
    different = [(a != b).double().mean().item() for a, b in zip(masks, masks[1:], strict=False)]
    p = layer.dropout
    error = 6 * (p * (1 - p) / masks[0].numel()) ** 0.5
    assert all(abs(rate - (1 - p)) < error + 2**-16 for rate in rates), f"kept fractions {rates}, expected {1 - p}"
    assert all(share > p * (1 - p) for share in different), f"replays repeat their masks: {different} differ"
    return {"kept": rates, "different_from_the_replay_before": different}


def _consistent_mask(layer: LayerCase, y: Tensor, dx: Tensor, da: Tensor) -> Tensor:
    """The mask in dx, after a comparison with what y and dA say of it."""
    mask = dx != 0
    kept = mask.double() / (1 - layer.dropout)
    rounding = 4 * torch.finfo(y.dtype).eps
    for what, got, expected in (
        ("y", y[:, 0], kept.sum(1) * layer.rank / layer.out_features),
        ("dA", da[0], kept.sum(0)),
    ):
        torch.testing.assert_close(
            got.double(), expected, rtol=rounding, atol=0, msg=lambda text, what=what: f"mask of {what}: {text}"
        )
    return mask


def replayed_step(case: CausalCase, capture: Capture, budget_s: float) -> dict[str, Any]:
    """Milliseconds of a whole training step, launched and replayed; each replay must train, with a loss of its own."""
    run = causal_steps(case, ["grouped"])["grouped"]()
    replay, loss = capture(run.run, case.device)
    factors = list(factors_of(run.model).values())
    losses = []
    for _ in range(2 * REPLAYS):
        before = [factor.clone() for factor in factors]
        replay.run(None)
        losses.append(loss.item())
        still = sum(torch.equal(old, new) for old, new in zip(before, factors, strict=True))
        assert not still, f"a replay left {still} of {len(factors)} factors as they were"
    assert all(torch.isfinite(torch.tensor(losses))), f"losses {losses}"
    assert len(set(losses)) == len(losses), f"replays repeat themselves: losses {losses}"
    times = interleave({"replayed": replay}, clock_for(case.device), budget_s=budget_s, min_rounds=5)
    launched = causal_steps(case, ["grouped"])["grouped"]().step()
    times |= interleave({"launched": launched}, clock_for(case.device), budget_s=budget_s, min_rounds=5)
    return {"losses": losses, "ms": {name: asdict(Spread.of(values)) for name, values in times.items()}}


def time_replays(block: BlockCase, providers: Sequence[BlockProvider], capture: Capture, budget_s: float) -> list[Row]:
    """Rows of forward plus backward of a block, every provider a graph that is replayed in turn."""
    rows, steps = [], {}
    for provider in providers:
        verdict = gate(provider, block, check_linears)
        if verdict == "ok":
            step = layer_step(provider, provider.operands(block), block.dropout, "both")
            try:
                steps[provider.name] = capture(lambda step=step: step.run(step.prepare()), block.device)[0]  # type: ignore[misc]
            except RuntimeError as failure:  # something that a graph may not hold; the others go on
                verdict = f"not captured: {failure}".splitlines()[0]
        if verdict != "ok":
            rows.append(Row.of(block, provider.name, "both", status=verdict))
    times = interleave(steps, clock_for(block.device), budget_s=budget_s)
    return [*rows, *(timed_row(Row.of(block, name, "both", clock=CLOCK), times) for name in times)]


def timed_row(row: Row, times: Mapping[str, Sequence[float]]) -> Row:
    """The row with its provider's times and ratios."""
    spread = Spread.of(times[row.provider])
    row.rounds, row.ms_p20, row.ms_p50, row.ms_p80 = len(times[row.provider]), spread.p20, spread.p50, spread.p80
    for name, value in ratios(times, row.provider).items():
        setattr(row, name, value)
    return row
