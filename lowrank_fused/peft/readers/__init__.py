"""How each PEFT layer is read: one file per method, found by importing them.

Readers take every tensor from where PEFT keeps it, in every call, so nothing has to be kept in step with PEFT.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_fused.factors.generated import evaluated
from lowrank_fused.registry import Registry
from lowrank_fused.terms import Terms

__all__ = [
    "Base",
    "Part",
    "Reader",
    "Remembered",
    "child_of",
    "layer_classes",
    "methods",
    "reader",
    "weight_of",
    "where_launches_cost",
]

# remembered(function, *tensors, **constants) -> tensors, evaluated when one of the tensors has changed
Remembered = Callable[..., tuple[Tensor, ...]]


def child_of(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` for a submodule, which takes nn.Module a microsecond; every call asks for many."""
    return module._modules[name]


def weight_of(module: nn.Module) -> Tensor:
    """`module.weight` likewise; a replica of DataParallel keeps it as a plain attribute."""
    weight = module._parameters.get("weight")
    return module.weight if weight is None else weight  # type: ignore[return-value]


def where_launches_cost(remembered: Remembered, like: Tensor) -> Remembered:
    """`remembered` on a GPU, else evaluation in every call.

    For functions of many launches and little work, which a CPU finishes sooner than it remembers them.
    """
    return remembered if like.is_cuda else evaluated


class Base(NamedTuple):
    """The weight of a base layer as the layer stores it, [out, in] or transposed."""

    weight: Tensor
    transposed: bool

    @property
    def matrix(self) -> Tensor:
        """[out, in], a view."""
        return self.weight.t() if self.transposed else self.weight


@dataclass(frozen=True)
class Part:
    """One adapter of one layer: its terms, the dropout before it, and a bias [out] of its own.

    `dropped` is what that dropout is given in PEFT if not x in A's dtype: how many columns, and which dtype, None for
    x's own. Other random numbers belong to it.
    """

    terms: Terms
    dropout: nn.Module
    bias: Tensor | None = None
    dropped: tuple[int, torch.dtype | None] | None = None


class Reader(ABC):
    """What is asked of a reader. It holds no state: all are functions of PEFT's layer and an adapter's name."""

    # Our names of the methods it reads.
    methods: tuple[str, ...] = ()
    # Whether PEFT's layer returns the dtype of x. Under autocast its base layer returns another.
    returns_dtype_of_input = False
    # Why PEFT's own forward was measured to be as fast where `is_as_fast`; None where ours is faster. A route asked for
    # by name runs ours all the same.
    as_fast_in_16_bits: str | None = None
    # From how many times the limit of LoRA on x and y are large enough for a CPU to gain, coarsely as it was measured.
    break_even = 1.0

    @staticmethod
    @abstractmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        """The adapters that the layer holds, by name."""

    @classmethod
    def method(cls, layer: Any, adapter: str) -> str:
        """Our name of the adapter's method."""
        return cls.methods[0]

    @staticmethod
    def needs_weight(layer: Any, adapter: str) -> bool:
        """Whether the term depends on the base weight.

        If not, it can also be added to the result of a base layer that is not ours to compute.
        """
        return False

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        """What about this adapter only PEFT's own forward computes."""
        return None

    @classmethod
    def is_as_fast(cls, layer: Any, adapter: str, x: Tensor) -> bool:
        """Training on a CPU without dropout, x in 16 bits."""
        if x.device.type != "cpu" or x.element_size() != 2 or not torch.is_grad_enabled():
            return False
        if not any(tensor.requires_grad for tensor in cls.tensors(layer, adapter)):
            return False
        return not cls.drops(layer, adapter)

    @classmethod
    def drops(cls, layer: Any, adapter: str) -> bool:
        """Whether the adapter drops elements of x at the moment."""
        dropouts = [m for m in cls.modules(layer, adapter) if isinstance(m, nn.Dropout)]
        return any(dropout.training and dropout.p > 0 for dropout in dropouts)

    @staticmethod
    @abstractmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        """Modules that PEFT's forward calls: a hook on one of them has to fire."""

    @staticmethod
    @abstractmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        """The adapter's tensors; the first has the dtype that PEFT computes in."""

    @staticmethod
    @abstractmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        """The adapter as the engine takes it, in differentiable PyTorch; `base` is there if it needs the weight."""


_READERS: Registry[type[Reader]] = Registry("reader", __name__)


def reader(*layers: str) -> Callable[[type[Reader]], type[Reader]]:
    """Register a reader for PEFT's layer classes, each "module:class" below peft.tuners."""

    def register(cls: type[Reader]) -> type[Reader]:
        # Readers are never instantiated, which is when Python would look.
        if inspect.isabstract(cls):
            raise TypeError(f"{cls.__name__} must define {', '.join(sorted(cls.__abstractmethods__))}")
        for layer in layers:
            _READERS.add(layer, cls)
        return cls

    return register


def layer_classes() -> dict[type[nn.Module], type[Reader]]:
    """PEFT's layer class -> reader, for those that the installed PEFT has."""
    found = {}
    for place, cls in _READERS.all().items():
        module, _, name = place.partition(":")
        try:
            layer = getattr(importlib.import_module(f"peft.tuners.{module}"), name, None)
        except ImportError:  # a method, or a way to quantise, that is not installed
            continue
        if layer is not None:
            found[layer] = cls
    return found


def methods() -> list[str]:
    """Names of the methods that have a reader."""
    return sorted({name for cls in _READERS.all().values() for name in cls.methods})
