"""The seven linears of a decoder layer with their real sharing, as one thing to measure.

    q, k, v = f(x);   o = f(attention);   gate, up = f(x2);   down = f(h)

Attention, norms and the activation between them are left out: they are the same for everybody. Each of the four inputs
is a leaf, and autograd adds the input gradients of the linears that share one, as it does in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ..branches import Branch, lowrank_group
from ..linear import lowrank_linear
from ..routes import choose_for_group
from .case import Case
from .linears import LinearsOperands
from .providers import FP32, Provider, default_names, eager, providers_for

__all__ = ["GROUPED", "BlockCase", "BlockProvider", "block_names", "block_providers"]

GROUPED = "grouped"  # the provider in which linears of one input share one pass over it

# Each linear's input, and the fields of the case that are its sizes.
LINEARS = {
    "q": ("x", "in_features", "in_features"),
    "k": ("x", "in_features", "kv_features"),
    "v": ("x", "in_features", "kv_features"),
    "o": ("attention", "in_features", "in_features"),
    "gate": ("x2", "in_features", "out_features"),
    "up": ("x2", "in_features", "out_features"),
    "down": ("h", "out_features", "in_features"),
}
INPUTS = {name: of for name, (of, _, _) in LINEARS.items()}
_Part = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None"]


@dataclass(frozen=True)
class BlockCase(Case):
    """A decoder layer: in_features is its hidden size, out_features that of its MLP, kv_features that of k and v."""

    kv_features: int = 0
    what: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_features < self.rank:
            raise ValueError(f"kv_features must be at least the rank, {self.rank}, got {self.kv_features}")

    def layers(self) -> dict[str, Case]:
        """The seven linears by name."""
        common = (self.tokens, self.rank, self.dropout, self.dtype, self.device, self.bias)
        return {
            name: Case(getattr(self, wide), getattr(self, out), *common, label=name)
            for name, (_, wide, out) in LINEARS.items()
        }

    def flops(self, mode: str) -> int:
        """The sum over the linears."""
        return sum(layer.flops(mode) for layer in self.layers().values())

    def bytes(self, mode: str) -> int:
        """As for layers; linears that share an input read it once in each direction and write its gradient once."""
        total = sum(layer.bytes(mode) for layer in self.layers().values())
        shared = {"forward": 1, "backward": 2, "both": 3}[mode] * self.tokens * self.in_features
        return total - 3 * shared * self.dtype.itemsize  # x serves three linears, x2 two


@dataclass(frozen=True)
class BlockProvider:
    """A provider of layers, linear by linear; or, with `whole`, a function of all seven at once."""

    layer: Provider
    whole: Callable[[list[_Part], float, float], Sequence[Tensor]] | None = None
    name_of_whole: str | None = None

    @property
    def name(self) -> str:
        """The layer provider's, unless the whole has one of its own."""
        return self.name_of_whole or self.layer.name

    @property
    def adapter_dtype(self) -> torch.dtype | None:
        """The layer provider's."""
        return self.layer.adapter_dtype

    @property
    def has_adapter(self) -> bool:
        """The layer provider's."""
        return self.layer.has_adapter

    def operands(self, case: BlockCase) -> LinearsOperands:
        """Random operands of this case in the adapters' dtype."""
        return LinearsOperands.random(case.layers(), INPUTS, self.adapter_dtype)

    def __call__(self, o: LinearsOperands, dropout_p: float) -> Sequence[Tensor]:
        if self.whole is None:
            return [self.layer(operands, dropout_p) for operands in o.layers.values()]
        parts = [(p.x, p.weight, p.a, p.b, p.bias) for p in o.layers.values()]
        mixed = self.adapter_dtype is not None
        with torch.autocast(o.device.type, dtype=parts[0][0].dtype if mixed else torch.bfloat16, enabled=mixed):
            return self.whole(parts, o.layers["q"].scale, dropout_p)

    def chosen_routes(self, o: LinearsOperands, dropout_p: float) -> str | None:
        """What "auto" stands for in each linear or group, those that agree named together."""
        by_route: dict[str, list[str]] = {}
        for names in _by_input(o) if self.name.startswith(GROUPED) else [[name] for name in o.layers]:
            if routes := self._routes(o, names, dropout_p):
                by_route.setdefault(routes, []).append(" + ".join(names))
        return "; ".join(f"{', '.join(names)}: {routes}" for routes, names in by_route.items()) or None

    def _routes(self, o: LinearsOperands, names: list[str], dropout_p: float) -> str | None:
        first = o.layers[names[0]]
        if len(names) == 1:
            return self.layer.chosen_routes(first, dropout_p)
        shapes = [(o.layers[name].weight.shape[0], o.layers[name].a.shape[0]) for name in names]
        m, k = first.x.shape
        return " / ".join(choose_for_group("auto", m, k, shapes, first.x.dtype, dropout_p > 0, o.device))

    def leaves(self, o: LinearsOperands) -> tuple[Tensor, ...]:
        """The tensors whose gradients this provider makes."""
        return tuple(o.leaves().values() if self.has_adapter else o.inputs.values())


def _by_input(o: LinearsOperands) -> list[list[str]]:
    """Names of the linears, those of one input together."""
    found: dict[str, list[str]] = {}
    for name in o.layers:
        found.setdefault(o.reads[name], []).append(name)
    return list(found.values())


def _eager_block(parts: list[_Part], scale: float, dropout_p: float) -> list[Tensor]:
    return [eager(*part, scale, dropout_p) for part in parts]


def _grouped_block(parts: list[_Part], scale: float, dropout_p: float) -> list[Tensor]:
    """Linears of one input by `lowrank_group`, the others by `lowrank_linear`."""
    ys: list[Tensor] = []
    for _, same in groupby(parts, key=lambda part: id(part[0])):
        (x, weight, a, b, bias), *others = members = list(same)
        if others:
            branches = [Branch(*member[1:]) for member in members]
            ys += lowrank_group(x, branches, scale=scale, dropout_p=dropout_p)
        else:
            ys.append(lowrank_linear(x, weight, a, b, scale=scale, bias=bias, dropout_p=dropout_p))
    return ys


def block_names(case: Case, *, with_compile: bool = False) -> list[str]:
    """Every provider that can run this case here: those of layers, and the one that groups."""
    names = default_names(case, with_compile=with_compile)
    return [*names, GROUPED] if case.dtype == torch.float32 else [*names, GROUPED, GROUPED + FP32]


def block_providers(names: Iterable[str], case: BlockCase) -> list[BlockProvider]:
    """Providers of a block by the names that `providers_for` takes, or "grouped", with the errors that it raises."""
    found = []
    for name in dict.fromkeys(names):
        base, suffix = name.removesuffix(FP32), FP32 * name.endswith(FP32)
        (layer,) = providers_for(["auto" + suffix if base == GROUPED else name], case)
        if base == GROUPED:
            found.append(BlockProvider(layer, _grouped_block, name))
        else:
            whole = torch.compile(_eager_block, dynamic=False) if base == "compile" else None
            found.append(BlockProvider(layer, whole))
    return found
