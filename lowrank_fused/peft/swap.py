"""Accelerate a model that wears PEFT adapters, in place, and take it back."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import NotAcceleratedError, UnsupportedError
from ..registry import did_you_mean
from ..routes import ROUTES
from . import readers
from .layers import STATE, Accelerated, accelerated_class, adapter_path, base_is_ours, state_of
from .report import Report, Row
from .state import Settings, State

__all__ = ["accelerate", "accelerated", "explain", "restore"]

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
) -> Report:
    """Let a model's PEFT layers compute their adapters by our engine, in place; the numbers stay PEFT's.

        report = lf.accelerate(peft_model)
        print(report)

    Only the class of PEFT's layer objects changes. Parameters, state_dict, hooks, names and saved files stay, and so
    does everything PEFT does with adapters: add, delete, switch, disable, merge, scale, mixed batches. Whatever is
    unusual in a call goes to PEFT's own forward; `explain` counts why. Call it again after adding adapters to new
    layers; a second call is harmless otherwise, and changes the settings if it is given others.

    Args:
        model: a PeftModel, or any module that holds PEFT layers: wrapped in DDP or torch.compile, before or after.
        methods: the methods to accelerate, all by default; see `lowrank_fused.peft.readers`.
        strict: raise NotAcceleratedError, and change nothing, if a layer would be left to PEFT.
        route: "auto", one of `lowrank_fused.routes.ROUTES`, or "off"; the environment variable LOWRANK_FUSED_ROUTE
            overrides it.
        precision: of fp32 adapters in a 16-bit model outside of autocast, PEFT's default: "match" multiplies them in
            fp32 as PEFT does, "fast" in 16 bits.
        dropout: "fused" draws masks from torch's generator by our own counter: same rate, other bits. "torch" drops
            exactly the elements that PEFT would have, at the price of drawing them.

    Raises:
        ValueError: unknown methods, routes or settings, or a model without PEFT layers.
        UnsupportedError: PEFT older than 0.18.
    """
    settings = _settings(methods, route, precision, dropout)
    layers = _tuner_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no PEFT layers; wrap it with peft.get_peft_model first, or put our own "
            "layers into a plain model with lowrank_fused.inject"
        )
    before = [(layer, type(layer), layer.__dict__.get(STATE)) for layer in layers.values()]
    try:
        for path, layer in layers.items():
            _swap(layer, path, settings)
        report = _report(model, layers, settings)
        if strict and report.of_path("original"):
            left = "; ".join(
                f"{row.count} x {row.layer} ({row.adapter}): {row.reason}"
                for row in report.rows
                if row.path == "original"
            )
            raise NotAcceleratedError(f"strict=True, but some layers would be left to PEFT: {left}")
    except BaseException:
        for layer, cls, state in before:
            _put_back(layer, cls, state)
        raise
    _log.info(report.summary())
    return report


def _settings(methods: Sequence[str] | None, route: str, precision: str, dropout: str) -> Settings:
    route = os.environ.get(ENVIRONMENT, "") or route
    for name, value, allowed in (
        ("route", route, ("auto", "off", *ROUTES)),
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


def _swap(layer: nn.Module, path: str, settings: Settings) -> None:
    state = layer.__dict__.get(STATE)
    if isinstance(layer, Accelerated) and state is not None:
        state.settings = settings
        return
    cls = accelerated_class(layer)
    if cls is not None:
        layer.__dict__[STATE] = State(path, settings)
        layer.__class__ = cls


def _put_back(layer: nn.Module, cls: type[nn.Module], state: State | None) -> None:
    layer.__class__ = cls
    if state is None:
        layer.__dict__.pop(STATE, None)


def restore(model: nn.Module) -> nn.Module:
    """Give every layer its PEFT class back; returns the same model, which is as before `accelerate`."""
    for layer in model.modules():
        if isinstance(layer, Accelerated):
            _put_back(layer, type(layer).__mro__[2], None)
    return model


@contextlib.contextmanager
def accelerated(model: nn.Module, **settings: Any) -> Iterator[Report]:
    """`with accelerated(model):` is `accelerate` before and `restore` after, whatever happens in between."""
    report = accelerate(model, **settings)
    try:
        yield report
    finally:
        restore(model)


def explain(model: nn.Module) -> Report:
    """Which paths the calls since `accelerate` took and why; calls of compiled graphs are not counted.

    Raises ValueError for a model that is not accelerated.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Accelerated)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not accelerated; call lowrank_fused.accelerate(model) first")
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
    return Report(rows, _versions(), _device_of(model), state_of(layers[0]).settings.route)


def _report(model: nn.Module, layers: dict[str, nn.Module], settings: Settings) -> Report:
    """What each adapter of each layer would do if it were called with what its weights suggest."""
    counts: Counter[tuple[str, str, str, str, str]] = Counter()
    for layer in layers.values():
        for adapter, method, path, reason in _paths(layer, settings):
            counts[_name_of(layer), adapter, method, path, reason] += 1
    rows = (Row(*key[:3], count, *key[3:]) for key, count in sorted(counts.items()))
    return Report(tuple(rows), _versions(), _device_of(model), settings.route)


def _paths(layer: Any, settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """Adapter, method, path and reason for each adapter of a layer."""
    if STATE not in layer.__dict__:
        for adapter in _adapters_of(layer):
            yield adapter, "", "original", f"no fused path for {_name_of(layer)}"
        return
    for adapter in layer.reader.adapters(layer):
        method, reason = adapter_path(layer, adapter)
        if settings.route == "off":
            reason = "switched off"
        ours = base_is_ours(layer)
        if reason is None and not ours and layer.reader.needs_weight(layer, adapter):
            reason = f"depends on the weight of a {type(layer.base_layer).__name__}"
        if reason:
            yield adapter, method, "original", reason
        else:
            why = "" if ours else f"the base is a {type(layer.base_layer).__name__} that computes its own product"
            yield adapter, method, "fused" if ours else "tail", why


def _adapters_of(layer: Any) -> list[str]:
    """Names of the adapters in a PEFT layer of any kind."""
    found: dict[str, None] = {}
    for name in layer.adapter_layer_names:
        holder = getattr(layer, name, None)
        if isinstance(holder, nn.ModuleDict | nn.ParameterDict):
            found.update(dict.fromkeys(holder.keys()))
    return list(found)


def _name_of(layer: Any) -> str:
    """PEFT's class and the folder it is in: lora.Linear."""
    cls = type(layer).__mro__[2] if isinstance(layer, Accelerated) else type(layer)
    return f"{cls.__module__.removeprefix('peft.tuners.').partition('.')[0]}.{cls.__name__}"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("lowrank-fused", "torch", "triton", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _device_of(model: nn.Module) -> str:
    devices = sorted({str(p.device) for p in model.parameters()})
    if any(d.startswith("cuda") for d in devices):
        return f"{torch.cuda.get_device_name()} ({', '.join(devices)})"
    return ", ".join(devices) or "no device"
