"""The methods of the LoRA family: one file each, beside this one, found by importing them.

A method is a class under `@method` that holds no state: two texts, `name` and `formula`, and three static
functions.

    init(weight, rank, alpha, *, <options>) -> Start
        What a layer starts from. `weight` [out, in] is the frozen matrix (on the meta device when only shapes
        are asked for). The defaults of rank and alpha are the method's own (alpha None: alpha = rank), and
        every further keyword is an option of the method, under that name in `AdapterConfig` and on disk. A
        method whose layers share tensors also takes `site`.
    terms(p, weight, x) -> Terms
        The low-rank part. `p` carries Start's tensors and constants as attributes; whatever is computed here
        from small tensors is differentiated by autograd. `x` is there for gates; merging passes an x of zero
        tokens. What is drawn at random comes from torch's generator, which checkpointing replays, and only while
        `p.training`.
    reference(x, weight, bias, p) -> y
        The paper's formula in plain PyTorch. It shares no line with `terms`, because it is the witness
        against it.

Further parts, where a method has them:

    generate(p, weight) -> tuple of tensors
        Factors that are functions of trained tensors or of the weight and cost too much to compute in every
        call. The layer evaluates this once until a tensor changes; `terms` finds the result as
        `p.generated`.
    keeps = ("x", "s")
        What backward keeps of every token: x (K elements), s (Ra), gate (E), y (N). The default is x and s.
    taken_out(p, weight, x) -> Terms
        What a residual start takes out of W, where that is not what `terms` gives at the start.
    why_not_mergeable(p) -> str | None
        Why no one weight stands for the layer; None if one does.
    variants = ({"form": "residual"}, ...)
        Option values under which the method is tested too, beyond each yes-or-no option turned.
    small = {"vector_length": 4}
        Options that make it fit layers of a few dozen features, where the defaults are too large for these.
    differs_at_start = "why", or a function of the options that returns this or None
        For a method that does not start as the base layer.
    implied(p, weight) -> {name: tensor}
        What a file may hold of a layer although it follows from the config: compared when it is read, never kept.
    peft = PeftFormat(...)
        How PEFT writes the method's adapters, which are then read and written so.

Tests, benchmarks, the command line and the documentation read the registry; nothing else is written per method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_fused.peft_format import PeftFormat
from lowrank_fused.registry import Registry
from lowrank_fused.terms import Terms

__all__ = [
    "Method",
    "Site",
    "Start",
    "differs_at_start",
    "get",
    "init",
    "keeps",
    "method",
    "options",
    "peft_format",
    "registry",
    "resolve",
    "small_options",
]


@dataclass
class Site:
    """Where a layer stands among those that are made together.

    `paths`, `shapes` (out, in) and `ranks` are those of all of them in model order and `index` is this
    layer's place in these; `shared` is one dictionary for all of them, in which a method keeps the tensors
    and objects that its layers have in common. An nn.Parameter that is put into several layers stays one: it
    is counted, trained and saved once.
    """

    index: int
    paths: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    ranks: Sequence[int]
    shared: dict[str, Any]

    @classmethod
    def alone(cls, weight: Tensor, rank: int) -> Site:
        """The place of a layer that is made by itself."""
        return cls(0, [""], [(weight.shape[0], weight.shape[1])], [rank], {})


@dataclass
class Start:
    """What `init` returns: the values a layer starts from.

    `parameters` are trained and `frozen` are kept, both under names that are attributes of the layer and keys
    on disk. `constants` are numbers, or objects that compare by value; one with a `generated` attribute
    (`Generated`) holds factors for several layers. With `residual` the layer takes W minus the low-rank part
    at the start as its base weight, so that it starts as the original layer whatever the factors are.
    `unsaved` names frozen tensors that follow from the options and the site, a seed's projection say: they are
    not written to disk, and loading calls `init` for them. What they follow from is among the constants, in
    which a file and a model that it is loaded into must agree.
    """

    parameters: dict[str, Tensor]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    residual: bool = False
    unsaved: tuple[str, ...] = ()


class Method(Protocol):
    """What the package asks of a method; see the text of this module."""

    name: str
    formula: str
    init: Callable[..., Start]
    terms: Callable[[Any, Tensor, Tensor], Terms]
    reference: Callable[[Tensor, Tensor, Tensor | None, Any], Tensor]


_METHODS: Registry[type[Method]] = Registry("method", __name__)
_NOT_OPTIONS = ("weight", "rank", "alpha", "site")


def method(cls: Any) -> Any:
    """Register a method class under its `name`; TypeError if a part of the contract is missing."""
    missing = [part for part in ("name", "formula", "init", "terms", "reference") if not hasattr(cls, part)]
    if missing:
        raise TypeError(f"method {cls.__name__} lacks {', '.join(missing)}")
    parameters = inspect.signature(cls.init).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and name not in ("weight", "site")]
    if required:
        raise TypeError(f"method {cls.__name__}: init gives no default for {', '.join(required)}")
    return _METHODS.add(cls.name, cls)


def registry() -> dict[str, type[Method]]:
    """All methods by name."""
    return _METHODS.all()


def get(name: str) -> type[Method]:
    """The method of that name; ValueError with the nearest name otherwise."""
    return _METHODS.get(name)


def options(name: str) -> dict[str, Any]:
    """The options of a method with their defaults, read from the signature of its `init`."""
    parameters = inspect.signature(get(name).init).parameters
    return {key: p.default for key, p in parameters.items() if key not in _NOT_OPTIONS}


def small_options(name: str) -> dict[str, Any]:
    """Options under which the method fits layers of a few dozen features, for tests and tables."""
    return dict(getattr(get(name), "small", {}))


def keeps(name: str) -> tuple[str, ...]:
    """What backward keeps of every token, of x, s, gate and y."""
    return getattr(get(name), "keeps", ("x", "s"))


def differs_at_start(name: str, chosen: Mapping[str, Any] | None = None) -> str | None:
    """Why a layer of the method with these options does not start as the base layer; None if it does."""
    declared = getattr(get(name), "differs_at_start", None)
    return declared(**{**options(name), **(chosen or {})}) if callable(declared) else declared


def peft_format(name: str, chosen: Mapping[str, Any] | None = None) -> PeftFormat | None:
    """How PEFT writes the method with these options; None if it does not have it."""
    known: PeftFormat | None = getattr(get(name), "peft", None)
    return known if known is not None and known.has({**options(name), **(chosen or {})}) else None


def resolve(name: str, rank: int | None = None, alpha: float | None = None) -> tuple[int, float]:
    """Rank and alpha, the method's defaults for None; a default alpha of None means alpha = rank."""
    parameters = inspect.signature(get(name).init).parameters
    rank = parameters["rank"].default if rank is None else rank
    alpha = parameters["alpha"].default if alpha is None else alpha
    return rank, float(rank if alpha is None else alpha)


def init(name: str, weight: Tensor, rank: int, alpha: float, site: Site | None = None, **chosen: Any) -> Start:
    """Call a method's `init` on `weight` [out, in]; `site` reaches the methods that ask for it."""
    function = get(name).init
    if "site" in inspect.signature(function).parameters:
        chosen["site"] = site or Site.alone(weight, rank)
    with torch.no_grad():
        return function(weight.detach(), rank=rank, alpha=alpha, **chosen)
