"""PEFT's layer classes with a forward that takes the fused path where it can, and PEFT's own where it can't.

Which of the two is decided in every call from plain attributes, so that nothing has to be told when adapters are
added, switched, merged or disabled.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..adaptable import is_conv1d
from ..add import lowrank_add
from ..branches import Branch
from ..grouping import GROUP, Call
from ..linear import lowrank_linear
from ..plain import PLAIN, why_not_plain
from ..routes import GROUP_ROUTES, small
from .parts import for_graphs, stacked
from .readers import Base, Part, Reader, child_of, layer_classes, weight_of
from .state import Settings, State

__all__ = ["STATE", "TOO_SMALL", "accelerated_class", "accelerated_classes", "adapter_path", "base_is_ours", "state_of"]

STATE = "_lowrank_fused"

# The reason of calls that `_is_small`.
TOO_SMALL = "too small for a CPU to gain"
_SMALL = ("original", TOO_SMALL)

# PEFT's own arguments, which it keeps from the base layer; None is their default.
_MAY_BE_NONE = frozenset({"adapter_names", "alora_offsets"})

# Libraries whose layers make a tensor in every call and have no use for it afterwards, in backward neither.
_GIVES_AWAY = frozenset({"aqlm", "awq", "bitsandbytes", "gptqmodel", "hqq"})


class Accelerated:
    """Mixed in before a PEFT layer class; `reader` says how that class is read."""

    reader: type[Reader]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What PEFT's forward returns, from one read of x where the adapter allows it."""
        if not isinstance(self, Accelerated):  # restored, but device hooks kept this bound method from before
            return type(self).forward(self, x, *args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling and why_not_plain(x) is None:
            own = self.__dict__
            state, group = own[STATE], own.get(GROUP)
            chooses = state.settings.route == "auto"
            if group is not None and not (args or kwargs or (chooses and group.is_small(x))):
                y = group.output(self, x)
                if y is not None:
                    state.calls["fused", ""] += 1
                    return y
            if chooses and x.nbytes * state.times_x < small.LIMIT and _is_small(self, x):
                state.calls[_SMALL] = state.calls.get(_SMALL, 0) + 1  # in a fifth of the time of +=
                return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        active: list[str] = []
        reason = _why_not(self, x, args, kwargs, active, compiling)
        base = _base_of(self, x) if reason is None else None
        if reason is None and base is None:
            reason = _why_not_beside(self, active)
        if not compiling:
            path = "original" if reason else "fused" if base else "tail"
            self.__dict__[STATE].calls[path, reason or ""] += 1
        if reason:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return _fused(self, x, active, base, compiling)

    def as_branch(self, x: Tensor) -> Call | str:
        """What forward(x) computes, as a part of a group of layers with this x."""
        active: list[str] = []
        if reason := _why_not(self, x, (), {}, active, False):
            return reason
        base = _base_of(self, x)
        if base is None:
            return "the base layer computes by itself"
        state = self.__dict__[STATE]
        reader, settings, training = self.reader, state.settings, self.training  # type: ignore[attr-defined]
        parts = [reader.read(self, name, base, partial(state.remember, name, training)) for name in active]
        if len(parts) > 1 and len(parts := stacked(parts)) > 1:
            return "several adapters, not all of them two factors without dropout"
        return _as_call(self, x, base, parts[0], settings)

    def _get_name(self) -> str:
        """PEFT's name in a printed model, from which PEFT tells the type of a layer."""
        return type(self).__mro__[2].__name__

    def _replicate_for_data_parallel(self) -> Any:
        """A replica that remembers its own factors: it is called in a thread of its own, with other tensors."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__dict__[STATE] = state_of(self).replica()
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moved or cast: what is remembered would keep the memory of the old weights."""
        state_of(self).generated.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def delete_adapter(self, adapter_name: str) -> None:
        """Together with what is remembered of it."""
        state_of(self).generated.pop(adapter_name, None)
        super().delete_adapter(adapter_name)  # type: ignore[misc]


def _as_call(layer: Any, x: Tensor, base: Base, part: Part, settings: Settings) -> Call | str:
    """A layer's only part beside its base product, where that is two factors and no more."""
    t, drop = part.terms, _dropout(part, x, "fused")
    if t.core is not None or t.out is not None or t.col is not None or isinstance(t.scale, Tensor):
        return "more than two factors and a number"
    route = settings.route
    if route not in ("auto", *GROUP_ROUTES):
        return f"route {route}"
    if drop and settings.dropout == "torch":
        return "PyTorch's own masks, one for each layer"
    if torch.is_autocast_enabled(x.device.type):
        if layer.reader.returns_dtype_of_input:
            return "returns the dtype of x under autocast"
    elif settings.precision == "match" and x.element_size() == 2 and torch.float32 in (t.a.dtype, t.b.dtype):
        route = "precise"
    bias = child_of(layer, "base_layer").bias
    if part.bias is not None:
        bias = part.bias if bias is None else bias + part.bias
    return Call(Branch(base.matrix, t.a, t.b, bias), t.scale, drop.get("dropout_p", 0.0), route)


def state_of(layer: Any) -> State:
    """What `accelerate` put onto a layer."""
    return layer.__dict__[STATE]


def _why_not(
    layer: Any, x: Tensor, args: tuple, kwargs: dict[str, Any], active: list[str], compiling: bool
) -> str | None:
    """Why only PEFT's own forward serves this call; fills `active` with the adapters that act."""
    reader, settings = layer.reader, layer.__dict__[STATE].settings
    if settings.route == "off":
        return "switched off"
    if not compiling and (reason := _why_observed()):
        return reason
    if args or (kwargs and any(value is not None or name not in _MAY_BE_NONE for name, value in kwargs.items())):
        names = ", ".join(sorted(kwargs)) or "more than the input"
        return f"called with {names}"
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged:
        return "adapters merged"
    active.extend(_active(layer))
    if not active:
        return "no active adapter in this layer"
    if what := why_not_plain(x):
        return f"input is {what}"
    if not x.is_floating_point():
        return f"input is {x.dtype}"
    shape = x.shape
    if len(shape) < 2 or shape[-1] != layer.in_features:
        return "input is no matrix, or one of another width"
    for adapter in active:
        if reason := _why_not_wanted(layer, adapter):
            return reason
    if reason := _why_not_faster(layer, active, x):  # before what costs more to find out
        return reason
    for adapter in active:
        if reason := _why_not_now(layer, adapter, x):
            return reason
    if len(active) > 1 and any(reader.needs_weight(layer, name) for name in active):
        return "several adapters, one of which depends on the weight"
    return None


def _why_observed() -> str | None:
    """What goes on around an eager call and has to see the single steps of PEFT's forward."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if torch.jit.is_tracing():
        return "torch.jit traces it"
    return "hooks on all modules" if torch.nn.modules.module._has_any_global_hook() else None


def adapter_path(layer: Any, adapter: str) -> tuple[str, str | None]:
    """Our name of the adapter's method, and why calls with an x like the base weight leave it to PEFT."""
    reason = _why_not_wanted(layer, adapter)
    if reason is None:
        reason = _why_not_faster(layer, [adapter], None)
    return layer.reader.method(layer, adapter), reason


def _why_not_wanted(layer: Any, adapter: str) -> str | None:
    reader, wanted = layer.reader, layer.__dict__[STATE].settings.methods
    if wanted is not None and reader.method(layer, adapter) not in wanted:
        return "not among the methods that were asked for"
    return reader.why_not(layer, adapter)


def _why_not_now(layer: Any, adapter: str, x: Tensor) -> str | None:
    """Hooks, shards, devices and dtypes, which change from call to call."""
    reader = layer.reader
    for module in reader.modules(layer, adapter):
        if _is_hooked(module):
            return f"a hook on {type(module).__name__} of the adapter"
        kind = type(module)
        if kind is nn.Dropout:
            if module.p >= 1.0:
                return "a dropout that leaves nothing"
        elif kind is not nn.Linear and kind is not nn.Identity and not _is_magnitude(module):
            return f"the adapter holds a {kind.__name__}"
    tensors, device = reader.tensors(layer, adapter), x.device
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.dim() == 0 or _is_freed(tensor):
            return "the adapter's tensors are sharded"
        if tensor.device != device and tensor.requires_grad:
            return "input and adapter are on different devices"
    if torch.is_autocast_enabled(device.type):
        known = (torch.float32, torch.get_autocast_dtype(device.type))
        others = [tensor.dtype for tensor in tensors if tensor.dtype not in known]
        if others:
            return f"adapter in {_short(others[0])} under autocast to {_short(known[1])}"
        return None if x.dtype != torch.float64 else "float64 under autocast"
    dtype = tensors[0].dtype
    if dtype != x.dtype:
        if not getattr(layer, "cast_input_dtype_enabled", True):
            return "the cast of the input is disabled"
        if dtype != torch.float32 or x.dtype not in (torch.float16, torch.bfloat16):
            return f"adapter in {_short(dtype)} beside an input in {_short(x.dtype)}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    own = module.__dict__
    # Written out: this is asked of every module in every call.
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return "forward" in own or "_hf_hook" in own


def _is_magnitude(module: nn.Module) -> bool:
    return type(module).__name__ == "DoraLinearLayer"


def _is_freed(tensor: Tensor) -> bool:
    """Whether a sharding wrapper took the memory away."""
    if tensor.is_meta:
        return True
    return not torch.compiler.is_compiling() and tensor.untyped_storage().size() == 0 and tensor.numel() > 0


def base_is_ours(layer: Any) -> bool:
    """Whether the product with the base weight is ours to compute: a whole frozen matrix that no hook watches."""
    linear = child_of(layer, "base_layer")
    if (type(linear) is not nn.Linear and not is_conv1d(linear)) or _is_hooked(linear):
        return False
    weight = weight_of(linear)
    whole = type(weight) in PLAIN and weight.dim() == 2 and not _is_freed(weight)
    return whole and weight.is_floating_point() and not weight.requires_grad


def _base_of(layer: Any, x: Tensor) -> Base | None:
    """The base weight, if we compute its product with this x."""
    if not base_is_ours(layer):
        return None
    linear = child_of(layer, "base_layer")
    weight = weight_of(linear)
    castable = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return Base(weight, type(linear) is not nn.Linear) if castable and weight.device == x.device else None


def _why_not_beside(layer: Any, active: list[str]) -> str | None:
    """Why the term can't be added to what the base layer returns by itself."""
    if any(layer.reader.needs_weight(layer, name) for name in active):
        return "depends on a base weight that is hooked, sharded, quantised or trained"
    return None


def _why_not_faster(layer: Any, active: list[str], x: Tensor | None) -> str | None:
    """Why PEFT's own forward is as fast for this x, or for one like the base weight."""
    reader = layer.reader
    if reader.as_fast_in_16_bits is None or layer.__dict__[STATE].settings.route != "auto" or not base_is_ours(layer):
        return None
    x = weight_of(child_of(layer, "base_layer")) if x is None else x
    return reader.as_fast_in_16_bits if all(reader.is_as_fast(layer, name, x) for name in active) else None


def _is_small(layer: Any, x: Tensor) -> bool:
    """Whether PEFT's own forward is as fast because next to nothing is computed; x and y are below the limit.

    Dropout lowers the limit, and what needs the base weight has PEFT go through all of it in every call.
    """
    if not x.is_cpu:
        return False
    reader, active, times_x = layer.reader, _active(layer), state_of(layer).times_x
    with_dropout = x.numel() * small.WITH_DROPOUT * times_x
    if with_dropout >= small.LIMIT and any(reader.drops(layer, name) for name in active):
        return False
    if not any(reader.needs_weight(layer, name) for name in active):
        return True
    of_weight = layer.out_features * layer.in_features * x.element_size() / reader.break_even
    return x.nbytes * times_x + of_weight < small.LIMIT


def _active(layer: Any) -> list[str]:
    """Adapters that act in this layer."""
    known = layer.reader.adapters(layer)
    return [name for name in layer.active_adapters if name in known]


def _fused(layer: Any, x: Tensor, active: list[str], base: Base | None, compiling: bool) -> Tensor:
    """The base layer's product with all active adapters."""
    reader, state = layer.reader, layer.__dict__[STATE]
    parts = [reader.read(layer, name, base, partial(state.remember, name, layer.training)) for name in active]
    if len(parts) > 1:
        parts = stacked(parts)
    if compiling:
        parts = [for_graphs(part) for part in parts]
    settings = state.settings
    common: dict[str, Any] = {
        "route": settings.route,
        "precision": settings.precision,
        "label": None if compiling else state.path,
    }
    biases = [part.bias for part in parts if part.bias is not None]
    if base is not None:
        bias = child_of(layer, "base_layer").bias
        for more in biases:
            bias = more if bias is None else bias + more
        first, *others = parts
        t = first.terms
        y = lowrank_linear(
            x, base.matrix, t.a, t.b, scale=t.scale, core=t.core, out=t.out, col=t.col, bias=bias,
            **_dropout(first, x, settings.dropout), **common,
        )  # fmt: skip
        inplace = t.col is None
    else:
        y, others = layer.base_layer(x), parts
        inplace = _is_nobody_elses(y, layer.base_layer)
        for more in biases:
            y, inplace = (y + more).to(y.dtype), True
    for part in others:
        t = part.terms
        y = lowrank_add(
            y, x, t.a, t.b, scale=t.scale, core=t.core, out=t.out, inplace=inplace,
            **_dropout(part, x, settings.dropout), **common,
        )  # fmt: skip
        inplace = True
    return y.to(x.dtype) if reader.returns_dtype_of_input else y


def _is_nobody_elses(y: Tensor, linear: nn.Module) -> bool:
    """Whether what the base layer returned may be added to in place.

    A class that we don't know may keep it, or have a backward that looks at it. No compiler needs the answer.
    """
    if torch.compiler.is_compiling() or type(y) not in PLAIN or _is_hooked(linear):
        return False
    known = type(linear) is nn.Linear or is_conv1d(linear)
    return known or type(linear).__module__.partition(".")[0] in _GIVES_AWAY


def _dropout(part: Part, x: Tensor, kind: str) -> dict[str, Any]:
    """Probability, and with `kind` "torch" the very mask that PEFT's dropout module would have drawn."""
    module: Any = part.dropout
    if type(module) is nn.Identity or not module.training or module.p == 0.0:
        return {}
    if kind == "fused":
        return {"dropout_p": module.p}
    # Of the columns and the dtype that PEFT drops from: random numbers depend on both, on a GPU on the dtype too.
    columns, dtype = part.dropped or (x.shape[-1], part.terms.a.dtype)
    dtype = dtype or x.dtype
    same = columns == x.shape[-1]
    ones = torch.ones_like(x, dtype=dtype) if same else x.new_ones((*x.shape[:-1], columns), dtype=dtype)
    return {"dropout_p": module.p, "keep": F.dropout(ones, module.p, training=True)[..., : x.shape[-1]] != 0}


if TYPE_CHECKING:
    _Classes = dict[type[nn.Module], type[nn.Module]]


def accelerated_classes() -> _Classes:
    """PEFT's layer class -> ours, made once; each is an attribute of this module, so that it can be pickled."""
    if not _classes:
        module = sys.modules[__name__]
        for layer, reader in layer_classes().items():
            name = f"Accelerated{layer.__module__.rpartition('tuners.')[2].title().replace('.', '')}{layer.__name__}"
            made = type(
                name, (Accelerated, layer),
                {"reader": reader, "__module__": __name__, "__qualname__": name, "__doc__": layer.__doc__},
            )  # fmt: skip
            setattr(module, name, made)
            _classes[layer] = made
    return _classes


_classes: _Classes = {}


def accelerated_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class to give to a PEFT layer; None if it is not one that can be accelerated, or has it already."""
    return accelerated_classes().get(type(layer))


def __getattr__(name: str) -> Any:
    """Unpickling may ask for a class before any model was accelerated in this process."""
    if name.startswith("Accelerated"):
        for made in accelerated_classes().values():
            if made.__name__ == name:
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
