"""dA and dx0 from one pass over x, and tᵀ z for any rank, whatever the number of strips and chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_fused.dropout import draw_keep, pack
from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

SHAPES = [
    # M, K, R, rows per chunk
    pytest.param(64, 128, 16, 32, id="aligned"),
    pytest.param(33, 65, 17, 16, id="one-over"),
    pytest.param(31, 63, 15, 16, id="one-under"),
    pytest.param(37, 53, 7, 64, id="one-chunk"),
    pytest.param(1, 40, 1, 16, id="one-token"),
    pytest.param(20, 48, 64, 16, id="rank-64"),
    pytest.param(40, 40, 150, 16, id="rank-blocks"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
P = 0.25


def small_tile(r: int):
    from lowrank_fused.kernels.launch import Tile

    return Tile(block_m=16, block_k=32, block_r=min(64, max(16, 1 << (r - 1).bit_length())))


def draw(m: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The mask as booleans and as bits."""
    keep = draw_keep(torch.tensor([99], device=device), m, k, P)
    return keep[:, :k], pack(keep)


def by_formula(x: Tensor, ds: Tensor, a: Tensor, keep: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """dA and dx0 in the dtype of x."""
    dx0 = ds @ a.to(x.dtype)
    if keep is None:
        return ds.t() @ x, dx0
    return ds.t() @ (x * keep / (1 - p)), dx0 * keep / (1 - p)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "r", "rows"), SHAPES)
def test_integers_come_out_exactly(m, k, r, rows, dtype, masked, device):
    from lowrank_fused.kernels.x_factors import x_factors

    x, ds = (integer_operand(m, c, low=-1, high=1, dtype=dtype).to(device) for c in (k, r))
    a = integer_operand(r, k, low=-1, high=1).to(device)
    keep, bits = draw(m, k, device) if masked else (None, None)
    # p = 0.5 doubles what is kept, exactly; the bits themselves may come from any rate.
    da, dx0 = x_factors(x, ds, a, mask=bits, dropout_p=0.5 * masked, want_dx0=True, tile=small_tile(r), chunk_rows=rows)
    exact = by_formula(x.double(), ds.double(), a.double(), keep, 0.5)
    assert torch.equal(da, exact[0].to(a.dtype)) and da.dtype == a.dtype
    assert torch.equal(dx0, exact[1].to(dtype)) and dx0.dtype == dtype


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_torch(dtype, masked, device):
    from lowrank_fused.kernels.x_factors import x_factors

    m, k, r = 90, 70, 9
    g = torch.Generator().manual_seed(0)
    x, ds, a = (torch.randn(*shape, generator=g).to(device, dtype) for shape in ((m, k), (m, r), (r, k)))
    keep, bits = draw(m, k, device) if masked else (None, None)
    p = P * masked
    got = x_factors(x, ds, a, mask=bits, dropout_p=p, want_dx0=True, tile=small_tile(r), chunk_rows=32)
    plain = by_formula(x, ds, a, keep, p)
    wide = [t.double() for t in (x, ds, a)]
    exact, size = by_formula(*wide, keep, p), by_formula(*(t.abs() for t in wide), keep, p)
    for name, ours, torchs, true, large in zip(("da", "dx0"), got, plain, exact, size, strict=True):
        assert_as_accurate_as_torch(ours, torchs, true, name, large)


def test_any_strides(device):
    from lowrank_fused.kernels.x_factors import x_factors

    wide, ds = integer_operand(80, 140).to(device), integer_operand(40, 9).to(device)
    a = integer_operand(70, 9).to(device).t()
    for x in (wide[::2, ::2], wide[:70, :40].t(), wide[7:47, 3:73]):
        da, dx0 = x_factors(x, ds, a, want_dx0=True, tile=small_tile(9), chunk_rows=16)
        assert torch.equal(da, ds.t() @ x) and torch.equal(dx0, ds @ a)


def test_dx0_only_on_request(device):
    from lowrank_fused.kernels.x_factors import x_factors

    x, ds, a = (integer_operand(*shape).to(device) for shape in ((40, 30), (40, 5), (5, 30)))
    da, dx0 = x_factors(x, ds, a)
    assert torch.equal(da, ds.t() @ x) and dx0 is None


def test_twice_the_same_bits_and_counters_left_at_zero(device, monkeypatch):
    import lowrank_fused.kernels.x_factors as module

    made = []
    zeroed = module.zeroed_counters
    monkeypatch.setattr(module, "zeroed_counters", lambda *a: made.append(zeroed(*a)) or made[-1])
    x, ds, a = (torch.randn(*shape, device=device) for shape in ((70, 90), (70, 5), (5, 90)))
    first, second = (module.x_factors(x, ds, a, tile=small_tile(5), chunk_rows=16)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(made) == 2 and not any(counters.any() for counters in made)


@pytest.mark.parametrize("r", [1, 17, 100, 150])
def test_factor_grad_of_any_rank(r, device):
    from lowrank_fused.kernels.x_factors import factor_grad

    z, t = integer_operand(40, 30).to(device), integer_operand(40, r).to(device)
    assert torch.equal(factor_grad(z, t, scale=0.5, chunk_rows=16, tile=small_tile(r)), 0.5 * t.t() @ z)
    assert torch.equal(factor_grad(z.t(), t[:30], dtype=torch.float16), (t[:30].t() @ z.t()).half())
