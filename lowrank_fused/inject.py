"""Put adapters on a model, take them off, merge, disable. Each of these finishes or changes nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import methods
from .adaptable import as_matrix, is_linear_like
from .config import AdapterConfig
from .errors import UnsupportedError
from .layers import LowRankLinear
from .methods import Site
from .target_modules import Target, find_targets, modules_to_save

__all__ = [
    "Injection",
    "adapted_layers",
    "disable",
    "inject",
    "injection_of",
    "merge",
    "remove",
    "unmerge",
    "unwrap",
]

_RECORD = "_lowrank_fused"


@dataclass
class Injection:
    """What `inject` did to a model, kept on it: enough to save the adapter and to undo everything.

    `originals` holds the values, on the host, of the base model's tensors that are trained with the adapter
    (biases, modules_to_save), `trained_before` the parameters that required gradients.
    """

    config: AdapterConfig
    paths: list[str]
    skipped: dict[str, str]
    saved_whole: list[str]
    trained_before: set[str]
    originals: dict[str, Tensor] = field(default_factory=dict)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def injection_of(model: nn.Module) -> Injection | None:
    """The record that `inject` left on a model, None without adapters."""
    return unwrap(model).__dict__.get(_RECORD)


def adapted_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Path -> layer, each layer once; ValueError if the model has none."""
    layers = {path: m for path, m in unwrap(model).named_modules() if isinstance(m, LowRankLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters; call lowrank_fused.inject(model, config) first")
    return layers


def inject(model: nn.Module, config: AdapterConfig | None = None, **settings: Any) -> nn.Module:
    """Put adapters of `config` on a model's linear layers, in place, and freeze everything else.

    Each target becomes a `LowRankLinear` that shares the linear's parameters under the same state_dict keys.
    A failure at any point leaves modules, weights and requires_grad as they were.

    Args:
        model: any nn.Module; not one that already carries adapters.
        config: an AdapterConfig, or its fields by name.

    Returns the same model. Raises ValueError where nothing matches or a value does not fit, UnsupportedError
    for a named layer that can't carry an adapter; warns about layers that "all-linear" had to skip.
    """
    if config is None:
        config = AdapterConfig(**settings)
    elif settings:
        raise TypeError(f"inject takes a config or its fields, got both: {', '.join(settings)}")
    return inject_with(model, config, LowRankLinear.from_linear)


def inject_with(model: nn.Module, config: AdapterConfig, make: Callable[..., LowRankLinear]) -> nn.Module:
    """`inject`, with each layer made by make(linear, config, path=, site=)."""
    model = unwrap(model)
    if is_linear_like(model):
        raise ValueError(
            "this is a linear layer, not a model that holds some; use LowRankLinear.from_linear(linear, …)"
        )
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise ValueError("this model already carries adapters; call lowrank_fused.remove(model) first")
    targets = find_targets(model, config)
    _warn_about(targets.skipped)
    paths, skipped = [t.paths[0] for t in targets.found], targets.head | targets.skipped
    saved_whole = modules_to_save(model, config)
    trained_before = {name for name, p in model.named_parameters() if p.requires_grad}
    record = Injection(config, paths, skipped, saved_whole, trained_before)
    layers: list[LowRankLinear] = []
    try:
        site = _first_site(paths, targets.found, config)
        for i, target in enumerate(targets.found):
            layers.append(_make(target, config, replace(site, index=i), make))
        for target, layer in zip(targets.found, layers, strict=True):
            _place(model, target.paths, layer)
        _freeze(model, layers, record)
    except BaseException:
        for target, layer in zip(targets.found, layers, strict=False):
            _place(model, target.paths, layer.original_linear())
        _require_grad(model, trained_before)
        raise
    model.__dict__[_RECORD] = record
    return model


def _first_site(paths: list[str], targets: list[Target], config: AdapterConfig) -> Site:
    shapes = [(m.shape[0], m.shape[1]) for m in (as_matrix(t.module) for t in targets)]
    ranks = [methods.resolve(config.method, config.rank_of(path))[0] for path in paths]
    return Site(0, paths, shapes, ranks, {})


def _make(target: Target, config: AdapterConfig, site: Site, make: Callable[..., LowRankLinear]) -> LowRankLinear:
    with _named(target.paths[0]):
        layer = make(target.module, config, path=target.paths[0], site=site)
        if layer.residual and target.tied_to:
            raise UnsupportedError(
                f"its weight is tied to {target.tied_to}, so no residual can replace it; use a start that "
                "leaves the weight alone, or exclude the layer"
            )
    layer.tied_to = target.tied_to
    layer.park_replaced()
    return layer


def _place(model: nn.Module, paths: list[str], module: nn.Module) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def _freeze(model: nn.Module, layers: list[LowRankLinear], record: Injection) -> None:
    """Leave gradients to the adapters and to what the config trains beside them, of which values are kept."""
    adapters = {id(getattr(layer, name)) for layer in layers for name in layer.trained_names}
    biases = {id(layer.bias) for layer in layers}
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias"
        trained = (
            any(name.startswith(f"{path}.") for path in record.saved_whole)
            or (record.config.bias == "all" and is_bias)
            or (record.config.bias == "lora_only" and id(parameter) in biases)
        )
        if trained:
            record.originals[name] = parameter.detach().to("cpu", copy=True)
        parameter.requires_grad_(trained or id(parameter) in adapters)
    for name, value in model.state_dict().items():
        if any(name.startswith(f"{path}.") for path in record.saved_whole):
            record.originals[name] = value.detach().to("cpu", copy=True)


def _require_grad(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _warn_about(skipped: dict[str, str]) -> None:
    if skipped:
        listed = "; ".join(f"{path}: {why}" for path, why in list(skipped.items())[:3])
        warnings.warn(f"linear layers without an adapter: {len(skipped)}, for example {listed}", stacklevel=4)


def remove(model: nn.Module) -> nn.Module:
    """Take the adapters off: the very modules that `inject` replaced come back, weights bit for bit.

    Trained biases and modules_to_save go back to their values before `inject`, requires_grad to what it was.
    To keep the result of training in plain linears instead, see `merge(model, unload=True)`. Returns the same
    model.
    """
    model = unwrap(model)
    adapted_layers(model)
    record = injection_of(model)
    if record is not None:
        _write(model, record.originals)
    _unload(model, LowRankLinear.original_linear)
    return model


def merge(model: nn.Module, *, unload: bool = False) -> nn.Module:
    """Put every adapter into its weight, in place: the forward is then the base model's own.

    The sums are formed in float32 or better and rounded once (`LowRankLinear.merge`); the weights as they
    were are kept on the host. If one layer can't be merged (a per-token gate, a tied weight, a result that is
    not finite), none is.

    Args:
        unload: put plain linear layers with the merged weights in the adapters' place, for good: nothing is
        kept to
            undo it.

    Returns the same model.
    """
    model = unwrap(model)
    done: list[LowRankLinear] = []
    try:
        for path, layer in adapted_layers(model).items():
            if not layer.merged:
                with _named(path):
                    layer.merge()
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if unload:
        _unload(model, LowRankLinear.keep_merged)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take the adapters out of the weights again: bit for bit what they were before `merge`."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    return model


@contextlib.contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """`with disable(model):` computes what the model computed before `inject`, biases and heads included.

    The result is the base model's own, except that a residual start (PiSSA, OLoRA) stands for the original
    layer only up to the rounding of its residual weight. Merged adapters are taken out and put back in.
    """
    model = unwrap(model)
    layers = adapted_layers(model).values()
    record = injection_of(model)
    merged = [layer for layer in layers if layer.merged]
    enabled = [layer for layer in layers if layer.enabled]
    trained: dict[str, Tensor] = {}
    try:
        for layer in merged:
            layer.unmerge()
        for layer in enabled:
            layer.enabled = False
        if record is not None:
            trained = _write(model, record.originals)
        yield model
    finally:
        _write(model, trained)
        for layer in enabled:
            layer.enabled = True
        for layer in merged:
            layer.merge()


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy values into the model's tensors of those names; returns what they held."""
    if not values:
        return {}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: tensors[name].detach().clone() for name in values}
    for name, value in values.items():
        tensors[name].copy_(value)
    return before


def _unload(model: nn.Module, linear_of: Callable[[LowRankLinear], nn.Module]) -> None:
    places = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRankLinear)]
    linears = {layer: linear_of(layer) for layer in dict.fromkeys(layer for _, layer in places)}
    for path, layer in places:
        _place(model, [path], linears[layer])
    record = model.__dict__.pop(_RECORD, None)
    if record is not None:
        _require_grad(model, record.trained_before)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Put the path of the layer in front of an error that comes out of it."""
    try:
        yield
    except (ValueError, TypeError, UnsupportedError) as error:
        error.args = (f"{path}: {error}",)
        raise
