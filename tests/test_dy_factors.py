"""ds, dB and the core's gradient from one pass over dy, whatever the number of strips and chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_fused.testing import assert_as_accurate_as_torch, integer_operand

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

SHAPES = [
    # M, N, R, rows per chunk: several strips and chunks, or one of either
    pytest.param(64, 128, 16, 32, id="aligned"),
    pytest.param(33, 65, 17, 16, id="one-over"),
    pytest.param(31, 63, 15, 16, id="one-under"),
    pytest.param(37, 53, 7, 64, id="one-chunk"),
    pytest.param(50, 20, 4, 16, id="one-strip"),
    pytest.param(1, 40, 1, 16, id="one-token"),
    pytest.param(20, 48, 64, 16, id="rank-64"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def small_tile(r: int):
    from lowrank_fused.kernels.launch import Tile

    return Tile(block_m=16, block_n=32, block_r=max(16, 1 << (r - 1).bit_length()))


def run(dy: Tensor, b: Tensor, s: Tensor | None, rows: int, **options):
    from lowrank_fused.kernels.dy_factors import dy_factors

    return dy_factors(dy, b, s, tile=small_tile(b.shape[1]), chunk_rows=rows, **options)


def by_formula(dy: Tensor, b: Tensor, s: Tensor, core: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """ds, dB, dcore in the dtype of dy."""
    b, core = b.to(dy.dtype), core.to(dy.dtype)
    gv = scale * (dy @ b)
    return gv * core, dy.t() @ (scale * s * core), (s * gv).sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r", "rows"), SHAPES)
def test_integers_come_out_exactly(m, n, r, rows, dtype, device):
    dy = integer_operand(m, n, low=-1, high=1, dtype=dtype).to(device)
    b, s = (
        integer_operand(n, r, low=-1, high=1).to(device),
        integer_operand(m, r, low=-1, high=1, dtype=dtype).to(device),
    )
    core = integer_operand(r).to(device)
    # Small enough that sums are integers which every dtype holds; the last rounding, to dtype, is the reference's too.
    got = run(dy, b, s, rows, scale=2.0, core=core, want_dcore=True)
    ds, db, dcore = by_formula(dy.double(), b.double(), s.double(), core.double(), 2.0)
    assert torch.equal(got.ds, ds.to(dtype))
    assert torch.equal(got.db, db.to(b.dtype)) and got.db.dtype == b.dtype
    assert torch.equal(got.dcore, dcore.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_torch(dtype, device):
    m, n, r = 90, 70, 9
    g = torch.Generator().manual_seed(0)
    dy, s = (torch.randn(m, c, generator=g).to(device, dtype) for c in (n, r))
    b, core = torch.randn(n, r, generator=g).to(device, dtype), torch.randn(r, generator=g).to(device, dtype)
    got = run(dy, b, s, 32, scale=1.3, core=core, want_dcore=True)
    plain = by_formula(dy, b, s, core, 1.3)
    exact = by_formula(*(t.double() for t in (dy, b, s, core)), 1.3)
    size = by_formula(*(t.double().abs() for t in (dy, b, s, core)), 1.3)
    for name, ours, torchs, true, large in zip(("ds", "db", "dcore"), got, plain, exact, size, strict=True):
        assert_as_accurate_as_torch(ours.to(dtype), torchs, true, name, large)


def test_any_strides(device):
    wide = integer_operand(80, 140).to(device)
    b = integer_operand(9, 70).to(device).t()
    s = integer_operand(40, 9).to(device)
    for dy in (wide[::2, ::2], wide[:70, :40].t(), wide[7:47, 3:73]):
        ds, db, _ = run(dy, b, s, 16)
        assert torch.equal(ds, dy @ b) and torch.equal(db, dy.t() @ s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("want_db", [True, False], ids=["one-pass", "without-dB"])
@pytest.mark.parametrize("r", [16, 5])
def test_s_and_ds_within_wider_matrices(r, want_db, dtype, device):
    m, n = 37, 53
    dy, own = (integer_operand(m, c, low=-1, high=1, dtype=dtype).to(device) for c in (n, r))
    b, core = integer_operand(n, r, low=-1, high=1).to(device), integer_operand(r).to(device)
    for first in (0, r, 2 * r):
        wide, ds = (torch.full((m, 3 * r), float("nan"), dtype=dtype, device=device) for _ in range(2))
        columns = slice(first, first + r)
        s = wide[:, columns].copy_(own)
        got = run(dy, b, s, 16, core=core, want_db=want_db, want_dcore=True, out=ds[:, columns])
        exact = by_formula(dy.double(), b.double(), own.double(), core.double(), 1.0)
        assert got.ds.data_ptr() == ds[:, columns].data_ptr()
        assert torch.equal(ds[:, columns], exact[0].to(dtype)) and ds.isnan().sum() == 2 * m * r
        assert torch.equal(got.db, exact[1].float()) if want_db else got.db is None
        assert torch.equal(got.dcore, exact[2].float())


def test_tile_and_chunks_change_only_the_order_of_sums(device):
    from lowrank_fused.kernels.dy_factors import dy_factors

    dy, b, s = (integer_operand(*shape).to(device) for shape in ((70, 90), (90, 5), (70, 5)))
    default, small = dy_factors(dy, b, s), run(dy, b, s, 16)
    assert torch.equal(default.ds, small.ds) and torch.equal(default.db, small.db)


def test_twice_the_same_bits_and_counters_left_at_zero(device, monkeypatch):
    import lowrank_fused.kernels.dy_factors as module

    made = []
    zeroed = module.zeroed_counters
    monkeypatch.setattr(module, "zeroed_counters", lambda *a: made.append(zeroed(*a)) or made[-1])
    dy, b, s = (torch.randn(*shape, device=device) for shape in ((70, 90), (90, 5), (70, 5)))
    first, second = (run(dy, b, s, 16, core=b[0].contiguous(), want_dcore=True) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert len(made) == 2 and not any(counters.any() for counters in made)


@pytest.mark.parametrize("want_dcore", [False, True])
def test_without_db_any_rank(want_dcore, device):
    from lowrank_fused.kernels.dy_factors import dy_factors

    dy, b, s = (integer_operand(*shape).to(device) for shape in ((40, 30), (30, 150), (40, 150)))
    core = integer_operand(150).to(device)
    ds, db, dcore = dy_factors(dy, b, s, scale=0.5, core=core, want_db=False, want_dcore=want_dcore)
    expected, _, expected_dcore = by_formula(dy, b, s, core, 0.5)
    assert torch.equal(ds, expected) and db is None
    assert torch.equal(dcore, expected_dcore) if want_dcore else dcore is None


def test_without_db_several_programs_share_the_columns_of_few_rows(device):
    from lowrank_fused.kernels.dy_factors import dy_factors
    from lowrank_fused.kernels.launch import record, targeting

    if device.type == "cuda":
        pytest.skip("this GPU has a size of its own")
    dy, b, s = (integer_operand(*c, low=-1, high=1, dtype=torch.float16) for c in ((40, 1030), (1030, 5), (40, 5)))
    core = integer_operand(5, dtype=torch.float16)
    with targeting(90), record() as launches:
        got = dy_factors(dy, b, s, core=core, want_db=False, want_dcore=True)
    assert launches[0].grid[2] > 1
    ds, _, dcore = by_formula(dy.double(), b.double(), s.double(), core.double(), 1.0)
    assert torch.equal(got.ds, ds.half()) and torch.equal(got.dcore, dcore.float())


def test_declared_work_and_the_tile_of_rows_without_db():
    from lowrank_fused.kernels.dy_factors import dy_factors
    from lowrank_fused.kernels.launch import record, targeting
    from lowrank_fused.kernels.shrink import choose_tile

    dy, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8192, 4096), (4096, 16)))
    with targeting(90), record() as launches:
        dy_factors(dy, b, None, want_db=False)
    (launch,) = launches
    assert (launch.tile, 1) == choose_tile(8192, 4096, 16, torch.bfloat16, 90, 132, factor_bytes=2)
    assert launch.bytes_read == dy.nbytes + b.nbytes and launch.bytes_written == 2 * 8192 * 16
