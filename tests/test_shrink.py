from __future__ import annotations

from functools import partial

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


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
def test_integers_come_out_exactly(m, k, r, dtype, split, device):
    from lowrank_fused.kernels.shrink import shrink

    x = integer_operand(m, k, high=1, low=-1, dtype=dtype).to(device)
    a = integer_operand(r, k, dtype=torch.float32).to(device)
    s, v, mask = shrink(x, a, scale=0.5, tile=small_tile(r, block_k=16), split=split)
    exact = (x.double() @ a.double().t()).to(dtype)
    assert torch.equal(s, exact) and torch.equal(v, exact * 0.5)
    assert s.dtype == v.dtype == dtype and mask.numel() == 0


@pytest.mark.parametrize(("p", "split"), [(0.0, 1), (P, 1), (P, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "diag", "dense", "gate"])
def test_as_accurate_as_torch(kind, dtype, p, split, device):
    from lowrank_fused.kernels.shrink import shrink

    m, k, r, scale = 37, 83, 9, 1.7
    torch.manual_seed(0)
    x, a = torch.randn(m, k).to(device, dtype), (torch.randn(r, k) / k**0.5).to(device, dtype)
    core = cores(kind, m, r, lambda *shape: torch.randn(shape).to(dtype), device)
    s, v, mask = shrink(
        x, a, scale=scale, core=core, core_kind=kind, dropout_p=p, seed=seed_on(device), tile=small_tile(r), split=split
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


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("kind", ["none", "gate", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_b_is_copied_into_rows_as_far_apart_as_those_of_v(dtype, kind, split, device):
    from lowrank_fused.kernels.shrink import shrink

    m, n, k, r = 33, 700, 64, 5
    make = partial(integer_operand, low=-1, high=1)
    x, a = make(m, k, dtype=torch.float16).to(device), make(r, k, dtype=torch.float16).to(device)
    core = cores(kind, m, r, partial(make, dtype=torch.float16), device)
    rv = {"none": r, "gate": 3 * r, "dense": r + 3}[kind]
    b = torch.randn(n, rv, device=device).to(dtype)
    room = torch.full((n, 24), float("nan"), dtype=torch.float16, device=device)
    _, v, _ = shrink(x, a, core=core, core_kind=kind, copy=(b, room[:, :rv]), tile=small_tile(r), split=split)
    assert torch.equal(room[:, :rv], b.half()) and room[:, rv:].isnan().all(), "no element beside the rows is written"
    assert v.stride() == (24, 1)
    assert torch.equal(v, apply_core(x.double() @ a.double().t(), kind, core).half())


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_several_b_are_copied_as_the_rows_of_one_and_v_has_columns_for_each(dtype, members, split, device):
    from lowrank_fused.kernels.shrink import shrink

    m, k, r, step = 33, 64, 5, 8
    make = partial(integer_operand, low=-1, high=1, dtype=torch.float16)
    x, a = make(m, k).to(device), [make(r, k).to(device) for _ in range(members)]
    b = [torch.randn(n, r, device=device).to(dtype) for n in (700, 40, 3)[:members]]
    room = torch.full((sum(map(len, b)), step), float("nan"), dtype=torch.float16, device=device)
    tile = small_tile(members * r)
    s, v, _ = shrink(x, a, scale=0.5, copy=(b, room[:, :r]), tile=tile, split=split)
    assert torch.equal(room[:, :r], torch.cat(b).half()) and room[:, r:].isnan().all()
    expected = x.double() @ torch.cat(a).double().t()
    assert torch.equal(s, expected.half()) and v.stride() == (members * step, 1)
    for i in range(members):
        assert torch.equal(v[:, i * step : i * step + r], 0.5 * s[:, i * r : (i + 1) * r])


def test_b_is_copied_beside_a_dense_core_of_many_ranks(device):
    from lowrank_fused.kernels.shrink import shrink

    x, a, core = (integer_operand(*shape, high=1).to(device) for shape in ((9, 20), (150, 20), (140, 150)))
    b, rows = integer_operand(30, 140).to(device), torch.empty(30, 144, device=device)[:, :140]
    shrink(x, a, core=core, core_kind="dense", keep_s=False, copy=(b, rows), tile=small_tile(150))
    assert torch.equal(rows, b)


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


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("m", "k", "r"), SHAPES)
def test_bits_are_those_of_the_definition(m, k, r, split, device):
    from lowrank_fused.kernels.shrink import shrink

    x, a, seed = torch.ones(m, k, device=device), torch.ones(r, k, device=device), seed_on(device, -(2**63) + 5)
    s, _, mask = shrink(x, a, dropout_p=P, seed=seed, tile=small_tile(r, block_k=16), split=split)
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


def test_split_twice_the_same_bits_and_counters_left_at_zero(device, monkeypatch):
    import lowrank_fused.kernels.shrink as module

    made = []
    zeroed = module.zeroed_counters
    monkeypatch.setattr(module, "zeroed_counters", lambda *a: made.append(zeroed(*a)) or made[-1])
    x, a = (torch.randn(*shape, device=device) for shape in ((40, 300), (20, 300)))
    first, second = (module.shrink(x, a, tile=small_tile(16), split=4) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert len(made) == 2 and not any(counters.any() for counters in made)


def test_parts_are_summed_in_the_order_of_the_columns(device):
    from lowrank_fused.kernels.shrink import shrink

    # 2²⁴ + 1 is no float: its neighbour absorbs a one, but not a two.
    a = torch.ones(1, 64, device=device)
    for columns, total in (((2.0**24, 1, 1), 2.0**24), ((1, 1, 2.0**24), 2.0**24 + 2)):
        x = torch.zeros(1, 64, device=device)
        x[0, :48:16] = torch.tensor(columns)
        assert shrink(x, a, tile=small_tile(1, block_k=16), split=4)[0].item() == total


@pytest.mark.parametrize(("r", "core_kind"), [(8, "dense"), (64, "none")])
def test_few_tokens_on_a_gpu_split_by_themselves(r, core_kind, device):
    from lowrank_fused.kernels.launch import record, targeting
    from lowrank_fused.kernels.shrink import shrink

    if device.type == "cuda":
        pytest.skip("this GPU has a size of its own")
    x, a = (integer_operand(rows, 1024, low=-1, high=1, dtype=torch.float16).to(device) for rows in (20, r))
    core = cores(core_kind, 20, r, lambda *shape: integer_operand(*shape, dtype=torch.float16), device)
    with targeting(90), record() as launches:
        s, v, _ = shrink(x, a, core=core, core_kind=core_kind)
    assert launches[0].grid[2] > 1
    exact = x.double() @ a.double().t()
    assert torch.equal(s, exact.half()) and torch.equal(v, apply_core(exact, core_kind, core).half())


def test_how_many_programs_share_the_columns():
    from lowrank_fused.kernels.shrink import choose_split

    tile = small_tile(16, block_m=64, block_k=128)

    def split(m: int, k: int = 65536, r: int = 16, sms: int = 132) -> int:
        return choose_split(m, k, r, tile, sms)

    # 0.9 · 132 = 118.8 blocks occupy the GPU. Fewer are made into 198 programs or a few more.
    assert [split(64 * blocks) for blocks in (119, 118, 99, 98, 66, 64, 1)] == [1, 2, 2, 3, 3, 4, 128]
    assert [split(64 * 59 + rows) for rows in (0, 1)] == [4, 4] and split(64 * 59, r=32) == 2
    # Each of them has four steps of 128 columns.
    assert [split(64, k) for k in (100, 1023, 1024, 4096)] == [1, 1, 2, 8]
    assert split(0) == 128 and split(64, sms=1) == 1


def test_blocks_move_little_and_leave_little_idle():
    from lowrank_fused.kernels.shrink import choose_tile

    def chosen(m: int, r: int = 16, arch: int = 90, sms: int = 132) -> tuple[int, int]:
        tile, split = choose_tile(m, 4096, r, torch.bfloat16, arch, sms, factor_bytes=2)
        return tile.block_m, split

    assert chosen(16384) == chosen(8192) == (64, 1)
    assert chosen(4096) == (64, 4)
    assert chosen(1024) == (64, 8)  # parts of 1 MiB beside 2 MiB of A, instead of 8 MiB for blocks of 16 rows
    assert chosen(8) == (16, 8)
    for m in (1, 300, 1000, 3000, 8000):
        for arch, sms in ((80, 108), (90, 132), (100, 148), (120, 170)):
            rows, split = chosen(m, 64, arch, sms)
            assert -(-m // rows) * split >= min(0.9 * sms, -(-m // 32) * 16)


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


def test_declared_traffic_of_parts(device):
    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.shrink import shrink

    x, a = (torch.ones(rows, 128, device=device) for rows in (64, 8))
    with record() as launches:
        shrink(x, a, tile=small_tile(8))
        shrink(x, a, tile=small_tile(8), split=4)
    whole, parts = launches
    assert (whole.grid, parts.grid) == ((1, 4, 1), (1, 4, 4))
    assert parts.bytes_read - whole.bytes_read == parts.bytes_written - whole.bytes_written == 4 * 4 * 64 * 8
    assert parts.flops == whole.flops
