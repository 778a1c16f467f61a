from __future__ import annotations

import pytest
import torch

from lowrank_fused.dropout import draw_keep, pack
from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

SHAPES = [
    # M, N, R
    pytest.param(32, 64, 16, id="aligned"),
    pytest.param(33, 65, 17, id="one-over"),
    pytest.param(31, 63, 15, id="one-under"),
    pytest.param(37, 53, 7, id="primes"),
    pytest.param(1, 40, 4, id="one-token"),
    pytest.param(5, 3, 1, id="rank-one"),
    pytest.param(20, 48, 64, id="rank-64"),
    pytest.param(20, 40, 150, id="loop-over-ranks"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
P = 0.25


def small_tile(block_r: int = 16):
    from lowrank_fused.kernels.launch import Tile

    return Tile(block_m=16, block_n=32, block_r=block_r)


def keep_mask(m: int, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    keep = draw_keep(torch.tensor([5], device=device), m, n, P)
    return keep[:, :n], pack(keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_integers_come_out_exactly(m, n, r, dtype, device):
    from lowrank_fused.kernels.expand import expand

    v = integer_operand(m, r, low=-1, high=1, dtype=dtype).to(device)
    b = integer_operand(n, r, low=-1, high=1).to(device)
    bias = integer_operand(n).to(device)
    exact = v.double() @ b.double().t()
    assert torch.equal(expand(v, b, tile=small_tile()), exact.to(dtype))
    assert torch.equal(expand(v, b, bias=bias, tile=small_tile()), (exact + bias).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_masked_integers_come_out_exactly(m, n, r, dtype, device):
    from lowrank_fused.kernels.expand import expand

    ds = 3 * integer_operand(m, r, low=-1, high=1, dtype=dtype).to(device)
    a = integer_operand(r, n, low=-1, high=1, dtype=dtype).to(device)
    keep, mask = keep_mask(m, n, device)
    # 1 / (1 − p) = 4 / 3 is not exact, the products are multiples of 3.
    expected = torch.where(keep, (ds.double() @ a.double()) * 4 / 3, 0.0).to(dtype)
    assert torch.equal(expand(ds, a.t(), mask=mask, dropout_p=P, tile=small_tile()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_as_accurate_as_torch(dtype, masked, device):
    from lowrank_fused.kernels.expand import expand

    m, n, r = 45, 77, 20
    torch.manual_seed(0)
    v, b, bias = (torch.randn(shape).to(device, dtype) for shape in ((m, r), (n, r), (n,)))
    keep, mask = keep_mask(m, n, device)
    factor = keep * (1 / (1 - P)) if masked else torch.ones(m, n, device=device)

    def reference(v, b, bias):
        return (v @ b.t()) * factor.to(v.dtype) + bias

    y = expand(v, b, bias=bias, mask=mask if masked else None, dropout_p=P, tile=small_tile())
    wide = [t.double() for t in (v, b, bias)]
    assert_as_accurate_as_torch(y, reference(v, b, bias), reference(*wide), "y0", reference(*(t.abs() for t in wide)))


def test_any_strides_and_output_dtype(device):
    from lowrank_fused.kernels.expand import expand

    v = integer_operand(80, 40).to(device)[3:36, 5:14:2]
    b = integer_operand(5, 53).to(device).t()
    y = expand(v, b, dtype=torch.float16, tile=small_tile())
    assert torch.equal(y, (v @ b.t()).half())


@pytest.mark.parametrize("r", [4, 100])
def test_default_tile(r, device):
    from lowrank_fused.kernels.expand import expand

    v, b = integer_operand(70, r, low=-1, high=1).to(device), integer_operand(140, r, low=-1, high=1).to(device)
    assert torch.equal(expand(v, b), v @ b.t())


def test_no_tokens(device):
    from lowrank_fused.kernels.expand import expand

    assert expand(torch.ones(0, 4, device=device), torch.ones(20, 4, device=device)).shape == (0, 20)
