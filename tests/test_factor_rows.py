"""Factors in pieces: every kernel that takes several gives, bit for bit, what it gives for one made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_fused.dropout import draw_keep, pack

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

M, K, N = 19, 40, 24
RANKS = [(5, 3, 9), (16, 1)]
P = 0.25


def piece(rank: int, layout: str, dtype: torch.dtype) -> Tensor:
    """A [rank, K] with random values; NaN lies wherever its elements do not."""
    values = torch.randn(rank, K)
    if layout == "columns":
        return values.t().contiguous().t().to(dtype)
    held = torch.full((rank + 1, K + 5), float("nan"))
    held[:rank, :K] = values
    return held.to(dtype)[:rank, :K]


def pieces(ranks: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [piece(rank, layout, dtype).to(device) for rank in ranks]


def both_ways(call, a: list[Tensor]) -> None:
    """The call with pieces, and with what they are pieces of."""
    for ours, expected in zip(call(a), call(torch.cat(a)), strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype and not expected.isnan().any()
        assert torch.equal(ours, expected)


def mask_of(device: torch.device) -> Tensor:
    return pack(draw_keep(torch.tensor([9], device=device), M, K, P))


def thin(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_shrink(ranks, dtype, device):
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.kernels.shrink import shrink

    a = pieces(ranks, "rows apart", torch.float32, device)
    x, seed = thin(M, K, dtype=dtype, device=device), torch.tensor([3], device=device)
    tile = Tile(block_m=16, block_k=32, block_r=16)
    for p, split in ((0.0, 1), (P, 1), (P, 2)):
        both_ways(lambda a: shrink(x, a, scale=0.7, dropout_p=p, seed=seed, tile=tile, split=split)[:2], a)  # noqa: B023


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_x_factors_and_expand(ranks, masked, device):
    from lowrank_fused.kernels.expand import expand
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.kernels.x_factors import x_factors

    a = pieces(ranks, "rows apart", torch.float32, device)
    x = thin(M, K, dtype=torch.float16, device=device)
    ds = thin(M, sum(ranks), dtype=torch.float16, device=device)
    how = {"mask": mask_of(device), "dropout_p": P} if masked else {}
    both_ways(lambda a: x_factors(x, ds, a, want_dx0=True, **how), a)

    tile = Tile(block_m=16, block_n=32, block_r=16)  # 17 ranks are two blocks

    def expanded(a: Tensor | list[Tensor]) -> tuple[Tensor]:
        return (expand(ds, a.t() if isinstance(a, Tensor) else [f.t() for f in a], tile=tile, **how),)

    both_ways(expanded, a)


@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_grad_input(ranks, masked, use_tma, device):
    from lowrank_fused.kernels.grad_input import grad_input
    from lowrank_fused.kernels.launch import Tile, arch_of

    if use_tma and device.type == "cuda" and arch_of(torch.empty(0, device=device)) < 90:
        pytest.skip("needs a GPU with a tensor memory accelerator")
    a = pieces(ranks, "rows apart", torch.float32, device)
    dy, w, ds, dx = (thin(*s, dtype=torch.float16, device=device) for s in ((M, N), (N, K), (M, sum(ranks)), (M, K)))
    how = {"mask": mask_of(device), "dropout_p": P} if masked else {}
    tile = Tile(32, 32, 32, num_warps=4, num_stages=2, use_tma=use_tma)
    both_ways(lambda a: (grad_input(dy, w, ds, a, add=dx.clone(), tile=tile, **how),), a)


def test_only_what_differs_in_its_steps_or_number_is_copied(device):
    from lowrank_fused.kernels.factor_rows import as_rows

    alike = pieces((5, 3, 9), "rows apart", torch.float32, device)
    assert [factor.data_ptr() for factor in as_rows(alike)] == [factor.data_ptr() for factor in alike]
    (joined,) = as_rows([*alike, alike[0]])
    assert torch.equal(joined, torch.cat([*alike, alike[0]]))
    (joined,) = as_rows(columns := pieces((5, 3), "columns", torch.float32, device))
    assert torch.equal(joined, torch.cat(columns))


def test_declared_traffic(device):
    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.shrink import shrink

    x, a = torch.ones(32, 64, device=device), [torch.ones(4, 64, device=device), torch.ones(6, 64, device=device)]
    with record() as launches:
        shrink(x, a)
        shrink(x, torch.cat(a))
    pieced, whole = launches
    assert (pieced.bytes_read, pieced.bytes_written, pieced.flops) == (
        whole.bytes_read, whole.bytes_written, whole.flops,
    )  # fmt: skip
