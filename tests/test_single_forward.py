"""y, s and the mask from one launch: what `shrink` and `lowrank_forward` give in two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowrank_fused.dropout import draw_keep, pack, unpack
from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

SHAPES = [
    # M, N, K, R for 32 x 32 x 32 tiles
    pytest.param(64, 64, 64, 16, id="aligned"),
    pytest.param(65, 64, 72, 17, id="one-row-and-one-rank-over"),
    pytest.param(37, 53, 41, 7, id="primes"),
    pytest.param(1, 40, 70, 4, id="one-token"),
    pytest.param(33, 8, 8, 1, id="rank-one-K-below-its-block"),
    pytest.param(20, 48, 40, 64, id="rank-64"),
]
DESCRIBED = [(64, 64, 64, 16), (65, 72, 40, 17), (1, 40, 72, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
P = 0.5  # 1 / (1 − p) is exact


def small_tile(r: int, use_tma: bool = False):
    from lowrank_fused.kernels.launch import Tile

    return Tile(32, 32, 32, max(16, 1 << (r - 1).bit_length()), num_warps=4, num_stages=2, use_tma=use_tma)


def seed_on(device: torch.device) -> Tensor:
    return torch.tensor([77], device=device)


def operands(m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, w, a, b, d, bias: integers so small that every sum is exact."""
    shapes = ((m, k), (n, k), (r, k), (n, r), (r,), (n,))
    return [integer_operand(*shape, low=-1, high=1, dtype=dtype).to(device) for shape in shapes]


def by_formula(x, w, a, b, core, bias, keep=None, p=0.0, scale=1.0) -> tuple[Tensor, Tensor]:
    """y and s in the dtype of x."""
    s = (x if keep is None else x * keep / (1 - p)) @ a.t()
    return x @ w.t() + (s * core * scale) @ b.t() + bias, s


def check_exact(m, n, k, r, dtype, tile, device) -> None:
    from lowrank_fused.kernels.single_forward import single_forward

    x, w, a, b, core, bias = operands(m, n, k, r, dtype, device)
    wide = [t.double() for t in (x, w, a, b, core, bias)]
    y, s, mask = single_forward(x, w, a, b, core=core, bias=bias, scale=2.0, tile=tile)
    exact = by_formula(*wide, scale=2.0)
    assert torch.equal(y, exact[0].to(dtype)) and torch.equal(s, exact[1].to(dtype)) and mask.numel() == 0
    keep = draw_keep(seed_on(device), m, k, P)[:, :k]
    for given in ({"seed": seed_on(device)}, {"bits": pack(draw_keep(seed_on(device), m, k, P))}):
        y, s, mask = single_forward(x, w, a, b, core=core, bias=bias, dropout_p=P, tile=tile, **given)
        exact = by_formula(*wide, keep, P)
        assert torch.equal(y, exact[0].to(dtype)) and torch.equal(s, exact[1].to(dtype))
        assert torch.equal(unpack(mask, k), keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_integers_come_out_exactly(m, n, k, r, dtype, device):
    check_exact(m, n, k, r, dtype, small_tile(r), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k", "r"), DESCRIBED)
def test_descriptors(m, n, k, r, dtype, device):
    from lowrank_fused.kernels.launch import arch_of

    if device.type == "cuda" and arch_of(torch.empty(0, device=device)) < 90:
        pytest.skip("needs a GPU with a tensor memory accelerator")
    check_exact(m, n, k, r, dtype, small_tile(r, use_tma=True), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_as_accurate_as_torch(p, dtype, device):
    from lowrank_fused.kernels.single_forward import single_forward

    m, n, k, r = 45, 77, 90, 12
    torch.manual_seed(0)
    shapes = ((m, k), (n, k), (r, k), (n, r), (r,), (n,))
    plain = [torch.randn(shape).to(device, dtype) for shape in shapes]
    keep = draw_keep(seed_on(device), m, k, p)[:, :k] if p else None
    x, w, a, b, core, bias = plain
    y, s, _ = single_forward(
        x, w, a, b, core=core, bias=bias, scale=0.7, dropout_p=p, seed=seed_on(device), tile=small_tile(r)
    )
    torchs = by_formula(*plain, keep, p, 0.7)
    exact = by_formula(*(t.double() for t in plain), keep, p, 0.7)
    size = by_formula(*(t.double().abs() for t in plain), keep, p, 0.7)
    assert_as_accurate_as_torch(y, torchs[0], exact[0], "y", size[0])
    assert_as_accurate_as_torch(s, torchs[1], exact[1], "s", size[1])


@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "descriptors"])
def test_weight_of_a_conv1d_and_adapter_in_fp32(use_tma, device):
    from lowrank_fused.kernels.launch import arch_of
    from lowrank_fused.kernels.single_forward import single_forward

    if use_tma and device.type == "cuda" and arch_of(torch.empty(0, device=device)) < 90:
        pytest.skip("needs a GPU with a tensor memory accelerator")
    x, w, a, b, core, bias = operands(40, 64, 48, 8, torch.float16, device)
    exact = by_formula(*(t.double() for t in (x, w, a, b, core, bias)))
    y, s, _ = single_forward(
        x, w.t().contiguous().t(), a.float(), b.float(), core=core.float(), bias=bias.float(),
        tile=small_tile(8, use_tma),
    )  # fmt: skip
    assert torch.equal(y, exact[0].half()) and torch.equal(s, exact[1].half())


def test_any_strides_and_no_s(device):
    from lowrank_fused.kernels.single_forward import single_forward

    x = integer_operand(80, 140).to(device)[3:36, 5:135:2]
    w = integer_operand(100, 200).to(device)[10:63, 7:137:2]
    a, b = integer_operand(65, 5).to(device).t(), integer_operand(5, 53).to(device).t()
    y, s, _ = single_forward(x, w, a, b, keep_s=False, tile=small_tile(5))
    assert torch.equal(y, x @ w.t() + x @ a.t() @ b.t()) and s.numel() == 0


def test_result_does_not_depend_on_the_tile(device):
    from lowrank_fused.kernels.single_forward import single_forward

    x, w, a, b, core, bias = operands(70, 130, 96, 10, torch.float16, device)
    expected = by_formula(*(t.double() for t in (x, w, a, b, core, bias)))[0].half()
    for tile in (small_tile(10), replace(small_tile(10), block_m=64, block_n=16, block_k=16, block_r=32), None):
        assert torch.equal(single_forward(x, w, a, b, core=core, bias=bias, tile=tile)[0], expected)


def test_no_tokens(device):
    from lowrank_fused.kernels.single_forward import single_forward

    x, w, a, b = (torch.ones(shape, device=device) for shape in ((0, 24), (20, 24), (4, 24), (20, 4)))
    y, s, mask = single_forward(x, w, a, b, dropout_p=P, seed=seed_on(device))
    assert y.shape == (0, 20) and s.shape == (0, 4) and mask.shape == (0, 3)


def test_declared_work():
    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.single_forward import single_forward

    x, w, a, b = (torch.ones(shape, device="meta") for shape in ((32, 48), (64, 48), (8, 48), (64, 8)))
    with record() as launches:
        single_forward(x, w, a, b)
        single_forward(x, w, a, b, dropout_p=P, seed=torch.ones(1, dtype=torch.int64, device="meta"), keep_s=False)
    plain, dropped = launches
    assert plain.bytes_read == dropped.bytes_read == 4 * (32 * 48 + 64 * 48 + 8 * 48 + 64 * 8)
    assert plain.bytes_written == 4 * (32 * 64 + 32 * 8)
    assert dropped.bytes_written == 4 * 32 * 64 + 32 * 6
    assert plain.flops == dropped.flops == 2 * 32 * (48 * 64 + 48 * 8 + 8 * 64)
