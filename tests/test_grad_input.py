from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowrank_fused.dropout import draw_keep, pack
from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

SHAPES = [
    # M, N, K, R for 32 x 32 x 32 tiles
    pytest.param(64, 64, 64, 16, id="aligned"),
    pytest.param(65, 64, 64, 16, id="one-row-over"),
    pytest.param(32, 65, 64, 17, id="one-inner-and-one-rank-over"),
    pytest.param(32, 64, 65, 16, id="one-column-over"),
    pytest.param(37, 53, 41, 7, id="primes"),
    pytest.param(1, 70, 40, 4, id="one-token"),
    pytest.param(33, 8, 63, 8, id="inner-below-its-block"),
    pytest.param(5, 3, 2, 1, id="rank-one"),
    pytest.param(20, 40, 48, 64, id="several-rank-blocks"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["linear", "conv1d"]
READERS = [*((False, dtype) for dtype in DTYPES), (True, torch.float16), (True, torch.bfloat16)]
P = 0.5  # 1 / (1 − p) is exact


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


def keep_mask(m: int, k: int, p: float, device: torch.device) -> tuple[Tensor, Tensor]:
    keep = draw_keep(torch.tensor([5], device=device), m, k, p)
    return keep[:, :k], pack(keep)


def reference(dy: Tensor, w: Tensor, ds: Tensor, a: Tensor, keep: Tensor | None = None, p: float = 0.0) -> Tensor:
    delta = ds @ a
    return dy @ w + (delta if keep is None else delta * keep / (1 - p))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_integers_come_out_exactly(m, n, k, r, dtype, layout, device):
    from lowrank_fused.kernels.grad_input import grad_input

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=dtype).to(device)

    dy, w, ds, a = make(m, n), weight(n, k, layout, make), make(m, r), make(r, k)
    wide = [t.double() for t in (dy, w, ds, a)]
    keep, mask = keep_mask(m, k, P, device)
    assert torch.equal(grad_input(dy, w, tile=small_tile()), (wide[0] @ wide[1]).to(dtype))
    assert torch.equal(grad_input(dy, w, ds, a, tile=small_tile()), reference(*wide).to(dtype))
    dropped = grad_input(dy, w, ds, a, mask=mask, dropout_p=P, tile=small_tile())
    assert torch.equal(dropped, reference(*wide, keep, P).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_as_accurate_as_torch(p, dtype, layout, device):
    from lowrank_fused.kernels.grad_input import grad_input

    m, n, k, r = 45, 90, 77, 20
    torch.manual_seed(0)

    def make(*shape):
        return torch.randn(shape).to(device, dtype)

    dy, w, ds, a = make(m, n), weight(n, k, layout, make), make(m, r), make(r, k)
    wide = [t.double() for t in (dy, w, ds, a)]
    keep, mask = keep_mask(m, k, p, device) if p else (None, None)
    dx = grad_input(dy, w, ds, a, mask=mask, dropout_p=p, tile=small_tile())
    plain, exact = reference(dy, w, ds, a, keep, p), reference(*wide, keep, p)
    assert_as_accurate_as_torch(dx, plain, exact, "dx", reference(*(t.abs() for t in wide), keep, p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_in_fp32_is_cast_in_the_kernel(dtype, device):
    from lowrank_fused.kernels.grad_input import grad_input

    torch.manual_seed(0)
    dy, w, ds = (torch.randn(shape).to(device, dtype) for shape in ((40, 64), (64, 50), (40, 12)))
    a = torch.randn(12, 50, device=device)
    keep, mask = keep_mask(40, 50, P, device)
    dx = grad_input(dy, w, ds, a, mask=mask, dropout_p=P, tile=small_tile())
    assert torch.equal(dx, grad_input(dy, w, ds, a.to(dtype), mask=mask, dropout_p=P, tile=small_tile()))
    wide = [t.double() for t in (dy, w, ds, a.to(dtype))]
    plain, exact = reference(dy, w, ds, a.to(dtype), keep, P), reference(*wide, keep, P)
    assert_as_accurate_as_torch(dx, plain, exact, "dx", reference(*(t.abs() for t in wide), keep, P))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [(64, 64, 64, 16), (65, 40, 72, 17), (1, 72, 40, 4), (31, 8, 136, 8), (20, 40, 48, 64)],
)
def test_descriptors(m, n, k, r, dtype, layout, device):
    from lowrank_fused.kernels.grad_input import grad_input

    skip_without_descriptors(True, device)

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=dtype).to(device)

    dy, w, ds, a = make(m, n), weight(n, k, layout, make), make(m, r), make(r, k)
    wide = [t.double() for t in (dy, w, ds, a)]
    keep, mask = keep_mask(m, k, P, device)
    tile = small_tile(use_tma=True)
    assert torch.equal(grad_input(dy, w, tile=tile), (wide[0] @ wide[1]).to(dtype))
    assert torch.equal(grad_input(dy, w, ds, a, tile=tile), reference(*wide).to(dtype))
    dropped = grad_input(dy, w, ds, a, mask=mask, dropout_p=P, tile=tile)
    assert torch.equal(dropped, reference(*wide, keep, P).to(dtype))


@pytest.mark.parametrize(("use_tma", "dtype"), READERS)
@pytest.mark.parametrize(("m", "k"), [(64, 64), (37, 72)])
def test_projections_of_one_x_chain_through_one_tensor(m, k, dtype, use_tma, device):
    from lowrank_fused.kernels.grad_input import grad_input

    skip_without_descriptors(use_tma, device)

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=dtype).to(device)

    # Sums that stay integers below 256 are exact in every dtype, in any order of additions.
    sizes, r = (24, 8, 40), 17
    dys, ws = [make(m, n) for n in sizes], [make(n, k) for n in sizes]
    ds, a = make(m, r), make(r, k)
    keep, mask = keep_mask(m, k, P, device)
    tile = small_tile(use_tma)
    frozen = sum(dy.double() @ w.double() for dy, w in zip(dys, ws, strict=True))
    for bits, kept, p in ((None, None, 0.0), (mask, keep, P)):
        dx = None
        for dy, w in zip(dys[:2], ws[:2], strict=True):
            dx = grad_input(dy, w, add=dx, tile=tile)
        last = grad_input(dys[2], ws[2], ds, a, mask=bits, dropout_p=p, add=dx, tile=tile)
        delta = reference(dys[0].double() * 0, ws[0].double(), ds.double(), a.double(), kept, p)
        assert last is dx and torch.equal(dx, (frozen + delta).to(dtype))


@pytest.mark.parametrize(("use_tma", "dtype"), READERS)
def test_adding_is_as_accurate_as_torch(dtype, use_tma, device):
    from lowrank_fused.kernels.grad_input import grad_input

    skip_without_descriptors(use_tma, device)
    torch.manual_seed(0)
    dy, w, ds, a, dx = (
        torch.randn(shape).to(device, dtype) for shape in ((45, 88), (88, 72), (45, 20), (20, 72), (45, 72))
    )
    wide = [t.double() for t in (dy, w, ds, a)]
    plain, exact = dx + reference(dy, w, ds, a), dx.double() + reference(*wide)
    size = dx.double().abs() + reference(*(t.abs() for t in wide))
    assert_as_accurate_as_torch(grad_input(dy, w, ds, a, add=dx, tile=small_tile(use_tma)), plain, exact, "dx", size)


def test_what_can_not_be_added_to():
    from lowrank_fused.kernels.grad_input import grad_input

    dy, w = torch.ones(8, 4), torch.ones(4, 6)
    for add in (torch.ones(8, 5), torch.ones(8, 6).half(), torch.ones(6, 8).t()):
        with pytest.raises(AssertionError, match="contiguous"):
            grad_input(dy, w, add=add)


def test_any_strides(device):
    from lowrank_fused.kernels.grad_input import grad_input

    dy = integer_operand(80, 140).to(device)[3:36, 5:135:2]
    w = integer_operand(200, 100).to(device)[7:137:2, 10:63]
    ds, a = integer_operand(33, 40).to(device)[:, 5:14:2], integer_operand(53, 5).to(device).t()
    assert torch.equal(grad_input(dy, w, ds, a, tile=small_tile()), reference(dy, w, ds, a))
    everywhere = torch.ones((), device=device).expand(33, 65)  # the gradient of a sum
    assert torch.equal(grad_input(everywhere, w, ds, a, tile=small_tile()), reference(everywhere, w, ds, a))


def test_result_does_not_depend_on_the_tile(device):
    from lowrank_fused.kernels.grad_input import grad_input

    def make(*shape):
        return integer_operand(*shape, low=-1, high=1, dtype=torch.float16).to(device)

    dy, w, ds, a = make(70, 96), make(96, 130), make(70, 24), make(24, 130)
    keep, mask = keep_mask(70, 130, P, device)
    expected = reference(*(t.double() for t in (dy, w, ds, a)), keep, P).half()
    for tile in (small_tile(), replace(small_tile(), block_m=64, block_n=16, block_k=16, block_r=32), None):
        assert torch.equal(grad_input(dy, w, ds, a, mask=mask, dropout_p=P, tile=tile), expected)


def test_no_tokens(device):
    from lowrank_fused.kernels.grad_input import grad_input

    dy, ds = torch.ones(0, 20, device=device), torch.ones(0, 4, device=device)
    dx = grad_input(dy, torch.ones(20, 24, device=device), ds, torch.ones(4, 24, device=device))
    assert dx.shape == (0, 24)


def test_declared_work(device):
    from lowrank_fused.kernels.grad_input import grad_input
    from lowrank_fused.kernels.launch import record

    dy, w, ds, a = (torch.ones(shape, device="meta") for shape in ((32, 64), (64, 48), (32, 8), (8, 48)))
    mask = torch.ones(32, 6, dtype=torch.uint8, device="meta")
    with record() as launches:
        grad_input(dy, w, ds, a, mask=mask, dropout_p=P)
        dx = grad_input(dy, w)
        grad_input(dy, w, add=dx)
    dropped, plain, adding = launches
    assert dropped.bytes_read == 4 * (32 * 64 + 64 * 48 + 32 * 8 + 8 * 48) + 32 * 6
    assert dropped.bytes_written == plain.bytes_written == 4 * 32 * 48
    assert dropped.flops == 2 * 32 * 48 * (64 + 8)
    assert plain.flops == 2 * 32 * 48 * 64
    assert adding.bytes_read == plain.bytes_read + 4 * 32 * 48
    assert (adding.bytes_written, adding.flops) == (plain.bytes_written, plain.flops)
