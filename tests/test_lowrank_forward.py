from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

SHAPES = [
    # M, N, K, R for 32 x 32 x 32 tiles
    pytest.param(64, 64, 64, 16, id="aligned"),
    pytest.param(65, 64, 64, 16, id="one-row-over"),
    pytest.param(32, 65, 64, 16, id="one-column-over"),
    pytest.param(32, 63, 65, 17, id="one-inner-and-one-rank-over"),
    pytest.param(37, 53, 41, 7, id="primes"),
    pytest.param(1, 40, 70, 4, id="one-token"),
    pytest.param(33, 40, 8, 8, id="inner-below-its-block"),
    pytest.param(5, 3, 2, 1, id="rank-one"),
    pytest.param(20, 48, 40, 64, id="several-rank-blocks"),
    pytest.param(300, 40, 16, 4, id="more-row-blocks-than-a-group"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["linear", "conv1d"]
READERS = [*((False, dtype) for dtype in DTYPES), (True, torch.float16), (True, torch.bfloat16)]


def small_tile(use_tma: bool = False):
    from lowrank_fused.kernels.launch import Tile

    return Tile(32, 32, 32, num_warps=4, num_stages=2, use_tma=use_tma)


def skip_without_descriptors(use_tma: bool, device: torch.device) -> None:
    from lowrank_fused.kernels.launch import arch_of

    if use_tma and device.type == "cuda" and arch_of(torch.empty(0, device=device)) < 90:
        pytest.skip("needs a GPU with a tensor memory accelerator")


def weight(n: int, k: int, layout: str, make) -> Tensor:
    """W [n, k], in rows as nn.Linear keeps it or in columns as Conv1D does."""
    return make(n, k) if layout == "linear" else make(k, n).t()


def reference(x: Tensor, w: Tensor, v: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x @ w.t() + v @ b.t()
    return y if bias is None else y + bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_integers_come_out_exactly(m, n, k, r, dtype, layout, device):
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=dtype).to(device)

    x, w, v, b, bias = make(m, k), weight(n, k, layout, make), make(m, r), make(n, r), make(n)
    wide = [t.double() for t in (x, w, v, b, bias)]
    assert torch.equal(lowrank_forward(x, w, v, b, tile=small_tile()), reference(*wide[:4]).to(dtype))
    assert torch.equal(lowrank_forward(x, w, v, b, bias=bias, tile=small_tile()), reference(*wide).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "r"), [(45, 77, 90, 20), (70, 33, 129, 8)])
def test_as_accurate_as_torch(m, n, k, r, dtype, layout, device):
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    torch.manual_seed(0)

    def make(*shape):
        return torch.randn(shape).to(device, dtype)

    x, w, v, b, bias = make(m, k), weight(n, k, layout, make), make(m, r), make(n, r), make(n)
    wide = [t.double() for t in (x, w, v, b, bias)]
    y = lowrank_forward(x, w, v, b, bias=bias, tile=small_tile())
    magnitude = reference(*(t.abs() for t in wide))
    assert_as_accurate_as_torch(y, reference(x, w, v, b, bias), reference(*wide), "y", magnitude)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_in_fp32_is_cast_in_the_kernel(dtype, device):
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    torch.manual_seed(0)
    x, w, v = (torch.randn(shape).to(device, dtype) for shape in ((40, 64), (50, 64), (40, 12)))
    b, bias = torch.randn(50, 12, device=device), torch.randn(50, device=device)
    y = lowrank_forward(x, w, v, b, bias=bias, tile=small_tile())
    assert torch.equal(y, lowrank_forward(x, w, v, b.to(dtype), bias=bias, tile=small_tile()))
    wide = [t.double() for t in (x, w, v, b.to(dtype), bias)]
    plain = reference(x, w, v, b.to(dtype), bias.to(dtype))
    assert_as_accurate_as_torch(y, plain, reference(*wide), "y", reference(*(t.abs() for t in wide)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [(64, 64, 64, 16), (65, 72, 40, 17), (1, 40, 72, 4), (31, 136, 8, 8), (20, 48, 64, 64)],
)
def test_descriptors(m, n, k, r, dtype, layout, device):
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    skip_without_descriptors(True, device)

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=dtype).to(device)

    x, w, v, b, bias = make(m, k), weight(n, k, layout, make), make(m, r), make(n, r), make(n)
    exact = reference(*(t.double() for t in (x, w, v, b, bias))).to(dtype)
    assert torch.equal(lowrank_forward(x, w, v, b, bias=bias, tile=small_tile(use_tma=True)), exact)


def test_any_strides(device):
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    x = integer_operand(80, 140).to(device)[3:36, 5:135:2]
    w = integer_operand(100, 200).to(device)[10:63, 7:137:2]
    v, b = integer_operand(33, 40).to(device)[:, 5:14:2], integer_operand(5, 53).to(device).t()
    assert torch.equal(lowrank_forward(x, w, v, b, tile=small_tile()), reference(x, w, v, b))
    row = integer_operand(1, 65).to(device).expand(33, 65)
    assert torch.equal(lowrank_forward(row, w, v, b, tile=small_tile()), reference(row, w, v, b))


@pytest.mark.parametrize(("use_tma", "dtype"), READERS)
@pytest.mark.parametrize("r", [16, 8, 3])
def test_v_is_read_where_it_lies_in_a_wider_matrix(r, dtype, use_tma, device):
    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    skip_without_descriptors(use_tma, device)

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=dtype).to(device)

    m, n, k = 45, 56, 40
    x, w, b = make(m, k), make(n, k), make(n, r)
    for first in (0, r, 2 * r):
        everywhere = torch.full((m, 3 * r), float("nan"), dtype=dtype, device=device)
        v = everywhere[:, first : first + r].copy_(make(m, r))
        with record() as launches:
            y = lowrank_forward(x, w, v, b, tile=small_tile(use_tma))
        assert torch.equal(y, reference(*(t.double() for t in (x, w, v, b))).to(dtype))
        args = launches[0].args
        by_descriptor = use_tma and r % 8 == 0
        assert (args["v_desc"].base if by_descriptor else args["v_ptr"]).data_ptr() == v.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("r", [16, 5, 1])
def test_b_whose_rows_no_descriptor_can_read_is_copied_on_the_way(r, dtype, layout, device):
    """By the launch that makes v, where x, W and y go through descriptors: the product then reads both through them."""
    from lowrank_fused.kernels.launch import record, targeting
    from lowrank_fused.kernels.lowrank_forward import aligned_rows
    from lowrank_fused.routes.fused import SPLIT
    from lowrank_fused.routes.problem import Options

    skip_without_descriptors(True, device)

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=torch.float16).to(device)

    x, w, a, b = make(45, 64), weight(56, 64, layout, make), make(r, 64), make(56, r).to(dtype)
    o = Options(0.5, "none", 0.0, *(False,) * 5)
    with targeting(90), record() as launches:
        y, _ = SPLIT.forward(x, w, a, b, None, None, None, o)
        needless = [
            aligned_rows([make(56, 8)], x, [w]),
            aligned_rows([b[:52]], x, [w[:52]]),
            aligned_rows([b], x.float(), [w.float()]),
        ]
    wide = [t.double() for t in (x, w, a, b)]
    assert torch.equal(y, reference(wide[0], wide[1], 0.5 * wide[0] @ wide[2].t(), wide[3]).half())
    of_shrink, of_product = launches
    copied = r % 8 or dtype == torch.float32
    assert (of_shrink.args["b_ptr"] is b) if copied else (of_shrink.args["b_ptr"] is None)
    assert of_product.args["v_desc"] is not None and of_product.args["v_ptr"] is None
    assert needless == [None] * 3
    with targeting(80):
        assert aligned_rows([b], x, [w]) is None or device.type == "cuda"


@pytest.mark.parametrize("ranks", [(16, 16, 16), (5, 5, 5), (4, 4), (5, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_b_of_a_group_are_copied_on_the_way_too(dtype, ranks, device):
    """Unless their ranks differ: the products then read v and B through pointers."""
    from lowrank_fused.kernels.launch import record, targeting
    from lowrank_fused.routes.fused import SPLIT
    from lowrank_fused.routes.problem import GroupOptions

    skip_without_descriptors(True, device)

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=torch.float16).to(device)

    outputs = (56, 40, 16)[: len(ranks)]
    x, w, a = make(45, 64), [make(n, 64) for n in outputs], [make(r, 64) for r in ranks]
    b = [make(n, r).to(dtype) for n, r in zip(outputs, ranks, strict=True)]
    bounds = [0, *accumulate(ranks)]
    nothing = (False,) * len(ranks)
    o = GroupOptions(0.5, 0.0, tuple(slice(*pair) for pair in pairwise(bounds)), False, nothing, nothing, nothing)
    with targeting(90), record() as launches:
        ys, _ = SPLIT.group_forward(x, w, a, b, [None] * len(ranks), None, o)
    for y, w_i, a_i, b_i in zip(ys, w, a, b, strict=True):
        v = 0.5 * x.double() @ a_i.double().t()
        assert torch.equal(y, reference(x.double(), w_i.double(), v, b_i.double()).half())
    of_shrink, *of_products = launches
    assert len(of_products) == len(ranks)
    aligned = dtype == torch.float16 and not any(r % 8 for r in ranks)
    copied = len(set(ranks)) == 1 and not aligned
    assert (of_shrink.args["b2_ptr"] is not None) == copied
    for product in of_products:
        assert (product.args["v_desc"] is not None) == (aligned or copied)


def test_result_does_not_depend_on_the_tile(device):
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=torch.float16).to(device)

    x, w, v, b = make(70, 96), make(130, 96), make(70, 24), make(130, 24)
    expected = reference(*(t.double() for t in (x, w, v, b))).half()
    for tile in (small_tile(), replace(small_tile(), block_m=64, block_n=16, block_k=16, block_r=32), None):
        assert torch.equal(lowrank_forward(x, w, v, b, tile=tile), expected)


def test_no_tokens(device):
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    x, v = torch.ones(0, 24, device=device), torch.ones(0, 4, device=device)
    y = lowrank_forward(x, torch.ones(20, 24, device=device), v, torch.ones(20, 4, device=device))
    assert y.shape == (0, 20)


def test_declared_work(device):
    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    x, w, v, b = (torch.ones(shape, device="meta") for shape in ((32, 48), (64, 48), (32, 8), (64, 8)))
    with record() as launches:
        y = lowrank_forward(x, w, v, b)
    (launch,) = launches
    assert (y.device.type, y.shape) == ("meta", (32, 64))
    assert launch.bytes_read == 4 * (32 * 48 + 64 * 48 + 32 * 8 + 64 * 8)
    assert launch.bytes_written == 4 * 32 * 64
    assert launch.flops == 2 * 32 * 64 * (48 + 8)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_chosen_tile_fits_the_shape(arch):
    from lowrank_fused.kernels.lowrank_forward import choose_tile

    access = "vectors" if arch < 90 else "descriptors"
    sms = {80: 108, 90: 132, 100: 148}[arch]

    def chosen(m, n):
        tile = choose_tile(m, n, 4096, 16, torch.bfloat16, access, sms)
        return tile.block_m, tile.block_n

    assert chosen(8192, 4096) == (128, 256)
    assert chosen(8192, 14336) == (128, 256)
    rows, columns = chosen(2048, 1024)  # 64 tiles of 128 x 256 would leave half of the GPU idle
    assert (2048 // rows) * (1024 // columns) > sms // 2
    assert chosen(8, 4096)[0] == (16 if arch < 90 else 64)


def test_how_many_ranks_a_load_may_take():
    from lowrank_fused.kernels.gemm import rank_multiple

    assert [rank_multiple(r, r) for r in (0, 1, 6, 8, 16, 64)] == [16, 1, 2, 8, 16, 16]
    assert [rank_multiple(16, step) for step in (48, 40, 21)] == [16, 8, 1]


def test_reading_follows_alignment():
    from lowrank_fused.kernels.gemm import access_of

    def half(*shape):
        return torch.empty(shape, dtype=torch.float16, device="meta")

    assert access_of(half(64, 128), half(128, 64).t(), arch=90) == "descriptors"
    assert access_of(half(64, 128), half(128, 64).t(), arch=80) == "vectors"
    assert access_of(half(64, 128), half(64, 128), arch=120) == "vectors"
    assert access_of(half(64, 136), half(64, 128), arch=90) == "descriptors"  # 16-byte rows are enough for these
    assert access_of(half(64, 136), half(64, 128), arch=80) == "elements"
    assert access_of(half(64, 132), half(64, 128), arch=90) == "elements"
    assert access_of(half(64, 256)[:, ::2], arch=90) == "elements"
    assert access_of(half(64, 256)[:, 3:131], arch=90) == "elements"
    assert access_of(half(1, 128).expand(64, 128), arch=90) == "elements"
    assert access_of(half(64, 128).float(), arch=90) == "vectors"
