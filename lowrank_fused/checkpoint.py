"""Save the adapters of a model to a folder and load them again, for what PEFT has in PEFT's own format, both ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import methods
from .adaptable import as_matrix
from .adapter_files import AdapterFiles, sha256
from .config import ALL_LINEAR, AdapterConfig
from .errors import CheckpointError, UnsupportedError
from .inject import Injection, adapted_layers, inject_with, injection_of, remove, unwrap
from .layers import LowRankLinear
from .methods import Site, Start
from .peft_format import PeftFormat
from .target_modules import matches

__all__ = ["load_adapter", "save_adapter"]

# What inject and the methods raise when a config does not fit a model.
_MISFITS = (ValueError, TypeError, UnsupportedError)


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, frozen: str = "save") -> None:
    """Write the adapters of a model to the folder `path`: adapter_config.json and adapter_model.safetensors.

    The files of a method that PEFT has are PEFT's, so that `PeftModel.from_pretrained` reads them. The others'
    have a `peft_type` that PEFT refuses. Trained biases and modules_to_save are in the file.

    Args:
        model: a model that went through `inject`.
        path: a folder, made if need be; an adapter in it is replaced.
        frozen: "save" writes a method's frozen matrices (LoLDU's factors) too, so that trained values never
            meet another basis. "hash" writes their SHA-256 instead: loading computes them from the base
            weight again and refuses if a single bit differs, as it may with another LAPACK, device or dtype.
            Frozen vectors are always written.
    """
    if frozen not in ("save", "hash"):
        raise ValueError(f"frozen must be 'save' or 'hash', got {frozen!r}")
    model = unwrap(model)
    layers, record = adapted_layers(model), injection_of(model)
    if record is None:
        raise ValueError("these layers were not put here by lowrank_fused.inject, so the config to save is not known")
    config = record.config.to_peft_dict(
        _target_names(model, record), fan_in_fan_out=all(layer.fan_in_fan_out for layer in layers.values())
    )
    config["modules_to_save"] = sorted(record.saved_whole) or None
    config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "name_or_path", None) or None
    files = AdapterFiles(Path(path), config, _tensors(model, layers, record), _starts(layers))
    if frozen == "hash":
        frozen_ids = {id(getattr(layer, name)) for layer in layers.values() for name in layer.frozen_names}
        matrices = [key for key, value in files.tensors.items() if id(value) in frozen_ids and value.dim() > 1]
        files.hashes = {key: sha256(files.tensors.pop(key)) for key in matrices}
    files.write()


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load an adapter that `save_adapter` or, for a method that it has, PEFT's `save_pretrained` wrote.

    A model without adapters gets them first, as `inject` would do, but without drawing or decomposing
    anything that the files hold. On a model with adapters the files must describe the same ones.

    Everything is checked before anything is written: another method, rank, shape or scale, a missing or
    unknown key, another basis or a damaged file raises CheckpointError and leaves the model as it was.
    Returns the same model, with its adapters trainable.
    """
    model = unwrap(model)
    files = AdapterFiles.read(Path(path))
    config = _without_absent_heads(files.adapter_config(), model)
    known = config.peft_format()
    if known is not None and known.unpack is not None:
        files.tensors = known.unpack(files.tensors, files.config)
    fresh = injection_of(model) is None
    try:
        if fresh:
            inject_with(model, config, _maker(files))
        layers, record = adapted_layers(model), injection_of(model)
        assert record is not None
        if not fresh:
            _check_same_adapters(config, layers)
        tensors = _tensors(model, layers, record)
        for alias in _aliases(model, tensors):
            files.tensors.pop(alias, None)
        _check_implied(files, tensors, layers)
        _write(files, tensors, _starts(layers), layers)
    except BaseException as error:
        if fresh and injection_of(model) is not None:
            remove(model)
        if isinstance(error, CheckpointError) or not isinstance(error, _MISFITS):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    return model


def _tensors(model: nn.Module, layers: dict[str, LowRankLinear], record: Injection) -> dict[str, Tensor]:
    """Key -> tensor of the model, each once: what the adapters are made of, and what trains beside them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    names = record.config.peft_format() or PeftFormat("")
    for path, layer in layers.items():
        for name in layer.saved_names:
            tensor = getattr(layer, name)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[names.key(path, name, layer.constants)] = tensor
    state = model.state_dict(keep_vars=True)
    for name in record.originals:
        path, _, leaf = name.rpartition(".")
        found[f"{path}.base_layer.{leaf}" if path in layers else name] = state[name]
    return found


def _aliases(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Further names of tied tensors, under which PEFT writes them again (BERT's decoder bias)."""
    known = {id(tensor) for tensor in tensors.values()}
    state = model.state_dict(keep_vars=True)
    return [name for name, tensor in state.items() if name not in tensors and id(tensor) in known]


def _starts(layers: dict[str, LowRankLinear]) -> dict[str, Tensor]:
    """Key -> starting value, for residual layers."""
    found: dict[str, Tensor] = {}
    for path, layer in layers.items():
        names = [f"start_{name}" for name in layer.trained_names] if layer.residual else []
        found.update({f"{path}.{name}": getattr(layer, name) for name in names})
    return found


def _target_names(model: nn.Module, record: Injection) -> str | Iterable[str]:
    """target_modules to write: as given; for "all-linear" the ends of the paths, if these say the same.

    Where PEFT has no field for what is excluded, all paths.
    """
    known = record.config.peft_format()
    if record.config.exclude_modules and known is not None and known.lacks("exclude_modules"):
        return record.paths
    if record.config.target_modules != ALL_LINEAR:
        return record.config.target_modules
    endings = {path.rpartition(".")[2] for path in record.paths}
    others = {path for path, _ in model.named_modules(remove_duplicate=False)} - set(record.paths)
    inside = tuple(f"{path}." for path in record.saved_whole)
    ambiguous = any(matches(endings, path) and not f"{path}.".startswith(inside) for path in others)
    return record.paths if ambiguous else endings


def _without_absent_heads(config: AdapterConfig, model: nn.Module) -> AdapterConfig:
    """PEFT lists "classifier" and "score" in modules_to_save, whichever the model has; keep those present."""
    if config.modules_to_save is None:
        return config
    paths = [path for path, _ in model.named_modules()]
    present = [name for name in config.modules_to_save if any(matches([name], path) for path in paths)]
    return AdapterConfig(**{**config.to_dict(), "modules_to_save": present or None})


def _start_of(config: AdapterConfig, path: str, weight: Tensor, site: Site) -> tuple[Start, int, float]:
    """Names, shapes and constants that a config gives the layer at a path, on the meta device."""
    rank, alpha = methods.resolve(config.method, config.rank_of(path), config.alpha_of(path))
    return methods.init(config.method, weight.to("meta"), rank, alpha, site, **config.options), rank, alpha


def _maker(files: AdapterFiles) -> Callable[..., LowRankLinear]:
    """How `inject_with` makes layers that are about to be loaded: zeros in the shapes of the method.

    What the files lack is computed instead: frozen matrices of which they hold the hash, those that a method
    does not save, and the residual of a start that PEFT wrote.
    """
    shared: dict[str, object] = {}
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the meta tensor, which is kept alive beside

    def real(meta: Tensor, device: torch.device) -> Tensor:
        if id(meta) not in made:
            zeros = torch.zeros_like(meta, device=device, requires_grad=False)
            leaf = nn.Parameter(zeros, meta.requires_grad) if isinstance(meta, nn.Parameter) else zeros
            made[id(meta)] = meta, leaf
        return made[id(meta)][1]

    def make(linear: nn.Module, config: AdapterConfig, path: str, site: Site) -> LowRankLinear:
        weight = as_matrix(linear)
        start, rank, alpha = _start_of(config, path, weight, replace(site, shared=shared))
        if files.hashes or start.unsaved or (start.residual and not files.starts):
            with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
                return LowRankLinear.from_linear(linear, config, path=path, site=site)
        for group in (start.parameters, start.frozen):
            group.update({name: real(value, weight.device) for name, value in group.items()})
        return LowRankLinear(linear, config, start, rank=rank, alpha=alpha)

    return make


def _check_same_adapters(config: AdapterConfig, layers: dict[str, LowRankLinear]) -> None:
    """Whether a config describes the adapters that are there; keys and shapes are compared later."""
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    site = Site(0, list(layers), shapes, [layer.rank for layer in layers.values()], {})
    for i, (path, layer) in enumerate(layers.items()):
        if layer.merged:
            raise CheckpointError("the model's adapters are merged; call lowrank_fused.unmerge(model) first")
        if layer.method.name != config.method:
            raise CheckpointError(f"the files hold {config.method!r}, the model has {layer.method.name!r} at {path}")
        start, rank, _ = _start_of(config, path, layer.matrix, replace(site, index=i))
        constants = {name: getattr(layer, name, None) for name in start.constants}
        theirs = {"rank": rank, "residual": start.residual, **start.constants}
        ours = {"rank": layer.rank, "residual": layer.residual, **constants}
        if theirs != ours:
            raise CheckpointError(f"{path}: the files were written with {theirs}, the model's layer has {ours}")


def _check_implied(files: AdapterFiles, tensors: dict[str, Tensor], layers: dict[str, LowRankLinear]) -> None:
    """Take out of the files what follows from their config, if it is what follows here; otherwise CheckpointError."""
    for path, layer in layers.items():
        implied = getattr(layer.method, "implied", None)
        if implied is None or files.tensors.keys() <= tensors.keys():
            return
        for name, ours in implied(layer, layer.matrix).items():
            theirs = files.tensors.pop(f"{path}.{name}", None)
            if theirs is None:
                continue
            # PEFT may have rounded a float to the dtype of its base weight, whatever it is written as.
            rounding = torch.finfo(torch.bfloat16).eps if theirs.is_floating_point() else 0.0
            ours = ours.to(theirs.device)
            if theirs.shape != ours.shape or not torch.allclose(theirs.double(), ours.double(), rounding, 0.0):
                raise CheckpointError(
                    f"{files.folder}: {path}.{name} is not what its config gives here: it was written for "
                    "another model, or with another version of the library that draws it"
                )


def _write(
    files: AdapterFiles,
    tensors: dict[str, Tensor],
    starts: dict[str, Tensor],
    layers: dict[str, LowRankLinear],
) -> None:
    """Check every key, shape and hash, then copy the values into the model's tensors."""
    if starts and not files.starts:
        _refuse_random_residual(files)
        starts = {}
    theirs, ours = files.tensors | files.starts, tensors | starts
    missing = sorted(ours.keys() - theirs.keys() - files.hashes.keys())
    unknown = sorted((theirs.keys() | files.hashes.keys()) - ours.keys())
    wrong = [
        f"{key} is {tuple(theirs[key].shape)} in the file and {tuple(value.shape)} in the model"
        for key, value in ours.items()
        if key in theirs and theirs[key].shape != value.shape
    ]
    wrong += [
        f"{key} is {theirs[key].dtype} in the file and {value.dtype} in the model"
        for key, value in ours.items()
        if key in theirs and theirs[key].is_floating_point() != value.is_floating_point()
    ]
    other_basis = [key for key, known in files.hashes.items() if key in ours and sha256(ours[key]) != known]
    problems = {
        "missing from the files": missing,
        "unknown to the model": unknown,
        "of another shape or kind": wrong,
        "not the basis that was trained in (another weight or LAPACK; save with frozen='save')": other_basis,
    }
    said = [f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys]
    if said:
        raise CheckpointError(f"{files.folder} does not fit this model; {'; '.join(said)}")
    before = {key: value.detach().clone() for key, value in ours.items()}
    try:
        _copy(theirs, ours, layers if starts else {})
    except BaseException:  # a residual that is not finite
        _copy(before, ours, layers if starts else {})
        raise


@torch.no_grad()
def _copy(values: dict[str, Tensor], to: dict[str, Tensor], residual: dict[str, LowRankLinear]) -> None:
    for key, value in values.items():
        to[key].copy_(value)
    for layer in residual.values():
        layer.rebase()


def _refuse_random_residual(files: AdapterFiles) -> None:
    start = str(files.config.get("init_lora_weights"))
    if "_niter_" in start:
        raise CheckpointError(
            f"{files.folder} was trained beside a residual weight from a randomised decomposition "
            f"({start}), which the files do not hold and nothing can rebuild; save it with lowrank_fused, or "
            "convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
