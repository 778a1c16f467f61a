"""The seven linears of a decoder layer with their real sharing, as one thing to measure.

    q, k, v = f(x);   o = f(attention);   gate, up = f(x2);   down = f(h)

Attention, norms and the activation between them are left out: they are the same for everybody. Each of the four inputs
is a leaf, and autograd adds the input gradients of the linears that share one, as it does in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ..branches import Branch, lowrank_group
from ..linear import lowrank_linear, lowrank_linear_ref
from ..routes import choose_for_group
from ..testing import assert_as_accurate_as_torch
from .accuracy import absolute, double, mask_probe, seeded
from .case import Case, Operands
from .providers import FP32, Provider, default_names, eager, providers_for

__all__ = ["GROUPED", "BlockCase", "BlockOperands", "BlockProvider", "block_names", "block_providers", "check_block"]

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


@dataclass
class BlockOperands:
    """Operands of each linear; those that share an input hold the same tensor x."""

    layers: dict[str, Operands]

    @classmethod
    def random(cls, case: BlockCase, adapter_dtype: torch.dtype | None = None) -> BlockOperands:
        """As `Operands.random` makes them, every linear from a seed of its own."""
        layers: dict[str, Operands] = {}
        inputs: dict[str, Tensor] = {}
        for seed, (name, layer) in enumerate(case.layers().items()):
            o = Operands.random(layer, adapter_dtype, seed)
            layers[name] = replace(o, x=inputs.setdefault(LINEARS[name][0], o.x))
        return cls(layers)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.layers["q"].device

    @property
    def inputs(self) -> dict[str, Tensor]:
        """x, attention, x2 and h: [tokens, features] each."""
        return {LINEARS[name][0]: o.x for name, o in self.layers.items()}

    @property
    def dy(self) -> list[Tensor]:
        """Upstream gradients in the order of the linears."""
        return [o.dy for o in self.layers.values()]

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken for, by name: inputs, then A and B of every linear."""
        factors = {f"{kind} of {name}": getattr(o, kind) for name, o in self.layers.items() for kind in ("a", "b")}
        return {**self.inputs, **factors}

    def parameters(self) -> list[Tensor]:
        """What exists whether or not a backward follows."""
        return [parameter for o in self.layers.values() for parameter in o.parameters()]

    def converted(self, convert: Callable[[Operands], Operands]) -> BlockOperands:
        """The operands of every linear converted, inputs shared as here."""
        layers = {name: convert(o) for name, o in self.layers.items()}
        inputs = {LINEARS[name][0]: o.x for name, o in layers.items()}
        return BlockOperands({name: replace(o, x=inputs[LINEARS[name][0]]) for name, o in layers.items()})


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

    def operands(self, case: BlockCase) -> BlockOperands:
        """Random operands of this case in the adapters' dtype."""
        return BlockOperands.random(case, self.adapter_dtype)

    def __call__(self, o: BlockOperands, dropout_p: float) -> Sequence[Tensor]:
        if self.whole is None:
            return [self.layer(operands, dropout_p) for operands in o.layers.values()]
        parts = [(p.x, p.weight, p.a, p.b, p.bias) for p in o.layers.values()]
        mixed = self.adapter_dtype is not None
        with torch.autocast(o.device.type, dtype=parts[0][0].dtype if mixed else torch.bfloat16, enabled=mixed):
            return self.whole(parts, o.layers["q"].scale, dropout_p)

    def chosen_routes(self, o: BlockOperands, dropout_p: float) -> str | None:
        """What "auto" stands for in each linear or group, those that agree named together."""
        by_route: dict[str, list[str]] = {}
        for names in _by_input(o) if self.name.startswith(GROUPED) else [[name] for name in o.layers]:
            if routes := self._routes(o, names, dropout_p):
                by_route.setdefault(routes, []).append(" + ".join(names))
        return "; ".join(f"{', '.join(names)}: {routes}" for routes, names in by_route.items()) or None

    def _routes(self, o: BlockOperands, names: list[str], dropout_p: float) -> str | None:
        first = o.layers[names[0]]
        if len(names) == 1:
            return self.layer.chosen_routes(first, dropout_p)
        shapes = [(o.layers[name].weight.shape[0], o.layers[name].a.shape[0]) for name in names]
        m, k = first.x.shape
        return " / ".join(choose_for_group("auto", m, k, shapes, first.x.dtype, dropout_p > 0, o.device))

    def leaves(self, o: BlockOperands) -> tuple[Tensor, ...]:
        """The tensors whose gradients this provider makes."""
        return tuple(o.leaves().values() if self.has_adapter else o.inputs.values())


def _by_input(o: BlockOperands) -> list[list[str]]:
    """Names of the linears, those of one input together."""
    found: dict[str, list[str]] = {}
    for name in o.layers:
        found.setdefault(LINEARS[name][0], []).append(name)
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


def check_block(provider: BlockProvider, case: BlockCase) -> None:
    """Raise AssertionError unless all outputs and gradients are as accurate as PyTorch's, by the rule of layers.

    The reference sees, linear by linear, the masks that the provider drew. Frozen linears pass.
    """
    if not provider.has_adapter:
        return
    o = provider.operands(case)
    keep = {name: _mask(provider, o, name, case.dropout) if case.dropout else None for name in o.layers}

    def reference(o: BlockOperands, _: float) -> Sequence[Tensor]:
        return [
            lowrank_linear_ref(
                p.x, p.weight, p.a, p.b, scale=p.scale, bias=p.bias, dropout_p=case.dropout, keep=keep[name]
            )
            for name, p in o.layers.items()
        ]

    ours = _values(provider, o, case.dropout)
    plain = _values(reference, o, case.dropout)
    exact = _values(reference, o.converted(double), case.dropout)
    magnitude = _values(reference, o.converted(absolute), case.dropout)
    for name, got in ours.items():
        assert_as_accurate_as_torch(got, plain[name], exact[name], name, magnitude[name])


def _mask(provider: BlockProvider, o: BlockOperands, wanted: str, dropout_p: float) -> Tensor:
    """The mask of one linear, by the gradient that only its own output sends back (see `accuracy.recovered_mask`)."""
    inputs = {name: torch.ones_like(x).requires_grad_() for name, x in o.inputs.items()}
    layers = {}
    for name, p in o.layers.items():
        dy = torch.full_like(p.dy, float(name == wanted))
        layers[name] = replace(mask_probe(p), x=inputs[LINEARS[name][0]], dy=dy)
    probe = BlockOperands(layers)
    ys = seeded(provider, probe, dropout_p)
    (dx,) = torch.autograd.grad(ys, inputs[LINEARS[wanted][0]], probe.dy)
    return dx != 0


def _values(
    forward: Callable[[BlockOperands, float], Sequence[Tensor]], o: BlockOperands, dropout_p: float
) -> dict[str, Tensor]:
    """y of every linear and the gradient of every leaf, by name."""
    ys = seeded(forward, o, dropout_p)
    leaves = o.leaves()
    grads = torch.autograd.grad(ys, list(leaves.values()), [dy.to(y.dtype) for y, dy in zip(ys, o.dy, strict=True)])
    outputs = {f"y of {name}": y.detach() for name, y in zip(o.layers, ys, strict=True)}
    return outputs | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
