"""The same bits in whatever order programs run: a GPU starts them in one order and ends them in any.

The interpreter runs programs one after the other, so that two runs of it are the same in any case. Here it is made to
take them in other orders, in each of which another program is the last to arrive.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowrank_fused.factors import gather as gather_ops
from lowrank_fused.factors.projection import projection

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

R, M, N, K = 5, 70, 70, 60
ORDERS: dict[str, Callable[[int, int], int]] = {
    "as started": lambda program, count: program,
    "last first": lambda program, count: count - 1 - program,
    "from the middle": lambda program, count: (program + count // 2) % count,
    "odd, then even": lambda program, count: 2 * program + 1 if program < count // 2 else 2 * (program - count // 2),
}


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[str], None]:
    """Sets the order in which programs run from then on."""
    if device.type == "cuda":
        pytest.skip("a GPU takes programs as it likes")
    from triton.runtime.interpreter import interpreter_builder

    set_index = interpreter_builder.set_grid_idx
    chosen = ["as started"]

    def in_order(x: int, y: int, z: int) -> None:
        _, rows, layers = grid = interpreter_builder.grid_dim
        program = ORDERS[chosen[0]]((x * rows + y) * layers + z, grid[0] * rows * layers)
        set_index(program // (rows * layers), program // layers % rows, program % layers)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", in_order)
    return lambda order: chosen.__setitem__(0, order)


def small_tile(block_m: int = 16):
    from lowrank_fused.kernels.launch import Tile

    return Tile(block_m=block_m, block_n=32, block_k=32, block_r=16)


def operands() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (M, K), "dy": (M, N), "w": (N, K), "a": (R, K), "b": (N, R), "s": (M, R), "aw": (R, N), "dh": (R, K)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def of_shrink(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from lowrank_fused.kernels.shrink import shrink

    return shrink(t["x"], t["a"], core=t["s"][0].contiguous(), core_kind="diag", tile=small_tile(), split=4)[:2]


def of_dy(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from lowrank_fused.kernels.dy_factors import dy_factors

    core = t["s"][0].contiguous()
    found = dy_factors(t["dy"], t["b"], t["s"], core=core, want_dcore=True, tile=small_tile(), chunk_rows=32)
    return found.ds, found.db, found.dcore


def of_x(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from lowrank_fused.kernels.x_factors import x_factors

    return x_factors(t["x"], t["s"], t["a"], want_dx0=True, tile=small_tile(), chunk_rows=32)


def of_weight(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from lowrank_fused.kernels.weight_factor import weight_factor, weight_factor_grad

    how = {"activation": "gelu", "tile": small_tile(), "chunk_rows": 32}
    h, slope = weight_factor(t["aw"], t["w"], **how)
    return h, weight_factor_grad(t["dh"], slope, t["w"], **how)


def of_vector(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from lowrank_fused.kernels.gather import segment_sum

    cpu, flat = torch.device("cpu"), t["x"].flatten()
    inverses = [projection(flat.numel(), 37, 5, "table").segments(cpu)]
    inverses.append(gather_ops._for_kernels(projection(flat.numel(), 37, 5, "bijection"), cpu))
    return tuple(segment_sum(flat, inverse, torch.ones(37)) for inverse in inverses)


def of_vector_atomically(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from lowrank_fused.kernels.gather import scatter_add

    flat = t["x"].flatten()
    return (scatter_add(flat, projection(flat.numel(), 37, 5, "table").table(flat.device), 37),)


def in_every_order(
    kernel: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], ordered: Callable[[str], None]
) -> list[tuple[Tensor, ...]]:
    found = []
    for order in ORDERS:
        ordered(order)
        found.append(kernel(operands()))
    return found


@pytest.mark.parametrize("kernel", [of_shrink, of_dy, of_x, of_weight, of_vector])
def test_every_order_gives_the_same_bits(kernel, ordered):
    first, *others = in_every_order(kernel, ordered)
    assert all(value.isfinite().all() for value in first)
    for order, other in zip(list(ORDERS)[1:], others, strict=True):
        assert all(torch.equal(value, again) for value, again in zip(first, other, strict=True)), order


def test_atomic_sums_which_are_made_on_request_alone_differ(ordered):
    """And so show that the orders above are not all the same."""
    first, *others = in_every_order(of_vector_atomically, ordered)
    assert not all(torch.equal(first[0], other[0]) for other in others)
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-4)
