from __future__ import annotations

import pytest
import torch

from lowrank_fused.dropout import draw_keep, unpack
from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

SHAPES = [
    # M, K, R
    pytest.param(32, 64, 16, id="aligned"),
    pytest.param(33, 65, 17, id="one-over"),
    pytest.param(31, 63, 15, id="one-under"),
    pytest.param(37, 53, 7, id="primes"),
    pytest.param(1, 40, 4, id="one-token"),
    pytest.param(5, 3, 1, id="rank-one-K-below-the-block"),
    pytest.param(20, 48, 64, id="rank-64"),
    pytest.param(20, 40, 150, id="two-rank-blocks"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
P = 0.25


def small_tile(r: int, **changes: int):
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.kernels.shrink import block_of_rank

    blocks = {"block_m": 16, "block_k": 32, "block_r": block_of_rank(r, torch.float16)}
    return Tile(**(blocks | changes))


def seed_on(device: torch.device, value: int = 1234567) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def cores(kind: str, m: int, r: int, make, device: torch.device) -> torch.Tensor | None:
    shape = {"none": None, "diag": (r,), "dense": (r + 3, r), "gate": (m, 3)}[kind]
    return None if shape is None else make(*shape).to(device)


def apply_core(s: torch.Tensor, kind: str, core: torch.Tensor | None) -> torch.Tensor:
    """v / scale in the dtype of s, written from the definition."""
    if kind == "diag":
        return s * core.to(s.dtype)
    if kind == "dense":
        return s @ core.to(s.dtype).t()
    if kind == "gate":
        return torch.cat([core[:, e, None].to(s.dtype) * s for e in range(core.shape[1])], dim=1)
    return s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
def test_integers_come_out_exactly(m, k, r, dtype, device):
    from lowrank_fused.kernels.shrink import shrink

    x = integer_operand(m, k, high=1, low=-1, dtype=dtype).to(device)
    a = integer_operand(r, k, dtype=torch.float32).to(device)
    s, v, mask = shrink(x, a, scale=0.5, tile=small_tile(r))
    exact = (x.double() @ a.double().t()).to(dtype)
    assert torch.equal(s, exact) and torch.equal(v, exact * 0.5)
    assert s.dtype == v.dtype == dtype and mask.numel() == 0


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "diag", "dense", "gate"])
def test_as_accurate_as_torch(kind, dtype, p, device):
    from lowrank_fused.kernels.shrink import shrink

    m, k, r, scale = 37, 83, 9, 1.7
    torch.manual_seed(0)
    x, a = torch.randn(m, k).to(device, dtype), (torch.randn(r, k) / k**0.5).to(device, dtype)
    core = cores(kind, m, r, lambda *shape: torch.randn(shape).to(dtype), device)
    s, v, mask = shrink(
        x, a, scale=scale, core=core, core_kind=kind, dropout_p=p, seed=seed_on(device), tile=small_tile(r)
    )
    keep = unpack(mask, k) if p else torch.ones(m, k, dtype=torch.bool, device=device)

    def reference(x, a, core):
        s = (x * keep) @ a.t() * (1 / (1 - p))
        return s, apply_core(s, kind, core) * scale

    plain = reference(x, a, core)
    exact = reference(x.double(), a.double(), None if core is None else core.double())
    magnitude = reference(x.double().abs(), a.double().abs(), None if core is None else core.double().abs())
    for name, ours, torchs, true, size in zip("sv", (s, v), plain, exact, magnitude, strict=True):
        assert_as_accurate_as_torch(ours, torchs, true, name, size)


def test_large_ranks_need_all_of_s_for_a_dense_core(device):
    from lowrank_fused.kernels.shrink import shrink

    x, a = integer_operand(9, 20, high=1).to(device), integer_operand(150, 20, high=1).to(device)
    core = integer_operand(140, 150, high=1).to(device)
    _, v, _ = shrink(x, a, scale=2.0, core=core, core_kind="dense", keep_s=False, tile=small_tile(150))
    assert torch.equal(v, 2.0 * (x @ a.t() @ core.t()))


@pytest.mark.parametrize("kind", ["diag", "gate"])
def test_large_ranks_with_a_core(kind, device):
    from lowrank_fused.kernels.shrink import shrink

    x, a = integer_operand(9, 20, high=1).to(device), integer_operand(150, 20, high=1).to(device)
    core = cores(kind, 9, 150, integer_operand, device)
    s, v, _ = shrink(x, a, scale=2.0, core=core, core_kind=kind, tile=small_tile(150))
    assert torch.equal(s, x @ a.t()) and torch.equal(v, 2.0 * apply_core(s, kind, core))


def test_s_is_optional(device):
    from lowrank_fused.kernels.shrink import shrink

    x, a = integer_operand(9, 20).to(device), integer_operand(4, 20).to(device)
    s, v, _ = shrink(x, a, keep_s=False)
    assert s.numel() == 0 and torch.equal(v, x @ a.t())


@pytest.mark.parametrize("layout", ["sliced", "strided-rows", "transposed"])
def test_any_strides(layout, device):
    from lowrank_fused.kernels.shrink import shrink

    parent = integer_operand(80, 80).to(device)
    x = {"sliced": parent[3:36, 5:58], "strided-rows": parent[::2, :53], "transposed": parent[:53, :33].t()}[layout]
    a = integer_operand(53, 6).to(device).t()
    assert torch.equal(shrink(x, a, tile=small_tile(6))[0], x @ a.t())


def test_no_tokens(device):
    from lowrank_fused.kernels.shrink import shrink

    x, a = torch.ones(0, 20, device=device), torch.ones(4, 20, device=device)
    s, v, mask = shrink(x, a, dropout_p=P, seed=seed_on(device))
    assert s.shape == v.shape == (0, 4) and mask.shape == (0, 3)


@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
def test_bits_are_those_of_the_definition(m, k, r, device):
    from lowrank_fused.kernels.shrink import shrink

    x, a, seed = torch.ones(m, k, device=device), torch.ones(r, k, device=device), seed_on(device, -(2**63) + 5)
    s, _, mask = shrink(x, a, dropout_p=P, seed=seed, tile=small_tile(r))
    keep = draw_keep(seed, m, k, P)[:, :k]
    assert torch.equal(unpack(mask, k), keep)
    # A sum of ones counts the kept elements, the same for each rank.
    assert torch.equal((s * (1 - P)).round().long(), keep.sum(1, keepdim=True).expand(m, r))


@pytest.mark.parametrize("changes", [{"block_m": 32}, {"block_k": 64}, {"block_m": 64, "block_k": 16, "block_r": 32}])
def test_mask_depends_on_no_tile(changes, device):
    from lowrank_fused.kernels.shrink import shrink

    x, a, seed = integer_operand(40, 90).to(device), integer_operand(20, 90).to(device), seed_on(device)
    one, other = (shrink(x, a, dropout_p=P, seed=seed, tile=small_tile(16, **tile)) for tile in ({}, changes))
    assert torch.equal(unpack(one[2], 90), unpack(other[2], 90)) and torch.equal(one[0], other[0])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_kept_fraction(p, device):
    from lowrank_fused.kernels.shrink import shrink

    m, k = 128, 256
    x, a = torch.ones(m, k, device=device), torch.ones(1, k, device=device)
    _, _, mask = shrink(x, a, dropout_p=p, seed=seed_on(device))
    spread = (p * (1 - p) / (m * k)) ** 0.5
    assert abs(unpack(mask, k).double().mean().item() - (1 - p)) < 4 * spread


def test_seeds_give_different_masks(device):
    from lowrank_fused.kernels.shrink import shrink

    x, a = torch.ones(8, 64, device=device), torch.ones(1, 64, device=device)
    masks = [shrink(x, a, dropout_p=P, seed=seed_on(device, seed))[2] for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_declared_traffic(device):
    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.shrink import shrink

    x, a = (torch.ones(rows, 128, device=device, dtype=torch.float16) for rows in (64, 8))
    with record() as launches:
        shrink(x, a, dropout_p=P, seed=seed_on(device))
    (launch,) = launches
    assert launch.bytes_read == 2 * 64 * 128 + 2 * 8 * 128
    assert launch.bytes_written == 2 * (2 * 64 * 8) + 64 * 128 // 8
    assert launch.flops == 2 * 64 * 128 * 8
