"""The kernels that gather factors from one vector and sum gradients back, and the operators above them."""

from __future__ import annotations

import pytest
import torch

from lowrank_fused.factors import gather as gather_ops
from lowrank_fused.factors.projection import projection
from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

SIZES = [
    # D, d
    pytest.param(1024, 64, id="aligned"),
    pytest.param(1031, 37, id="primes"),
    pytest.param(1000, 999, id="one-or-two-each"),
    pytest.param(997, 997, id="a-permutation"),
    pytest.param(9, 20, id="more-entries-than-elements"),
    pytest.param(700, 1, id="one-entry"),
    pytest.param(1, 1, id="one-element"),
    pytest.param(1500, 2, id="long-segments"),
]
RECIPES = ["table", "bijection"]
kernels = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]


def kernel_index(p, device):
    """What the kernels take: the stored index or the permutation's numbers."""
    return gather_ops._for_kernels(p, device)


def inverse_index(p, device):
    return p.segments(device) if p.index == "table" else kernel_index(p, device)


def dense(p) -> torch.Tensor:
    """P as a matrix, float64."""
    matrix = torch.zeros(p.total, p.length, dtype=torch.float64)
    entries = p.entries(0, p.total, torch.device("cpu")).long()
    matrix[torch.arange(p.total), entries] = entries.bincount(minlength=p.length).double().rsqrt()[entries]
    return matrix


class TestKernels:
    pytestmark = kernels

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize(("total", "length"), SIZES)
    def test_gather_takes_the_right_entries(self, total, length, recipe, device):
        from lowrank_fused.kernels.gather import gather
        from lowrank_fused.kernels.launch import Tile

        p, theta, scale = projection(total, length, 3, recipe), *torch.randn(2, length).to(device)
        entries, index = p.entries(0, total, device).long(), kernel_index(p, device)
        expected = (theta * scale)[entries]
        assert torch.equal(gather(theta, index, scale), expected)
        assert torch.equal(gather(theta, index, scale, tile=Tile(block_m=256)), expected)
        first, last = total // 3, total - total // 5
        assert torch.equal(gather(theta, index, scale, first=first, count=last - first), expected[first:last])
        assert gather(theta, index, scale, first=first, count=0).shape == (0,)
        for dtype in (torch.float16, torch.bfloat16):
            low = theta.to(dtype)
            assert torch.equal(gather(low, index, scale), (low.float() * scale)[entries].to(dtype))

    def test_gather_reads_wide_indices(self, device):
        from lowrank_fused.kernels.gather import gather

        p, theta = projection(70_100, 70_000, 3, "table"), torch.randn(70_000).to(device)
        assert p.table(device).dtype == torch.int32
        ones = torch.ones(70_000, device=device)
        assert torch.equal(gather(theta, p.table(device), ones), theta[p.table(device).long()])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize(("total", "length"), SIZES)
    def test_integers_are_summed_exactly(self, total, length, recipe, dtype, device):
        from lowrank_fused.kernels.gather import scatter_add, segment_sum

        p, grad = projection(total, length, 5, recipe), integer_operand(total, dtype=dtype).to(device)
        entries = p.entries(0, total, device).long()
        expected = torch.zeros(length, device=device).index_put_((entries,), grad.float(), accumulate=True)
        scale = 2.0 ** (torch.arange(length, device=device) % 5)
        assert torch.equal(segment_sum(grad, inverse_index(p, device), scale), expected * scale)
        assert torch.equal(scatter_add(grad, kernel_index(p, device), length), expected)

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("block", [(1, 32), (8, 16), (64, 64)])
    def test_every_tile_sums_alike(self, block, recipe, device):
        from lowrank_fused.kernels.gather import segment_sum
        from lowrank_fused.kernels.launch import Tile

        p, grad = projection(203, 7, 5, recipe), integer_operand(203).to(device)
        ones, inverse = torch.ones(7, device=device), inverse_index(p, device)
        tile = Tile(block_m=block[0], block_k=block[1])
        assert torch.equal(segment_sum(grad, inverse, ones, tile=tile), segment_sum(grad, inverse, ones))

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_part_is_scattered_to_its_entries(self, recipe, device):
        from lowrank_fused.kernels.gather import scatter_add

        p, grad = projection(1031, 37, 5, recipe), integer_operand(300).to(device)
        entries = p.entries(77, 300, device).long()
        expected = torch.zeros(37, device=device).index_put_((entries,), grad, accumulate=True)
        assert torch.equal(scatter_add(grad, kernel_index(p, device), 37, first=77), expected)

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize(("total", "length"), [(1031, 37), (5000, 3)])
    def test_sums_are_as_accurate_as_torch_and_the_same_in_every_run(self, total, length, recipe, device):
        from lowrank_fused.kernels.gather import segment_sum

        torch.manual_seed(0)
        p, grad = projection(total, length, 5, recipe), torch.randn(total).to(device)
        entries = (p.entries(0, total, device).long(),)
        scale, inverse = p.scale(device, torch.float32), inverse_index(p, device)

        def plain(grad, scale):
            return grad.new_zeros(length).index_put_(entries, grad, accumulate=True) * scale

        found = segment_sum(grad, inverse, scale)
        size = plain(grad.double().abs(), scale.double())
        assert_as_accurate_as_torch(found, plain(grad, scale), plain(grad.double(), scale.double()), "dθ", size)
        assert torch.equal(found, segment_sum(grad, inverse, scale))

    def test_bytes_are_those_that_are_moved(self):
        from lowrank_fused.kernels.gather import gather, segment_sum
        from lowrank_fused.kernels.launch import record

        p, theta, scale = projection(1000, 50, 1, "table"), *torch.empty(2, 50, device="meta")
        cpu = torch.device("cpu")
        table, segments = p.table(cpu).to("meta"), tuple(t.to("meta") for t in p.segments(cpu))
        with record() as launches:
            segment_sum(gather(theta.bfloat16(), table, scale), segments, scale)
        assert [launch.name for launch in launches] == ["gather", "segment_sum"]
        assert [(one.bytes_read, one.bytes_written) for one in launches] == [
            (50 * 2 + 50 * 4 + 1000 * 2, 1000 * 2),
            (1000 * 2 + 50 * 4 + 1000 * 4 + 51 * 4, 50 * 4),
        ]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.triton)], ids=["torch", "kernels"])
def implementation(request, monkeypatch) -> bool:
    """Both implementations of the operators; the kernels' one is forced upon the CPU, where the interpreter runs it."""
    if request.param:
        monkeypatch.setattr(gather_ops, "_uses_kernels", lambda like: like.dtype != torch.float64)
    return request.param


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("first", "last"), [(0, 1031), (100, 411)])
def test_operators_are_p_and_its_transpose(first, last, recipe, deterministic, implementation):
    p = projection(1031, 37, 9, recipe)
    matrix, numbers = dense(p), dict(total=1031, seed=9, index=recipe)
    for dtype in (torch.float64, torch.float32):
        theta, grad = torch.randn(37, dtype=dtype), torch.randn(last - first, dtype=dtype)
        ours = gather_ops.project(theta, first, last - first, **numbers)
        torch.testing.assert_close(ours, (matrix[first:last] @ theta.double()).to(dtype))
        back = gather_ops.project_back(grad, first, length=37, deterministic=deterministic, **numbers)
        torch.testing.assert_close(back, (matrix[first:last].T @ grad.double()).to(dtype))
    low = gather_ops.project(theta.bfloat16(), first, last - first, **numbers)
    assert torch.equal(low, (theta.bfloat16().float() * p.scale(theta.device, torch.float32))[
        p.entries(first, last - first, theta.device).long()
    ].bfloat16())  # fmt: skip
    assert gather_ops.project_back(low, first, length=37, deterministic=True, **numbers).dtype == torch.float32


@pytest.mark.parametrize("recipe", RECIPES)
def test_opcheck(recipe):
    numbers = dict(total=1031, seed=9, index=recipe)
    torch.library.opcheck(gather_ops.project, (torch.randn(37), 100, 300), numbers)
    more = dict(length=37, deterministic=True)
    torch.library.opcheck(gather_ops.project_back, (torch.randn(300), 100), numbers | more)
    torch.library.opcheck(gather_ops.project_back, (torch.randn(1031).bfloat16(), 0), numbers | more)
