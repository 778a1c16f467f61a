"""Our routes, pass by pass, as their launchers declare them: forward and backward are run on the meta device.

Nothing is described a second time: bytes and FLOPs are those of each `Launch`, and products that a route leaves to the
library are seen by a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_fused.kernels.launch import Launch, record, targeting

from ..routes.fused import SPLIT, THIN
from ..routes.problem import Options, Route, Saved
from ..tools.model_shapes import LinearShape
from .passes import Pass, Setting, Step

__all__ = ["Meta", "recorded_step", "recording"]

ROUTES: dict[str, Route] = {"split": SPLIT, "thin": THIN}

# Kernels that compute x Wᵀ and dy W; all others are thin.
_PRODUCTS = ("lowrank_forward", "grad_input")


class _LibraryProducts(TorchDispatchMode):
    """Appends every product of the library to a log."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            left, right = args[-2:]
            adds = func.overloadpacket is not aten.mm
            read = sum(t.nbytes for t in args)
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            name = "library product" + ", added" * adds
            shapes = f"{_shape(left)} {_shape(right)} -> {_shape(out)}"
            self.log.append(Pass(name, shapes, read, out.nbytes, flops, adds=adds))
        return out


def _shape(t: Tensor) -> str:
    return "x".join(map(str, t.shape))


def recording(arch: int, call: Callable[[], object]) -> list[Pass]:
    """What `call` on meta tensors would launch on a GPU of this compute capability, in order."""
    with ExitStack() as stack:
        stack.enter_context(targeting(arch))
        log: list[Any] = stack.enter_context(record())
        stack.enter_context(_LibraryProducts(log))
        call()
    return [_of_launch(entry) if isinstance(entry, Launch) else entry for entry in log]


def _of_launch(launch: Launch) -> Pass:
    """A launch as a pass; its tensors are those arguments that are neither partial sums nor counters."""
    tensors = {
        name.removesuffix("_ptr").removesuffix("_desc"): base
        for name, value in launch.args.items()
        if isinstance(base := getattr(value, "base", value), Tensor)
    }
    parts = {name for name in tensors if name.endswith("_parts")}
    shown = [name for name in tensors if name not in parts and name != "counters"]
    is_product = launch.name.startswith(_PRODUCTS)
    return Pass(
        launch.name.removesuffix("_tma"),
        ", ".join(shown),
        launch.bytes_read,
        launch.bytes_written,
        launch.flops,
        "product" if is_product else "thin",
        scratch=2 * sum(tensors[name].nbytes for name in parts),
    )


@dataclass(frozen=True)
class Meta:
    """Operands of layers that share x, on the meta device."""

    members: Sequence[LinearShape]
    setting: Setting

    def make(self, *shape: int) -> Tensor:
        """A bf16 tensor."""
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    @property
    def x(self) -> Tensor:
        """[M, K], contiguous."""
        return self.make(self.setting.tokens, self.members[0].in_features)

    @property
    def a(self) -> Tensor:
        """The A of all members, one above the other."""
        return self.make(self.setting.rank * len(self.members), self.members[0].in_features)

    def weight(self, member: LinearShape) -> Tensor:
        """W [N, K]."""
        return self.make(member.out_features, member.in_features)

    def b(self, member: LinearShape) -> Tensor:
        """B [N, R]."""
        return self.make(member.out_features, self.setting.rank)

    def bias(self, member: LinearShape) -> Tensor | None:
        """[N], if this layer has one."""
        return self.make(member.out_features) if member.bias else None

    def dy(self, member: LinearShape) -> Tensor:
        """[M, N]."""
        return self.make(self.setting.tokens, member.out_features)

    @property
    def seed(self) -> Tensor | None:
        """What the dropout mask is drawn from."""
        return torch.empty(1, dtype=torch.int64, device="meta") if self.setting.dropout else None

    def options(self, *wanted: str) -> Options:
        """Options of a call that wants these of the gradients x, a, b."""
        wants = {f"wants_{name}": name in wanted for name in ("x", "a", "b", "core", "bias")}
        return Options(scale=2.0, core_kind="none", dropout_p=self.setting.dropout, **wants)


def recorded_step(route: str, linear: LinearShape, setting: Setting) -> Step:
    """One layer by the route `split` or `thin`, all gradients wanted but those of weight and bias."""
    implementation, meta, kept = ROUTES[route], Meta([linear], setting), []
    x, weight, a, b, o = meta.x, meta.weight(linear), meta.a, meta.b(linear), meta.options("x", "a", "b")

    def forward() -> None:
        kept.append(implementation.forward(x, weight, a, b, None, meta.bias(linear), meta.seed, o)[1])

    def backward(saved: Saved) -> None:
        implementation.backward(meta.dy(linear), x, weight, a, b, None, saved, o)

    passes = recording(setting.arch, forward)
    return Step(passes, recording(setting.arch, partial(backward, kept[0])))
