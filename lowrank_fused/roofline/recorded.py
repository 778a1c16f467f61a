"""Our routes, pass by pass, as their launchers declare them: forward and backward are run on the meta device.

Nothing is described a second time: bytes and FLOPs are those of each `Launch`, and what a route leaves to the library
is seen by a dispatch mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_fused.kernels.launch import Launch, cdiv, record, targeting

from ..routes import MASK_COLUMNS, SECOND_ACCUMULATOR, addmm
from ..routes.fused import SPLIT, THIN
from ..routes.problem import GroupOptions, GroupRoute, Options, Route
from ..routes.single import SINGLE
from ..tools.model_shapes import LinearShape
from .closed_forms import partial_sums
from .groups import Members
from .passes import Pass, Setting, Step

__all__ = ["recorded_group", "recorded_step", "recording"]

GROUP_ROUTES: dict[str, GroupRoute] = {"split": SPLIT, "thin": THIN, "addmm": addmm}
ROUTES: dict[str, Route] = {"split": SPLIT, "thin": THIN, "addmm": addmm, "single": SINGLE}

# Kernels that compute x Wᵀ and dy W; all others are thin.
_PRODUCTS = ("lowrank_forward", "single_forward", "grad_input")

# No launches: allocations, and the kernels' arrival counters, which a GPU keeps from one call to the next.
_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "zeros")


class _LibraryCalls(TorchDispatchMode):
    """Appends to a log every operator that launches something on a GPU."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and not func.is_view and name not in _NOTHING:
            inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            read = inputs[1:] if name == "copy_" else inputs
            sizes = list(out.shape)
            flops, adds = 0, name in ("addmm", "addmm_")
            if adds or name == "mm":
                sizes.insert(1, inputs[-1].shape[0])
                flops = 2 * math.prod(sizes)
            shape = " x ".join(map(str, sizes))
            self.log.append(Pass(f"library {name}", shape, sum(t.nbytes for t in read), out.nbytes, flops, adds=adds))
        return out


def recording(arch: int, call: Callable[[], object]) -> list[Pass]:
    """What `call` on meta tensors would launch on a GPU of this compute capability, in order."""
    with ExitStack() as stack:
        stack.enter_context(targeting(arch))
        log: list[Any] = stack.enter_context(record())
        stack.enter_context(_LibraryCalls(log))
        call()
    return [_of_launch(entry) if isinstance(entry, Launch) else entry for entry in log]


def _of_launch(launch: Launch) -> Pass:
    """A launch as a pass; its tensors are those arguments that are neither partial sums nor counters."""
    tensors = {
        name.removesuffix("_ptr").removesuffix("_desc"): base
        for name, value in launch.args.items()
        if isinstance(base := getattr(value, "base", value), Tensor)
    }
    shown = [name for name in tensors if not name.endswith("parts") and name != "counters"]
    is_product = launch.name.startswith(_PRODUCTS)
    return Pass(
        launch.name.removesuffix("_tma"),
        ", ".join(shown),
        launch.bytes_read,
        launch.bytes_written,
        launch.flops,
        "product" if is_product else "thin",
        scratch=partial_sums(launch),
        again=_done_again(launch),
    )


def _done_again(launch: Launch) -> int:
    """What every block of columns of y makes for itself where s grows beside y: s, padded, and the mask it draws."""
    if not launch.name.startswith("single_forward"):
        return 0
    args = launch.args
    blocks, columns = cdiv(args["N"], args["BLOCK_N"]), args["BLOCK_R"]
    if args["seed_ptr"] is not None:
        columns += MASK_COLUMNS
    once = args["R"]  # which the launch declares
    return 2 * args["M"] * args["K"] * (blocks * columns - once) + int(SECOND_ACCUMULATOR * launch.flops)


def _meta(*shape: int) -> Tensor:
    """A bf16 tensor that has no storage."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _seed(setting: Setting) -> Tensor | None:
    return torch.empty(1, dtype=torch.int64, device="meta") if setting.dropout else None


def recorded_step(route: str, linear: LinearShape, setting: Setting) -> Step:
    """One layer by one of `ROUTES`, all gradients wanted but those of weight and bias."""
    (m, r), (k, n) = (setting.tokens, setting.rank), (linear.in_features, linear.out_features)
    x, weight, a, b, bias = _meta(m, k), _meta(n, k), _meta(r, k), _meta(n, r), _meta(n) if linear.bias else None
    o = Options(2.0, "none", setting.dropout, True, True, True, wants_core=False, wants_bias=False)
    saved: list[Any] = []

    def forward() -> None:
        saved.append(ROUTES[route].forward(x, weight, a, b, None, bias, _seed(setting), o)[1])

    def backward() -> None:
        ROUTES[route].backward(_meta(m, n), x, weight, a, b, None, saved[0], o)

    return Step(recording(setting.arch, forward), recording(setting.arch, backward))


def recorded_group(route: str, members: Members, setting: Setting) -> Step:
    """Layers that share x by one of `GROUP_ROUTES`, as `lowrank_group` runs them; a single one by itself."""
    if len(members) == 1:
        return recorded_step(route, members[0], setting)
    m, r, k = setting.tokens, setting.rank, members[0].in_features
    x, a = _meta(m, k), [_meta(r, k) for _ in members]
    weights = [_meta(member.out_features, k) for member in members]
    b = [_meta(member.out_features, r) for member in members]
    biases = [_meta(member.out_features) if member.bias else None for member in members]
    every, none = (True,) * len(members), (False,) * len(members)
    ranks = tuple(slice(r * i, r * (i + 1)) for i in range(len(members)))
    o = GroupOptions(2.0, setting.dropout, ranks, True, every, every, wants_bias=none)
    saved: list[Any] = []

    def forward() -> None:
        operands = (x, weights, a, b, biases, _seed(setting), o)
        saved.append(GROUP_ROUTES[route].group_forward(*operands)[1])

    def backward() -> None:
        dys = [_meta(m, member.out_features) for member in members]
        GROUP_ROUTES[route].group_backward(dys, x, weights, a, b, saved[0], o)

    return Step(recording(setting.arch, forward), recording(setting.arch, backward))
