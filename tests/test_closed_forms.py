"""Every byte that our launchers declare, against closed forms: tensors by their sizes, parts of sums by the grid."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from lowrank_fused.kernels.launch import Launch, record, targeting
from lowrank_fused.roofline.closed_forms import Extra, extra_bytes, partial_sums
from lowrank_fused.roofline.groups import Members, groups
from lowrank_fused.roofline.passes import Setting, Tensors
from lowrank_fused.roofline.recorded import recorded_group, recorded_step
from lowrank_fused.tools.model_shapes import LinearShape, build, linear_shapes
from lowrank_fused.tools.shipped import CallCase

LLAMA = {linear.name: linear for linear in linear_shapes(build("llama-3-8b"))}
GROUPS = [members for members in groups(list(LLAMA.values())) if len(members) > 1]
ALONE = [(LLAMA[name],) for name in ("q_proj", "k_proj", "gate_proj", "down_proj")]
CALLS = [*itertools.product(("split", "thin", "single"), ALONE), *itertools.product(("split", "thin"), GROUPS)]


def frozen(members: Members, setting: Setting) -> int:
    """Bytes of x Wᵀ of every member, and of dy W."""
    tensors = [Tensors.of(member, setting).sizes for member in members]
    return sum(of[name] for of in tensors for name in ("x", "W", "y"))


@pytest.mark.parametrize("rank", [4, 8, 16, 64, 128])
@pytest.mark.parametrize(
    ("route", "members"), CALLS, ids=[f"{route}-{'-'.join(m.name for m in members)}" for route, members in CALLS]
)
def test_declared_traffic_is_the_closed_form(route: str, members: Members, rank: int) -> None:
    """Beside the frozen products nothing moves but what the form has and parts of sums, at most 1.05 of it."""
    for tokens, p in itertools.product((1024, 8192), (0.0, 0.1)):
        setting = Setting(tokens, rank, p)
        products = frozen(members, setting)
        for passes, closed in zip(
            recorded_group(route, members, setting), extra_bytes(route, members, setting), strict=True
        ):
            declared = sum(q.bytes - q.scratch for q in passes) - products
            assert closed <= declared <= 1.05 * closed


def test_closed_forms_of_a_square_layer() -> None:
    """In units of x, with low-rank tensors that are small beside it: what the table of designs says of each route."""
    square = LinearShape("", 8192, 8192, bias=False, count=1)

    def passes(route: str, count: int = 1, p: float = 0.0, rank: int = 16) -> tuple[float, float]:
        found = extra_bytes(route, (square,) * count, Setting(2**20, rank, p))
        return tuple(round(moved / (2 * 2**20 * 8192), 1) for moved in found)

    assert passes("split") == (1, 2) and passes("thin") == (3, 4) and passes("single") == (0, 2)
    assert passes("split", rank=128) == (1.0, 3.1), "ds and dB from a pass over dy each"
    assert passes("split", 3) == (1, 6) and passes("thin", 3) == (7, 8), "x once, dy thrice, dx added to"
    plain, dropped = (extra_bytes("split", (square,), Setting(64, 16, p)) for p in (0.0, 0.1))
    assert Extra(*(b - a for a, b in zip(plain, dropped, strict=True))) == (64 * 1024, 2 * 64 * 1024)


def parts_of(launch: Launch) -> int:
    """Bytes of what a launch both reads and writes, dx that it adds to apart."""
    return sum(
        2 * tensor.nbytes
        for tensor in launch.writes
        if tensor is not None and tensor.dtype == torch.float32 and any(tensor is other for other in launch.reads)
    )


@pytest.mark.parametrize(
    ("tokens", "rank", "most"), [(8192, 16, 0.04), (1024, 16, 0.12), (8192, 64, 0.22), (1024, 128, 0.83)]
)
def test_partial_sums_are_the_share_that_is_said(tokens: int, rank: int, most: float) -> None:
    """Beside everything else that a step moves, of the layer where that is most."""
    shares = []
    for linear in LLAMA.values():
        passes = [one for way in recorded_step("split", linear, Setting(tokens, rank)) for one in way]
        scratch = sum(one.scratch for one in passes)
        shares.append(scratch / (sum(one.bytes for one in passes) - scratch))
    assert max(shares) == pytest.approx(most, abs=0.006)


@pytest.mark.parametrize("arch", [80, 90])
def test_partial_sums_are_those_of_the_grid(arch: int) -> None:
    from lowrank_fused.kernels.weight_factor import weight_factor

    make = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    with targeting(arch), record() as log:
        for m, r, p in itertools.product((8, 1024, 8192), (16, 128), (0.0, 0.1)):
            CallCase(m, r=r, p=p, core="diag").launch()
        weight_factor(make(32, 131072), make(131072, 4096))
    declared = {name: {parts_of(one) for one in log if one.name == name} for name in {one.name for one in log}}
    assert {name for name, sums in declared.items() if any(sums)} == {
        "shrink", "dy_factors", "x_factors", "weight_factor",
    }  # fmt: skip
    assert [partial_sums(one) for one in log] == [parts_of(one) for one in log]
    assert 0 in declared["shrink"], "with many tokens no program shares the columns of a block"
