"""Accelerate a model that wears PEFT adapters, in place, and take it back."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from ..adaptable import is_conv1d
from ..errors import NotAcceleratedError, UnsupportedError
from ..grouping import GROUP, group, group_of, ungroup
from ..registry import did_you_mean
from ..routes import ROUTES
from . import readers
from .layers import STATE, Accelerated, accelerated_class, adapter_path, base_is_ours, state_of
from .report import Report, Row
from .state import Settings, State

__all__ = ["accelerate", "accelerated", "checked_settings", "explain", "restore"]

ENVIRONMENT = "LOWRANK_FUSED_ROUTE"

_log = logging.getLogger("lowrank_fused")


def accelerate(
    model: nn.Module,
    methods: Sequence[str] | None = None,
    *,
    strict: bool = False,
    route: str = "auto",
    precision: str = "match",
    dropout: str = "fused",
    groups: bool = True,
) -> Report:
    """Let a model's PEFT layers compute their adapters by our engine, in place; the numbers stay PEFT's.

        report = lf.accelerate(peft_model)
        print(report)

    Only the class of PEFT's layer objects changes. Parameters, state_dict, hooks, names and saved files stay, and so
    does everything PEFT does with adapters: add, delete, switch, disable, merge, scale, mixed batches. Whatever is
    unusual in a call goes to PEFT's own forward; `explain` counts why. Call it again after adding adapters to new
    layers; a second call is harmless otherwise, and changes the settings if it is given others.

    Two things don't stay: gradients can't be differentiated again (Hessian-vector products, gradient penalties; take
    route="off" for them), and a model that is pickled as a whole is unpickled only where this package is installed.

    Args:
        model: a PeftModel, or any module that holds PEFT layers: wrapped in DDP or torch.compile, before or after.
        methods: the methods to accelerate, all by default; see `lowrank_fused.peft.readers`.
        strict: raise NotAcceleratedError, and change nothing, if a layer would be left to PEFT.
        route: "auto", which leaves to PEFT what that was measured to compute as fast on a CPU (small calls, and see
            `Reader.as_fast_in_16_bits`), one of `lowrank_fused.routes.ROUTES`, or "off"; the environment variable
            LOWRANK_FUSED_ROUTE overrides it.
        precision: of fp32 adapters in a 16-bit model outside of autocast, PEFT's default: "match" multiplies them in
            fp32 as PEFT does, "fast" in 16 bits.
        dropout: "fused" draws masks from torch's generator by our own counter: same rate, other bits. "torch" drops
            exactly the elements that PEFT would have, at the price of drawing them.
        groups: let layers that are called with the same x (q, k, v; gate, up) share one pass over it, and with
            dropout "fused" one mask; see `group`.

    Raises:
        ValueError: unknown methods, routes or settings, or a model without PEFT layers.
        UnsupportedError: PEFT older than 0.18.
    """
    settings = checked_settings(methods, route, precision, dropout)
    layers = _tuner_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no PEFT layers; wrap it with peft.get_peft_model first, or put our own "
            "layers into a plain model with lowrank_fused.inject"
        )
    undo = _undo(layers.values())
    try:
        unread = _unread(model)
        for path, layer in layers.items():
            if id(layer) not in unread:
                _swap(layer, path, settings)
        group(model) if groups else ungroup(model)
        report = _report(model, layers, settings)
        if strict and report.of_path("original"):
            left = "; ".join(
                f"{row.count} x {row.layer} ({row.adapter}): {row.reason}"
                for row in report.rows
                if row.path == "original"
            )
            raise NotAcceleratedError(f"strict=True, but some layers would be left to PEFT: {left}")
    except BaseException:
        undo()
        raise
    nothing = settings.route != "off" and report.of_path("original") == report.layers
    _log.log(logging.WARNING if nothing else logging.INFO, report.summary())
    return report


def checked_settings(
    methods: Sequence[str] | None = None, route: str = "auto", precision: str = "match", dropout: str = "fused"
) -> Settings:
    """The settings of `accelerate`, the route from outside where there is one; ValueError for what does not exist."""
    from_outside = os.environ.get(ENVIRONMENT, "")
    route = from_outside or route
    for name, value, allowed in (
        (f"the environment variable {ENVIRONMENT}" if from_outside else "route", route, ("auto", "off", *ROUTES)),
        ("precision", precision, ("match", "fast")),
        ("dropout", dropout, ("fused", "torch")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if isinstance(methods, str):
        methods = (methods,)
    known = readers.methods()
    for method in methods or ():
        if method not in known:
            raise ValueError(f"no PEFT layers of a method {method!r} can be accelerated; {did_you_mean(method, known)}")
    return Settings(route, precision, dropout, None if methods is None else tuple(methods))


def _tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> PEFT layer, each once."""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError("PEFT is not installed: pip install 'peft>=0.18'") from None
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 18):
        raise UnsupportedError(f"accelerate needs peft 0.18 or newer, found {version}")
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}  # type: ignore[misc]


def _unread(model: nn.Module) -> set[int]:
    """Ids of PEFT layers that nobody calls: nn.MultiheadAttention uses the weight of its output projection itself."""
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return {id(child) for attention in attentions for child in attention.children()}


def _undo(layers: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that gives these layers back what they have now: their classes, and settings if accelerated."""
    states = [(layer, type(layer), layer.__dict__.get(STATE), group_of(layer)) for layer in layers]
    kept = [(layer, cls, state, state and state.settings, found) for layer, cls, state, found in states]

    def undo() -> None:
        for layer, cls, state, settings, found in kept:
            layer.__class__ = cls
            if state is None:
                layer.__dict__.pop(STATE, None)
            else:
                layer.__dict__[STATE], state.settings = state, settings
            if found is None:
                layer.__dict__.pop(GROUP, None)
            else:
                layer.__dict__[GROUP] = found

    return undo


def _swap(layer: nn.Module, path: str, settings: Settings) -> None:
    state = layer.__dict__.get(STATE)
    if isinstance(layer, Accelerated) and state is not None:
        state.settings = settings
        return
    cls = accelerated_class(layer)
    if cls is not None:
        wide: Any = layer
        times_x = (1 + wide.out_features / wide.in_features) / cls.reader.break_even  # type: ignore[attr-defined]
        layer.__dict__[STATE] = State(path, settings, times_x)
        layer.__class__ = cls


def restore(model: nn.Module) -> nn.Module:
    """Give every layer its PEFT class back; returns the same model, which is as before `accelerate`."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Accelerated)]
    for layer in layers:
        layer.__class__ = _peft_class(layer)
        layer.__dict__.pop(STATE, None)
        layer.__dict__.pop(GROUP, None)
    return model


@contextlib.contextmanager
def accelerated(model: nn.Module, **settings: Any) -> Iterator[Report]:
    """`with accelerated(model):` accelerates inside; afterwards every layer is what it was before.

    Takes the settings of `accelerate`. A model that was accelerated already has its own settings back at the end,
    and layers that came in between are PEFT's again.
    """
    undo = _undo(module for module in model.modules() if isinstance(module, Accelerated))
    report = accelerate(model, **settings)
    try:
        yield report
    finally:
        restore(model)
        undo()


def explain(model: nn.Module) -> Report:
    """Which paths the calls since `accelerate` took and why; calls of compiled graphs are not counted.

    A layer that took several paths is in several rows. `notes` tell of layers without a call, and of PEFT layers that
    came later.

    Raises ValueError for a model without accelerated layers.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Accelerated)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no accelerated layer: call lowrank_fused.accelerate(model) first; if that "
            "left every layer to PEFT, its report says why"
        )
    counts: Counter[tuple[str, str, str, str, str]] = Counter()
    calls: Counter[tuple[str, str, str, str, str]] = Counter()
    for layer in layers:
        names = [name for name in layer.reader.adapters(layer) if name in layer.active_adapters]
        method = "+".join(dict.fromkeys(layer.reader.method(layer, name) for name in names))
        for (path, reason), times in state_of(layer).calls.items():
            key = (_name_of(layer), "+".join(names), method, path, reason)
            counts[key] += 1
            calls[key] += times
    rows = tuple(Row(key[0], key[1], key[2], counts[key], key[3], key[4], calls[key]) for key in sorted(counts))
    route = state_of(layers[0]).settings.route
    return Report(rows, _versions(), _device_of(model), route, tuple(_notes(model, layers)))


def _notes(model: nn.Module, layers: list[Any]) -> Iterator[str]:
    """What a table of calls can't show: layers that got none, and layers that came too late."""
    idle = sum(not state_of(layer).calls for layer in layers)
    if idle == len(layers):
        yield "no calls yet: run the model first; calls inside of compiled graphs are not counted"
    elif idle:
        yield f"{idle} of {len(layers)} accelerated layers were not called, or only inside of compiled graphs"
    shared: Counter[str] = Counter()
    for one in {found for layer in layers if (found := group_of(layer)) is not None and found.shared}:
        shared[", ".join(one.together)] += one.shared
    for names, times in sorted(shared.items()):
        yield f"{names}: one pass over x for all, {times:,} times"
    unread = _unread(model)
    late = [m for m in _tuner_layers(model).values() if accelerated_class(m) is not None and id(m) not in unread]
    if late:
        yield f"{len(late)} PEFT layers came after accelerate; call it again to include them"


def _report(model: nn.Module, layers: dict[str, nn.Module], settings: Settings) -> Report:
    """What each adapter of each layer would do if it were called with what its weights suggest."""
    counts: Counter[tuple[str, str, str, str, str]] = Counter()
    unread = _unread(model)
    for layer in layers.values():
        for adapter, method, path, reason in _paths(layer, settings, called=id(layer) not in unread):
            counts[_name_of(layer), adapter, method, path, reason] += 1
    rows = (Row(*key[:3], count, *key[3:]) for key, count in sorted(counts.items()))
    return Report(tuple(rows), _versions(), _device_of(model), settings.route)


def _paths(layer: Any, settings: Settings, called: bool) -> Iterator[tuple[str, str, str, str]]:
    """Adapter, method, path and reason for each adapter of a layer."""
    if STATE not in layer.__dict__:
        why = f"no fused path for {_name_of(layer)}" if called else "nn.MultiheadAttention never calls it"
        for adapter in _adapters_of(layer):
            yield adapter, "", "original", why
        return
    for adapter in layer.reader.adapters(layer):
        method, reason = adapter_path(layer, adapter)
        if settings.route == "off":
            reason = "switched off"
        if "forward" in layer.__dict__:
            reason = "its forward was replaced on the instance, by a device hook perhaps"
        ours = base_is_ours(layer)
        if reason is None and not ours and layer.reader.needs_weight(layer, adapter):
            reason = f"depends on the base weight, but {_about_base(layer.base_layer)}"
        if reason:
            yield adapter, method, "original", reason
        else:
            yield adapter, method, "fused" if ours else "tail", "" if ours else _about_base(layer.base_layer)


def _about_base(linear: nn.Module) -> str:
    """What about a base layer keeps us from computing its product."""
    weight = getattr(linear, "weight", None)
    if type(linear) is not nn.Linear and not is_conv1d(linear):
        return f"the base layer is a {_name_of(linear)}"
    if isinstance(weight, torch.Tensor) and weight.requires_grad:
        return "the base weight is trained"
    return "the base layer has a hook, or a weight that is no whole matrix"


def _adapters_of(layer: Any) -> list[str]:
    """Names of the adapters in a PEFT layer of any kind."""
    found: dict[str, None] = {}
    for name in layer.adapter_layer_names:
        holder = getattr(layer, name, None)
        if isinstance(holder, nn.ModuleDict | nn.ParameterDict):
            found.update(dict.fromkeys(holder.keys()))
    return list(found)


def _name_of(layer: Any) -> str:
    """A layer's class, PEFT's if it is accelerated, and where that comes from: lora.Linear, bitsandbytes.Linear4bit."""
    cls = _peft_class(layer)
    return f"{cls.__module__.removeprefix('peft.tuners.').partition('.')[0]}.{cls.__name__}"


def _peft_class(layer: Any) -> type[nn.Module]:
    return type(layer).__mro__[2] if isinstance(layer, Accelerated) else type(layer)


def _versions() -> dict[str, str]:
    found = {name: _version(name) for name in ("lowrank-fused", "torch", "triton", "peft")}
    return {name: version for name, version in found.items() if version is not None}


@cache
def _version(name: str) -> str | None:
    """Of an installed package; reading and parsing its metadata takes milliseconds."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_of(model: nn.Module) -> str:
    devices = sorted({str(p.device) for p in model.parameters()})
    if any(d.startswith("cuda") for d in devices):
        return f"{torch.cuda.get_device_name()} ({', '.join(devices)})"
    return ", ".join(devices) or "no device"
