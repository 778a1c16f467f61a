"""The route that widens some rows at a time computes the same however many these are, in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowrank_fused import Gate, lowrank_add, lowrank_linear
from lowrank_fused.branches import Branch, lowrank_group
from lowrank_fused.routes import precise
from lowrank_fused.tiled import tiled_identity

M, N, K, R = 37, 18, 24, 4
BF16 = torch.bfloat16
MORE = {"scale": 0.5, "route": "precise", "seed": torch.tensor([7])}


def operands(core: str = "none", rank: int = R) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tensors that get gradients; W and dy. Adapters are fp32."""
    torch.manual_seed(0)
    middle = {"diag": (rank,), "dense": (rank, rank), "gate": (M, 2)}.get(core)
    leaves = {
        "x": torch.randn(M, K).to(BF16),
        "a": torch.randn(rank, K),
        "b": torch.randn(N, 2 * rank if core == "gate" else rank),
        **({} if middle is None else {"core": torch.randn(middle)}),
    }
    weight, dy = torch.randn(N, K).to(BF16), torch.randn(M, N).to(BF16)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, weight, dy


def whole(core: str, p: float, rank: int = R) -> list[Tensor]:
    leaves, weight, dy = operands(core, rank)
    middle = leaves.get("core")
    given = Gate(middle) if core == "gate" else middle
    y = lowrank_linear(leaves["x"], weight, leaves["a"], leaves["b"], core=given, dropout_p=p, **MORE)
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]


def beside(core: str, p: float) -> list[Tensor]:
    leaves, weight, dy = operands(core)
    y = lowrank_add(leaves["x"] @ weight.t(), *list(leaves.values())[:3], core=leaves.get("core"), dropout_p=p, **MORE)
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]


def group(p: float) -> list[Tensor]:
    leaves, weight, dy = operands()
    more = operands()[0]
    members = [Branch(weight, leaves["a"], leaves["b"]), Branch(weight, more["a"], more["b"])]
    ys = lowrank_group(leaves["x"], members, dropout_p=p, **MORE)
    return [*ys, *torch.autograd.grad(ys, [*leaves.values(), more["a"], more["b"]], [dy, dy])]


def shards(core: str, p: float) -> list[Tensor]:
    leaves, weight, dy = operands()
    a = tiled_identity(R, K, torch.float32, torch.device("cpu"))
    y = lowrank_linear(leaves["x"], weight, a, leaves["b"], dropout_p=p, **MORE)
    return [y, *torch.autograd.grad(y, [leaves["x"], leaves["b"]], dy)]


CALLS = {
    **{core: lambda p, core=core: whole(core, p) for core in ("none", "diag", "dense", "gate")},
    "many columns": lambda p: whole("none", p, rank=70),
    "beside": lambda p: beside("diag", p),
    "group": group,
    "shards": lambda p: shards("none", p),
}


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("call", CALLS)
def test_blocks_of_any_length_give_the_same(call, p, monkeypatch):
    expected = CALLS[call](p)
    for rows in (1, 8, 36):
        monkeypatch.setattr(precise, "rows_at_a_time", lambda t, rows=rows: rows)
        for got, one_block in zip(CALLS[call](p), expected, strict=True):
            # Sums in another order: fp32 results differ by some last bits of the largest, bf16 ones by one at most.
            largest, eps = one_block.abs().max(), torch.finfo(one_block.dtype).eps
            assert (got - one_block).abs().max() <= (16 if got.dtype == torch.float32 else 1) * eps * largest


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_read_before_it_is_written(call, unwritten_memory_is_nan):
    assert all(result.isfinite().all() for result in CALLS[call](0.25))


@pytest.mark.parametrize("rank", [R, 70])
def test_no_tokens_give_gradients_of_zero(rank, unwritten_memory_is_nan):
    leaves, weight, _ = operands(rank=rank)
    y = lowrank_linear(leaves["x"][:0], weight, leaves["a"], leaves["b"], **MORE)
    assert y.shape == (0, N)
    for grad in torch.autograd.grad(y, [leaves["a"], leaves["b"]], y):
        assert grad.eq(0).all()


@pytest.mark.parametrize("dropped", [False, True])
def test_every_block_takes_the_memory_of_the_one_before(dropped, monkeypatch):
    monkeypatch.setattr(precise, "rows_at_a_time", lambda t: 5)
    x, keep = torch.randn(M, K).to(BF16), torch.rand(M, K) > 0.5 if dropped else None
    places, rows = set(), []
    for some, wide in precise._widened_blocks(x, keep):
        places.add(wide.data_ptr())
        expected = x[some] if keep is None else x[some] * keep[some]
        assert wide.dtype == torch.float32 and torch.equal(wide, expected.float())
        rows += range(M)[some]
    assert rows == list(range(M)) and len(places) == 1
