"""Sums over stacked factors: the kernels, and the operators above them."""

from __future__ import annotations

import pytest
import torch

from lowrank_fused.factors import stacked
from lowrank_fused.testing import integer_operand

# M, C, r, K, N
SIZES = [(2, 3, 8, 64, 32), (3, 2, 1, 7, 5), (4, 10, 5, 33, 401), (2, 2, 16, 1, 1), (2, 3, 3, 0, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.triton)], ids=["torch", "kernels"])
def implementation(request, monkeypatch) -> bool:
    """Both implementations of the operators; the kernels' one is forced upon the CPU, where the interpreter runs it."""
    if request.param:
        monkeypatch.setattr(stacked, "_uses_kernels", lambda a, b: a.dtype != torch.float64)
    return request.param


def operands(size, dtype, device):
    m, c, r, k, n = size
    return integer_operand(m * r, k, dtype=dtype).to(device), integer_operand(n, c * r, dtype=dtype).to(device), m, c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_integers_are_summed_and_repeated_exactly(size, dtype, device, implementation, poisoned):
    a, b, m, c = operands(size, dtype, device)
    sums = stacked.sum_blocks_op(a, b, m, c)
    assert torch.equal(sums[0], sum(a.chunk(m)) if a.numel() else a[: len(a) // m])
    assert torch.equal(sums[1], sum(b.chunk(c, dim=1)))
    repeated = stacked.repeat_blocks(*sums, m, c)
    assert torch.equal(repeated[0], sums[0].repeat(m, 1)) and torch.equal(repeated[1], sums[1].repeat(1, c))


@pytest.mark.parametrize("counts", [(2, 3), (1, 3), (2, 1), (1, 1)], ids=str)
def test_gradients_are_those_of_a_sum(counts):
    m, c = counts
    leaves = [torch.randn(m * 4, 6, dtype=torch.float64), torch.randn(5, c * 4, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.autograd.gradcheck(lambda a, b: stacked.sum_blocks(a, b, m, c), leaves)


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_a_sum_is_formed_in_fp32_and_rounded_once(device, monkeypatch):
    monkeypatch.setattr(stacked, "_uses_kernels", lambda a, b: True)
    a, b = torch.randn(6 * 3, 40).half().to(device), torch.randn(50, 5 * 3).half().to(device)
    sums = stacked.sum_blocks_op(a, b, 6, 5)
    exact = a.unflatten(0, (6, -1)).double().sum(0), b.unflatten(1, (5, -1)).double().sum(1)
    for found, expected in zip(sums, exact, strict=True):
        torch.testing.assert_close(found, expected.half(), rtol=2**-10, atol=1e-6)


@pytest.mark.triton
def test_one_launch_each_way_and_the_bytes_that_are_moved():
    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.stacked import Stack, repeat_blocks, sum_blocks

    a, b = torch.empty(2 * 8, 100, device="meta"), torch.empty(60, 3 * 8, device="meta")
    of_a, of_b = Stack(1, 2, 800), Stack(60, 3, 8)
    with record() as launches:
        repeat_blocks(*sum_blocks(a, b, of_a, of_b), of_a, of_b)
    stacked_bytes, summed = 4 * (1600 + 1440), 4 * (800 + 480)
    assert [launch.name for launch in launches] == ["sum_blocks", "repeat_blocks"]
    assert [(one.bytes_read, one.bytes_written) for one in launches] == [
        (stacked_bytes, summed),
        (summed, stacked_bytes),
    ]


def test_opcheck():
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(7, 9, requires_grad=True)
    torch.library.opcheck(stacked.sum_blocks_op, (a, b, 2, 3))
    torch.library.opcheck(stacked.repeat_blocks, (torch.randn(3, 5), torch.randn(7, 3), 2, 3))


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"3 and 2 blocks do not divide a \[4, 2\] and b \[2, 4\]"):
        stacked.sum_blocks(torch.zeros(4, 2), torch.zeros(2, 4), 3, 2)
