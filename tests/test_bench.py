"""The measuring core refuses what is wrong, counts bytes exactly, times in turn, writes what it found."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank_fused.benchmark import (
    Case,
    Provider,
    Row,
    Spread,
    Step,
    check,
    default_names,
    document,
    interleave,
    kept_bytes,
    measure,
    paired_ratio,
    providers_for,
    published,
    write_csv,
    write_json,
)
from lowrank_fused.benchmark.accuracy import SEED, recovered_mask
from lowrank_fused.benchmark.block import BlockCase, BlockProvider, block_names, block_providers
from lowrank_fused.benchmark.linears import check_linears
from lowrank_fused.benchmark.measure import gate, ratios
from lowrank_fused.benchmark.providers import eager
from lowrank_fused.benchmark.published import PUBLISHED, published_forward, why_not
from lowrank_fused.benchmark.record import commit
from lowrank_fused.benchmark.timing import CudaClock
from lowrank_fused.dropout import draw_keep, draw_seed, unpadded
from lowrank_fused.errors import UnsupportedError

SMALL = Case(in_features=40, out_features=24, tokens=17, rank=5)


def spoiled(spoil: Callable[..., Tensor]) -> Provider:
    """PEFT's arithmetic with a fault."""
    return Provider("spoiled", spoil)


def faulty_scale(x, weight, a, b, bias, scale, p):
    return eager(x, weight, a, b, bias, 1.001 * scale, p)


def faulty_gradient(x, weight, a, b, bias, scale, p):
    return eager(x, weight, a, b + (b.detach() * 0.01 - b * 0.01), bias, scale, p)


def not_finite(x, weight, a, b, bias, scale, p):
    return eager(x, weight, a, b, bias, scale, p) + torch.where(x[:1, :1] == x[:1, :1], torch.nan, 0.0)


def other_dtype(x, weight, a, b, bias, scale, p):
    return eager(x, weight, a, b, bias, scale, p).double()


class ForgetsMask(torch.autograd.Function):
    """A dropout whose backward lets everything through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def forgotten_mask(x, weight, a, b, bias, scale, p):
    return F.linear(x, weight) + F.linear(F.linear(ForgetsMask.apply(x, p), a), b) * scale


@pytest.mark.parametrize("fault", [faulty_scale, faulty_gradient, not_finite, other_dtype])
def test_gate_refuses_a_wrong_provider(fault: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        check(spoiled(fault), SMALL)


def test_gate_refuses_a_backward_with_another_mask() -> None:
    with pytest.raises(AssertionError):
        check(spoiled(forgotten_mask), replace(SMALL, dropout=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gate_passes_every_default_provider(dtype: torch.dtype, dropout: float) -> None:
    case = replace(SMALL, dtype=dtype, dropout=dropout, bias=True)
    verdicts = {p.name: gate(p, case) for p in providers_for(default_names(case), case)}
    assert set(verdicts.values()) == {"ok"}, verdicts
    assert {"frozen", "eager", "three-gemm", "reference", "addmm"} <= set(verdicts)
    assert ("auto-fp32" in verdicts) == (dtype != torch.float32)


def test_three_gemm_makes_the_products_that_it_says() -> None:
    """9 without dropout; what it keeps is x alone, or x with dropout's own mask beside it."""
    (provider,) = providers_for(["three-gemm"], SMALL)
    o = provider.operands(SMALL)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _products}) as counter:
        torch.autograd.grad(provider(o, 0.0), o.leaves(), o.dy)
    thin = 2 * SMALL.tokens * SMALL.rank
    base = 2 * SMALL.tokens * SMALL.in_features * SMALL.out_features
    # x Aᵀ twice, dA and g A; the term in y, dy B and dB.
    expected = 2 * base + thin * (4 * SMALL.in_features + 3 * SMALL.out_features)
    assert counter.get_total_flops() == expected
    assert kept_bytes(lambda: provider(o, 0.0), o.parameters()) == o.x.nbytes


def _products(_: Any, p: Any, q: Any, **options: Any) -> int:
    return 2 * p[0] * p[1] * q[1]


def test_published_kernels_say_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PUBLISHED:
        with pytest.raises(UnsupportedError, match=f"{name} is not installed .https://github.com"):
            providers_for([name], SMALL)
    assert not set(PUBLISHED) & set(default_names(SMALL))
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: object())
    cuda = torch.device("cuda")
    assert "CUDA device" in str(why_not("unsloth", torch.device("cpu"), 0.0, False))
    assert why_not("unsloth", cuda, 0.0, False) is None and why_not("lorafusion", cuda, 0.1, True) is None
    assert why_not("unsloth", cuda, 0.1, False) == "unsloth does not train with dropout"
    assert why_not("lorafusion", cuda, 0.0, False) == "lorafusion does not train without dropout"
    assert why_not("unsloth", cuda, 0.0, True) == "unsloth takes no bias"
    with pytest.raises(UnsupportedError, match=r"importing unsloth\.kernels\.fast_lora\.LoRA_W failed"):
        published_forward("unsloth", cuda, 0.0, False)


def test_published_kernels_are_called_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of the published functions, which take [batch, tokens, features]."""

    def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
        assert x.ndim == 3 and 0 <= seed < 2**30
        dropped = F.dropout(x, dropout_p) if dropout_p else x
        return F.linear(x, linear_w, linear_bias) + F.linear(F.linear(dropped, lora_a), lora_b) * alpha

    class LoRA_W:
        @staticmethod
        def apply(X, W, W_quant, A, B, S):
            assert X.ndim == 3 and W_quant is None
            return F.linear(X, W) + F.linear(F.linear(X, A), B) * S

    modules = {
        "lorafusion.ops.lora_v1": SimpleNamespace(fused_linear_lora=fused_linear_lora),
        "unsloth.kernels.fast_lora": SimpleNamespace(LoRA_W=LoRA_W),
    }
    monkeypatch.setattr(published, "why_not", lambda *_: None)
    monkeypatch.setattr(published.importlib, "import_module", modules.__getitem__)
    for name, dropout in (("lorafusion", 0.0), ("lorafusion", 0.3), ("unsloth", 0.0)):
        case = replace(SMALL, dropout=dropout)
        (provider,) = providers_for([name], case)
        assert gate(provider, case) == "ok"


BLOCK = BlockCase(48, 80, 17, 5, kv_features=24)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_shares_its_inputs(dtype: torch.dtype, dropout: float) -> None:
    case = replace(BLOCK, dtype=dtype, dropout=dropout)
    providers = block_providers(block_names(case), case)
    rows = measure(case, providers, judge=check_linears, budget_s=0)
    assert {row.status for row in rows} == {"ok"} and {row.what for row in rows} == {"block"}
    o = providers[0].operands(case)
    assert [list(o.inputs), len(o.leaves()), len(o.dy)] == [["x", "attention", "x2", "h"], 4 + 14, 7]
    assert o.layers["q"].x is o.layers["v"].x and o.layers["gate"].x is o.layers["up"].x
    ours = next(row for row in rows if row.provider == "addmm")
    grouped = next(row for row in rows if row.provider == "grouped")
    assert grouped.routes == "q + k + v, o, gate + up, down: addmm / addmm"
    if dropout:  # one mask for q, k and v, one for gate and up
        assert grouped.kept_bytes_per_token < ours.kept_bytes_per_token
    if not dropout:  # four inputs once each and s of every linear
        assert ours.kept_bytes_per_token == dtype.itemsize * (3 * 48 + 80 + 7 * 5)


def test_work_of_a_block() -> None:
    m, h, i, k = 17, 48, 80, 24
    weights = 2 * h * h + 2 * h * k + 3 * h * i
    assert BLOCK.flops("forward") == 2 * m * weights + 2 * m * 5 * (4 * h + 2 * (h + k) + 3 * (h + i))
    outputs = 3 * h + 2 * k + 2 * i  # q, o, down; k, v; gate, up
    inputs = 3 * h + i
    assert BLOCK.bytes("forward") == 4 * (weights + m * (inputs + outputs))
    assert BLOCK.bytes("backward") == 4 * (weights + m * (2 * inputs + outputs))
    assert BLOCK.bytes("both") == BLOCK.bytes("forward") + BLOCK.bytes("backward")


class ForgetsUp(torch.autograd.Function):
    """Adds, and sends the gradient to the first alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


def test_the_gate_of_a_block_sees_one_wrong_linear() -> None:
    def wrong_when_narrow(x, weight, a, b, bias, scale, p):
        return eager(x, weight, a, b, bias, scale * (1.01 if len(weight) == 24 else 1.0), p)

    def forgets_a_path(x, weight, a, b, bias, scale, p):
        low_rank = F.linear(F.linear(F.dropout(x, p), a), b) * scale
        return ForgetsUp.apply(F.linear(x, weight), low_rank) if len(weight) == 80 else F.linear(x, weight) + low_rank

    for fault, dropout, where in ((wrong_when_narrow, 0.3, "y of k"), (forgets_a_path, 0.0, "gradient of x2")):
        provider = BlockProvider(spoiled(fault))
        assert f"wrong: {where}" in gate(provider, replace(BLOCK, dropout=dropout), check_linears)


def test_a_block_compiles_as_one_function() -> None:
    (provider,) = block_providers(["compile"], BLOCK)
    assert provider.whole is not None and block_providers(["eager"], BLOCK)[0].whole is None
    with pytest.raises(ValueError, match="kv_features must be at least the rank, 5, got 4"):
        replace(BLOCK, kv_features=4)


def test_recovered_mask_is_the_one_that_was_drawn() -> None:
    case = replace(SMALL, dropout=0.4)
    (ours,) = providers_for(["addmm"], case)
    found = recovered_mask(ours, ours.operands(case), case.dropout)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        drawn = draw_keep(draw_seed(case.device), case.tokens, case.in_features, case.dropout)
    assert torch.equal(found, unpadded(drawn, case.in_features))
    assert 0.3 < 1 - found.float().mean().item() < 0.5


def test_a_wrong_provider_gets_no_number() -> None:
    providers = [*providers_for(["frozen", "eager"], SMALL), spoiled(faulty_scale)]
    rows = measure(SMALL, providers, ("forward", "both"), budget_s=0)
    by_name = {(row.provider, row.mode): row for row in rows}
    assert len(by_name) == 6
    assert by_name["spoiled", "both"].status.startswith("wrong: y: ours max")
    assert by_name["spoiled", "both"].ms_p50 is None
    assert by_name["eager", "both"].status == "ok" and by_name["eager", "both"].ms_p50 > 0


def test_a_crash_is_a_verdict() -> None:
    def crashes(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    assert gate(spoiled(crashes), SMALL) == "failed: RuntimeError: no such kernel"
    assert all(row.ms_p50 is None for row in measure(SMALL, [spoiled(crashes)], budget_s=0))


def test_frozen_has_no_adapter() -> None:
    (frozen,) = providers_for(["frozen"], SMALL)
    o = frozen.operands(SMALL)
    assert frozen.leaves(o) == (o.x,)
    assert kept_bytes(lambda: frozen(o, 0.0), o.parameters()) == 0


def test_provider_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="provider must be one of .*got 'peft'"):
        providers_for(["peft"], SMALL)
    with pytest.raises(ValueError, match="got 'frozen-fp32'"):
        providers_for(["frozen-fp32"], SMALL)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match="CUDA device"):
        providers_for(["thin"], SMALL)


def test_fp32_adapters_run_as_peft_ships_them() -> None:
    case = replace(SMALL, dtype=torch.bfloat16)
    shipped, ours = providers_for(["eager-fp32", "auto-fp32"], case)
    for provider in (shipped, ours):
        o = provider.operands(case)
        y = provider(o, 0.0)
        assert y.dtype == torch.bfloat16 and o.a.dtype == torch.float32
        assert [g.dtype for g in torch.autograd.grad(y, provider.leaves(o), o.dy)] == [
            torch.bfloat16,
            torch.float32,
            torch.float32,
        ]


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", 0), ("rank", 0), ("rank", 25), ("dropout", 1.0), ("dropout", -0.1)]
)
def test_a_case_must_make_sense(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **{field: value})


def test_flops_by_hand() -> None:
    base, thin = 2 * 17 * 40 * 24, 2 * 17 * 5 * (40 + 24)
    assert SMALL.flops("forward") == base + thin
    assert SMALL.flops("both") == 2 * base + 3 * thin


def test_kept_bytes_by_hand() -> None:
    x, other = torch.ones(8, 4), torch.ones(8, 4, requires_grad=True)
    weight = torch.ones(4, 3, requires_grad=True)
    # A product keeps x for the gradient of weight and weight for that of x; the second x is a view.
    assert kept_bytes(lambda: x @ weight) == 8 * 4 * 4
    assert kept_bytes(lambda: (x @ weight, x[:4] @ weight)) == 8 * 4 * 4
    assert kept_bytes(lambda: other @ weight) == 8 * 4 * 4 + 4 * 3 * 4
    assert kept_bytes(lambda: other @ weight, [weight]) == 8 * 4 * 4
    assert kept_bytes(lambda: other * other) == 8 * 4 * 4
    assert kept_bytes(lambda: other.exp()) == 8 * 4 * 4, "exp keeps its result"
    assert kept_bytes(lambda: other + 1) == 0
    # Storages of equal size that are freed one after the other must not be taken for the same one.
    assert kept_bytes(lambda: [torch.ones(8, 4) * other for _ in range(3)]) == 3 * 8 * 4 * 4
    meta = torch.ones(8, 4, device="meta", requires_grad=True)
    assert kept_bytes(lambda: meta @ meta.t()) == 8 * 4 * 4


def test_kept_bytes_of_a_layer() -> None:
    case = Case(64, 48, 16, 8, dtype=torch.bfloat16)
    for p, expected in ((0.0, 2 * 64 + 2 * 8), (0.1, 2 * 64 + 2 * 8 + 64 // 8)):
        (ours,) = providers_for(["addmm"], case)
        o = ours.operands(case)
        assert kept_bytes(lambda ours=ours, o=o, p=p: ours(o, p), o.parameters()) == expected * 16


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == Spread(1.0, 2.5, 4.0)


def test_interleave_takes_turns() -> None:
    calls: list[str] = []
    steps = {name: Step(lambda state, name=name: calls.append(name + state), lambda: "!") for name in "abc"}

    def clock(step: Step) -> float:
        step.run(step.prepare())
        return float(len(calls))

    progress: list[tuple[int, int]] = []
    times = interleave(
        steps, clock, budget_s=0, min_rounds=4, on_round=lambda done, rounds: progress.append((done, rounds))
    )
    assert calls[:6] == ["a!", "b!", "c!"] * 2, "two warm-up calls each"
    assert calls[6:] == [name + "!" for name in "abcbcacababc"]
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(interleave(steps, clock, budget_s=60, max_rounds=7)["a"]) == 7


def test_cuda_clock_measures_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: a sleep as long as the last enqueueing took, an event, the step, an event."""
    stream: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            stream.append("event")

        def synchronize(self) -> None:
            stream.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 2.5

    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.append("sleep" if cycles else "no sleep"))
    clock = CudaClock(torch.device("cpu"))
    assert clock.cold is not None and clock.cold.numel() == 100 << 20
    step = Step(lambda state: stream.append(state), prepare=lambda: stream.append("prepare") or "run")  # type: ignore[func-returns-value]
    assert clock(step) == clock(step) == 2.5
    first = ["prepare", "no sleep", "event", "run", "event", "wait"]
    assert stream == [*first, "prepare", "sleep", "event", "run", "event", "wait"]
    assert clock.cold.count_nonzero() == 0
    assert CudaClock(torch.device("cpu"), flush_l2=False).cold is None


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = [2.0, 20.0, 200.0], [1.0, 10.0, 50.0]
    assert paired_ratio(slow, fast).p50 == 2.0
    times = {
        "eager": slow,
        "frozen": [1.0, 5.0, 100.0],
        "addmm": fast,
        "eager-fp32": fast,
        "auto-fp32": [1.0, 2.0, 10.0],
    }
    assert ratios(times, "addmm")["speedup"] == 2.0
    assert ratios(times, "addmm")["overhead"] == 1.0
    assert ratios(times, "auto-fp32")["speedup"] == 5.0, "fp32 adapters are compared with fp32 adapters"
    assert ratios(times, "frozen") == {"overhead": 1.0}
    assert ratios({"addmm": fast}, "addmm") == {}


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_rows_of_a_measurement(mode: str, tmp_path: Path) -> None:
    case = replace(SMALL, label="q_proj, o_proj")
    rows = measure(case, providers_for(["frozen", "eager", "addmm", "auto"], case), (mode,), budget_s=0)
    ours = next(row for row in rows if row.provider == "addmm")
    assert ours.rounds == 5 and ours.ms_p20 <= ours.ms_p50 <= ours.ms_p80
    assert ours.tflops == pytest.approx(case.flops(mode) / ours.ms_p50 * 1e-9)
    assert ours.kept_bytes_per_token == 4 * 40 + 4 * 5
    assert next(row for row in rows if row.provider == "auto").routes == "addmm / addmm"
    write_json(tmp_path / "new" / "rows.json", document(rows, {"cpu": "any"}, ["bench", "-x"], goals=[]))
    write_csv(tmp_path / "rows.csv", rows)
    read = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert read["command"] == ["bench", "-x"] and read["environment"] == {"cpu": "any"} and read["goals"] == []
    assert {"commit", "time"} <= set(read)
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    for row, from_json, from_csv in zip(rows, read["rows"], lines, strict=True):
        assert from_json["provider"] == from_csv["provider"] == row.provider
        assert from_json["ms_p50"] == float(from_csv["ms_p50"]) == pytest.approx(row.ms_p50, rel=1e-5)
        assert from_csv["label"] == "q_proj, o_proj" and from_csv["peak_mib"] == ""
    assert not list((tmp_path / "new").glob("*.partial"))


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "rows.json", document([Row.of(SMALL, "x", "both", ms_p50=float("nan"))], {}, []))
    assert not (tmp_path / "rows.json").exists()


def test_commit_of_a_folder(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    installed = tmp_path / "installed"
    installed.mkdir()
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "x")
    assert commit(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    assert commit(installed) == "unknown", "a package that is merely installed below a repository is not in it"
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path).endswith("+")
