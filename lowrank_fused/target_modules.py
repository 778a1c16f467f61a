"""Which modules of a model a config means: PEFT's rules, with reasons for what is left out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from .adaptable import is_linear_like, why_not_adaptable
from .config import ALL_LINEAR, AdapterConfig
from .errors import UnsupportedError
from .registry import did_you_mean

__all__ = ["Target", "Targets", "find_targets", "matches", "modules_to_save"]

# Heads of transformers' task models, next to what get_output_embeddings() says.
_HEADS = ("score", "classifier", "qa_outputs")
# PEFT trains and saves these with the adapter for these task types.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class Target:
    """One linear module, all the paths under which the model holds it, and who else uses its weight."""

    module: nn.Module
    paths: list[str]
    tied_to: str | None = None


@dataclass
class Targets:
    """What will be adapted, in model order; what can't be, and the output head, each path with the reason."""

    found: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    head: dict[str, str] = field(default_factory=dict)


def matches(patterns: str | Iterable[str] | None, path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their ends."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in patterns)


def modules_to_save(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules that are trained whole; ValueError for a name that the model does not have."""
    names = config.modules_to_save
    if names is None:
        heads = _TASK_HEADS.get(config.task_type or "", ())
        return [path for path, _ in model.named_modules() if path in heads]
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if not any(matches([name], path) for path in paths):
            endings = {path.rpartition(".")[2] for path in paths}
            raise ValueError(f"modules_to_save: the model has no {name!r}; {did_you_mean(name, endings)}")
    return [path for path in paths if matches(names, path)]


def find_targets(model: nn.Module, config: AdapterConfig) -> Targets:
    """Resolve `target_modules` and `exclude_modules` on a model.

    With "all-linear", layers that can't carry an adapter and the output head are skipped with their reason. A
    layer that is named, or matched by a regular expression, and can't carry one raises UnsupportedError.
    Nothing found: ValueError.
    """
    everything = config.target_modules == ALL_LINEAR
    head = _head_paths(model) if everything else {}
    targets = Targets()
    refused: dict[str, str] = {}
    by_module: dict[int, Target] = {}
    for path, module in _candidates(model, config):
        if id(module) in by_module:
            by_module[id(module)].paths.append(path)
        elif path in head:
            targets.head[path] = head[path]
        elif reason := why_not_adaptable(module, model.get_submodule(path.rpartition(".")[0])):
            (targets.skipped if everything else refused)[path] = reason
        else:
            by_module[id(module)] = Target(module, [path])
    if refused:
        listed = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
        raise UnsupportedError(f"target_modules names layers that can't carry an adapter: {listed}")
    targets.found = list(by_module.values())
    if not targets.found:
        raise ValueError(_nothing_found(model, config, targets))
    _mark_ties(model, targets)
    return targets


def _candidates(model: nn.Module, config: AdapterConfig) -> Iterator[tuple[str, nn.Module]]:
    """What the names mean, under every path that holds it, before asking whether it can carry an adapter."""
    named = not isinstance(config.target_modules, str)
    kept_whole = modules_to_save(model, config)
    for path, module in model.named_modules(remove_duplicate=False):
        if config.target_modules != ALL_LINEAR and not matches(config.target_modules, path):
            continue
        if matches(config.exclude_modules, path) or _is_inside(path, kept_whole):
            continue
        # A regular expression often matches containers and activations too; a name means what it says.
        if named or is_linear_like(module):
            yield path, module


def _is_inside(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def _head_paths(model: nn.Module) -> dict[str, str]:
    """Path -> reason for the output head of a transformers model and everything in it."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    head = model.get_output_embeddings()
    heads = [head] if head is not None else [getattr(model, name, None) for name in _HEADS]
    inside = {id(module) for module in heads if module is not None for module in module.modules()}
    reason = "the output head, which 'all-linear' leaves out; name it, or put it into modules_to_save"
    return {path: reason for path, module in model.named_modules(remove_duplicate=False) if id(module) in inside}


def _mark_ties(model: nn.Module, targets: Targets) -> None:
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for target in targets.found:
        own = {f"{path}.weight" for path in target.paths}
        others = [name for name in users[id(target.module.weight)] if name not in own]
        target.tied_to = others[0] if others else None


def _nothing_found(model: nn.Module, config: AdapterConfig, targets: Targets) -> str:
    if targets.skipped:
        path, reason = next(iter(targets.skipped.items()))
        return f"no layer can carry an adapter; {path}, for example: {reason}"
    linears = {path.rpartition(".")[2] for path, module in model.named_modules() if is_linear_like(module)}
    if not linears:
        return f"{type(model).__name__} has no linear layers"
    if isinstance(config.target_modules, str):
        rule = "as a string it is a regular expression for the whole path; give a list to name endings"
        return f"target_modules={config.target_modules!r} matches no module; {rule}"
    wanted = config.target_modules[0]
    return f"target_modules={config.target_modules!r} matches no module; {did_you_mean(wanted, linears)}"
