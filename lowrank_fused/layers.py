"""LowRankLinear: a linear layer that wears an adapter, in the place of an nn.Linear or a Conv1D."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import methods
from .adaptable import as_matrix, is_conv1d, parameters_of, why_not_adaptable
from .branches import Branch
from .config import AdapterConfig
from .errors import UnsupportedError
from .factors.generated import Generated
from .grouping import GROUP, Call
from .linear import lowrank_linear
from .merging import merged_weight
from .methods import Site, Start
from .terms import Terms

__all__ = ["LowRankLinear"]

# What a user may have hung onto the linear. The layer takes over the same objects, so that hooks keep firing.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Values:
    """Named values for a method, where they are not the layer's own."""

    def __init__(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class LowRankLinear(nn.Module):
    """y = col · ( x Wᵀ + scale · out · core(drop(x) Aᵀ) Bᵀ ) + bias, with W and bias of a given linear.

    `weight` and `bias` are the linear's own Parameter objects under the same names, so the base model's
    state_dict keys stay; a Conv1D keeps its weight as [in, out] and no transposed copy is made. The method's
    tensors are attributes under the names its `init` gives them (for LoRA PEFT's: `lora_A` [r, in], `lora_B`
    [out, r]). Frozen tensors are parameters without gradient rather than buffers, because
    DistributedDataParallel sends buffers around in every step.

    A residual start (PiSSA, OLoRA) gives the layer a weight of its own and keeps the starting values as
    `start_<name>`: they say which residual this is when the adapter is saved, and stand for the original
    layer when it is disabled.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, config: AdapterConfig, start: Start, *, rank: int, alpha: float) -> None:
        """Put a method's `start` onto a linear; `from_linear` is the way to make one."""
        super().__init__()
        self.method = methods.get(config.method)
        self.rank, self.alpha, self.dropout_p = rank, alpha, config.lora_dropout
        self.residual = start.residual
        self.enabled = True
        self.tied_to: str | None = None
        self.fan_in_fan_out = is_conv1d(linear)
        self.out_features, self.in_features = as_matrix(linear).shape
        weight, bias = parameters_of(linear)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.training = linear.training
        for name in _HOOKS:
            self.__dict__[name] = linear.__dict__[name]
        # In a tuple, so that the replaced module is no child of this one.
        self._replaced = (linear,)
        self._unmerged: Tensor | None = None
        self._generated = Generated(self._generate) if hasattr(self.method, "generate") else None
        self._adopt(start, config.autocast_adapter_dtype)
        if self.residual:
            self.weight = nn.Parameter(torch.empty_like(self.weight), requires_grad=False)
            self.rebase()
        # Last, so that a start that does not work out leaves the linear as it was.
        self._trained_before = {name: p.requires_grad for name, p in linear.named_parameters()}
        linear.weight.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(config.bias != "none")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: AdapterConfig | None = None,
        *,
        path: str = "",
        site: Site | None = None,
        **settings: Any,
    ) -> LowRankLinear:
        """A layer that computes what `linear` computes, plus an adapter at its starting values.

        Args:
            linear: an nn.Linear or a transformers Conv1D with a plain floating-point weight. The layer shares
                its weight and bias objects and freezes them (the bias only if config.bias is "none").
            config: an AdapterConfig, or its fields by name, `method="loldu", rank=64, dropout=0.05` say. Its
                targets are not looked at.
            path: the layer's path in a model, for rank_pattern and alpha_pattern.
            site: the layer's place among others, for methods whose layers share tensors.

        Raises UnsupportedError for a layer that can't carry an adapter, ValueError and TypeError for bad
        values.
        """
        if config is None:
            config = AdapterConfig(**settings)
        elif settings:
            raise TypeError(f"from_linear takes a config or its fields, got both: {', '.join(settings)}")
        reason = why_not_adaptable(linear)
        if reason:
            raise UnsupportedError(f"this layer can't carry an adapter: {reason}")
        rank, alpha = methods.resolve(config.method, config.rank_of(path), config.alpha_of(path))
        start = methods.init(config.method, as_matrix(linear), rank, alpha, site, **config.options)
        return cls(linear, config, start, rank=rank, alpha=alpha)

    def _adopt(self, start: Start, autocast_adapter_dtype: bool) -> None:
        """Register the start's tensors and constants as attributes."""
        sixteen_bit = self.weight.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if sixteen_bit and autocast_adapter_dtype else self.weight.dtype
        self.trained_names, self.frozen_names = tuple(start.parameters), tuple(start.frozen)
        self.saved_names = tuple(n for n in (*self.trained_names, *self.frozen_names) if n not in start.unsaved)
        self.constants = dict(start.constants)
        tensors = {name: _leaf(value, dtype, True) for name, value in start.parameters.items()}
        # Frozen vectors have the trained tensors' dtype, so that a difference to a start is exactly zero.
        tensors |= {
            name: _leaf(value, dtype if value.dim() < 2 else value.dtype, False) for name, value in start.frozen.items()
        }
        if start.residual:
            tensors |= {f"start_{name}": _leaf(tensors[name].clone(), dtype, False) for name in start.parameters}
        for name, value in (tensors | self.constants).items():
            if hasattr(self, name):
                raise ValueError(f"method {self.method.name!r} calls something {name!r}, a name this layer uses")
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in], a view."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the weight at the moment."""
        return self._unmerged is not None

    @property
    def generated(self) -> tuple[Tensor, ...]:
        """What the method generates from its tensors and the weight; see `Generated` for when."""
        if self._generated is None:
            raise AttributeError(f"method {self.method.name!r} generates nothing")
        return self._generated(*(getattr(self, name) for name in self._sources()), self.weight)

    def _sources(self) -> tuple[str, ...]:
        return (*self.trained_names, *self.frozen_names)

    def _generate(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *values, weight = tensors
        named = dict(zip(self._sources(), values, strict=True))
        matrix = weight.t() if self.fan_in_fan_out else weight
        return self.method.generate(Values({**named, **self.constants}), matrix)  # type: ignore[attr-defined]

    def caches(self) -> list[Generated]:
        """Everything that this layer remembers of its generated factors, alone or with others."""
        shared = [getattr(value, "generated", None) for value in self.constants.values()]
        return [one for one in (self._generated, *shared) if isinstance(one, Generated)]

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What the adapter adds to the layer, by attribute name: trained, frozen and start values."""
        starts = [f"start_{name}" for name in self.trained_names] if self.residual else []
        return {name: getattr(self, name) for name in (*self.trained_names, *self.frozen_names, *starts)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]; the plain linear layer when merged or disabled."""
        # A graph shows every layer by itself: it must neither hold nor depend on what a group remembers.
        group = None if torch.compiler.is_compiling() else self.__dict__.get(GROUP)
        if group is not None and not group.is_small(x) and (y := group.output(self, x)) is not None:
            return y
        matrix = self.matrix
        if self.merged or not (self.enabled or self.residual):
            return F.linear(x, matrix, self.bias)
        terms = self.method.terms(self, matrix, x) if self.enabled else self._taken_out(matrix, x)
        return lowrank_linear(
            x,
            matrix,
            terms.a,
            terms.b,
            scale=terms.scale,
            core=terms.core,
            out=terms.out,
            col=terms.col,
            bias=self.bias,
            dropout_p=self.dropout_p if self.training and self.enabled else 0.0,
        )

    def as_branch(self, x: Tensor) -> Call | str:
        """What forward(x) computes, as a part of a group of layers with this x."""
        if self.merged or not self.enabled:
            return "merged or disabled"
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            return "input is no matrix, or one of another width"
        t = self.method.terms(self, self.matrix, x)
        if t.core is not None or t.out is not None or t.col is not None:
            return f"{self.method.name} has more than two factors"
        branch = Branch(self.matrix, t.a, t.b, self.bias)
        return Call(branch, t.scale, self.dropout_p if self.training else 0.0, "auto")

    def _at_start(self, weight: Tensor) -> Values:
        """What `terms` reads, with the starting values in the place of the trained ones (residual layers)."""
        values = {name: getattr(self, name) for name in self.frozen_names}
        values |= {name: getattr(self, f"start_{name}") for name in self.trained_names}
        start = Values({**values, **self.constants})
        if self._generated is not None:
            start.generated = self.method.generate(start, weight)  # type: ignore[attr-defined]
        return start

    def _taken_out(self, weight: Tensor, x: Tensor) -> Terms:
        """The low-rank part that a residual layer's weight lacks."""
        terms = getattr(self.method, "taken_out", self.method.terms)
        return terms(self._at_start(weight), weight, x)

    @torch.no_grad()
    def rebase(self) -> None:
        """Set the weight of a residual layer to W minus the low-rank part at the start."""
        original = as_matrix(self._replaced[0]).detach().to(self.weight.device)
        terms = self._taken_out(original, original.new_zeros(0, self.in_features))
        residual = merged_weight(original, replace(terms, scale=-terms.scale))
        _check_finite(residual, "the residual weight of the starting values")
        self.matrix.copy_(residual)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into the weight, in place; the weight as it was is kept on the host for `unmerge`.

        W' = col · (W + scale · out · B · core · A), see `merged_weight`. Raises UnsupportedError where there
        is no such matrix or the weight is tied to another module's, ValueError if W' is not finite; the layer
        is then unchanged.
        """
        if self.merged:
            return
        if self.tied_to:
            raise UnsupportedError(f"the weight is tied to {self.tied_to}, which merging would change; untie it first")
        why_not = getattr(self.method, "why_not_mergeable", None)
        if why_not is not None and (reason := why_not(self)):
            raise UnsupportedError(reason)
        terms = self.method.terms(self, self.matrix, self.weight.new_zeros(0, self.in_features))
        merged = merged_weight(self.matrix, terms)
        _check_finite(merged, "the merged weight")
        self._unmerged = self.weight.detach().to("cpu", copy=True)
        self.matrix.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out of the weight again: bit for bit the weight that `merge` found."""
        if self._unmerged is not None:
            self.weight.copy_(self._unmerged)
            self._unmerged = None

    def forget_unmerged(self) -> None:
        """Take the merged weight for the layer's own: nothing can undo the merge, and the adapter acts again."""
        self._unmerged = None

    def keep_merged(self) -> nn.Module:
        """The linear layer with the merged weight for good: the adapter is lost, nothing can undo it."""
        self.merge()
        linear = self._replaced[0]
        self._unmerged = None
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return self._released(linear)

    @torch.no_grad()
    def park_replaced(self) -> None:
        """Make the replaced linear, which nobody calls any more, cost no memory on the device.

        A residual layer's original weight moves to the host. Otherwise the linear lets go of the parameters
        that the layer shares with it, so that whoever shards or replaces the layer's frees them.
        """
        linear = self._replaced[0]
        if not self.residual:
            linear._parameters["weight"] = None
        elif not self.weight.is_meta:
            linear.weight.data = linear.weight.data.cpu()
        linear._parameters["bias"] = None

    @torch.no_grad()
    def original_linear(self) -> nn.Module:
        """The replaced layer with its weight as it was, bit for bit, on the device where this layer is."""
        self.unmerge()
        linear = self._replaced[0]
        if self.residual:
            linear.weight.data = linear.weight.data.to(self.weight.device, self.weight.dtype)
        else:
            linear.weight = self.weight
        linear.bias = self.bias  # type: ignore[assignment]
        return self._released(linear)

    def _released(self, linear: nn.Module) -> nn.Module:
        for name, parameter in linear.named_parameters():
            parameter.requires_grad_(self._trained_before[name])
        return linear.train(self.training)

    def extra_repr(self) -> str:
        state = ", merged" if self.merged else "" if self.enabled else ", disabled"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, method={self.method.name!r}, rank={self.rank}, "
            f"alpha={self.alpha:g}, dropout={self.dropout_p:g}{state}"
        )


def _leaf(value: Tensor, dtype: torch.dtype, trained: bool) -> Tensor:
    """A parameter of that dtype; one that layers share stays the same object, integers stay what they are."""
    if not value.is_floating_point():
        return value
    if isinstance(value, nn.Parameter):
        value.data = value.data.to(dtype)
        return value
    return nn.Parameter(value.detach().to(dtype).contiguous(), requires_grad=trained)


def _check_finite(weight: Tensor, what: str) -> None:
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(f"{what} would not be finite in {weight.dtype}; nothing was changed")
