"""AdapterConfig: what `inject` needs to know, under PEFT's field names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from . import methods
from .errors import UnsupportedError
from .peft_format import PeftFormat
from .registry import did_you_mean

__all__ = ["ALL_LINEAR", "AdapterConfig"]

ALL_LINEAR = "all-linear"
_ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_BIASES = ("none", "all", "lora_only")
# What our own format, for methods and options that PEFT does not have, puts before the method's name.
_OURS = "LOWRANK_FUSED_"
# Fields of PEFT's adapter_config.json that do not change what the layers compute.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "library",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
)


@dataclass(frozen=True, init=False)
class AdapterConfig:
    """Which method goes onto which linears, and how.

    Field names are PEFT's; `rank`, `alpha` and `dropout` are accepted for `r`, `lora_alpha` and
    `lora_dropout`. Options of the chosen method (`use_rslora=True`, `form="residual"`, …) are passed by name
    like fields and kept in `options`.

    Args:
        method: a name from `lowrank_fused.methods.registry()`.
        r: rank; None takes the method's default.
        lora_alpha: strength, the scale is usually alpha / r; None takes the method's default.
        lora_dropout: dropout probability on the low-rank input, 0 <= p < 1.
        target_modules: "all-linear", a regular expression for a module's whole path, or a list of paths or
            endings of paths ("q_proj", "layers.0.mlp.up_proj").
        exclude_modules: what not to adapt, as a list or a regular expression.
        rank_pattern, alpha_pattern: {end of a path, or regular expression for it: value}; first match wins.
        bias: which biases of the model train: "none", "all", or "lora_only" (those of adapted layers).
        modules_to_save: modules that are trained whole and saved with the adapter, a new head for example.
        task_type: PEFT's, kept for its loader; without modules_to_save "SEQ_CLS", "TOKEN_CLS" and
            "QUESTION_ANS" train the task's head, as in PEFT.
        autocast_adapter_dtype: keep trained parameters in float32 beside a 16-bit base weight, as PEFT does.

    Raises TypeError on an unknown field and ValueError on a value out of range.
    """

    method: str
    r: int | None
    lora_alpha: float | None
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    bias: str
    modules_to_save: tuple[str, ...] | None
    task_type: str | None
    autocast_adapter_dtype: bool
    options: dict[str, Any]

    def __init__(
        self,
        method: str = "lora",
        *,
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | Iterable[str] = ALL_LINEAR,
        exclude_modules: str | Iterable[str] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        bias: str = "none",
        modules_to_save: str | Iterable[str] | None = None,
        task_type: str | None = None,
        autocast_adapter_dtype: bool = True,
        **more: Any,
    ) -> None:
        given = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout or None}
        for alias in _ALIASES.keys() & more.keys():
            if given[_ALIASES[alias]] is not None:
                raise TypeError(f"AdapterConfig got {_ALIASES[alias]} and its alias {alias}; give one of them")
            given[_ALIASES[alias]] = more.pop(alias)
        whole = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
        values: dict[str, Any] = {
            **given,
            "method": method,
            "lora_dropout": given["lora_dropout"] or 0.0,
            "target_modules": ALL_LINEAR if _is_all_linear(target_modules) else _names(target_modules),
            "exclude_modules": _names(exclude_modules),
            "rank_pattern": dict(rank_pattern or {}),
            "alpha_pattern": dict(alpha_pattern or {}),
            "bias": bias,
            "modules_to_save": _names(whole),
            "task_type": task_type,
            "autocast_adapter_dtype": autocast_adapter_dtype,
            "options": more,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._validate()

    def _validate(self) -> None:
        known_options = methods.options(self.method)
        own = {f.name for f in fields(self)} - {"options"}
        for name in self.options:
            if name not in known_options:
                hint = did_you_mean(name, own | set(_ALIASES) | set(known_options))
                raise TypeError(f"AdapterConfig(method={self.method!r}) has no field {name!r}; {hint}")
        for where, rank in [("r", self.r), *self.rank_pattern.items()]:
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise ValueError(f"a rank must be a positive integer, got {rank!r} for {where!r}")
        for where, alpha in [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]:
            if alpha is not None and not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"alpha must be a positive number, got {alpha!r} for {where!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}")
        if self.bias not in _BIASES:
            raise ValueError(f"bias must be one of {', '.join(_BIASES)}, got {self.bias!r}")
        if not self.target_modules:
            raise ValueError("target_modules is empty; name modules, give a regular expression, or 'all-linear'")
        for field_name in ("target_modules", "exclude_modules"):
            self._check_pattern(field_name, getattr(self, field_name))
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            self._check_pattern("rank_pattern or alpha_pattern", pattern)
        # The method itself says what values its options take: ask it on a matrix without data, of a size that
        # whatever must divide a dimension does divide.
        rank, alpha = methods.resolve(self.method, self.r, self.lora_alpha)
        chosen = {**known_options, **self.options}
        numbers = [v for v in chosen.values() if isinstance(v, int) and not isinstance(v, bool) and v > 0]
        size = _common_multiple(rank, numbers)
        methods.init(self.method, torch.empty(size, size, device="meta"), rank, alpha, **self.options)

    @staticmethod
    def _check_pattern(where: str, pattern: Any) -> None:
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{where} is not a regular expression: {pattern!r} ({error})") from None

    def rank_of(self, path: str) -> int | None:
        """The rank of the layer at this path; None is the method's default."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float | None:
        """The alpha of the layer at this path; None is the method's default."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)

    def peft_format(self) -> PeftFormat | None:
        """How PEFT writes this adapter; None where it lacks the method, an option's value or a field in use."""
        known = methods.peft_format(self.method, self.options)
        in_use = {
            "rank_pattern": bool(self.rank_pattern),
            "alpha_pattern": bool(self.alpha_pattern),
            "bias": self.bias != "none",
            "lora_dropout": self.lora_dropout > 0,
            "lora_alpha": methods.resolve(self.method, self.r, self.lora_alpha) != methods.resolve(self.method, self.r),
        }
        return None if known is None or any(known.lacks(name) for name, used in in_use.items() if used) else known

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, options beside the fields: `AdapterConfig(**values)` gives it back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        lists = {name: list(value) for name, value in plain.items() if isinstance(value, tuple)}
        return {**plain, **lists, **self.options}

    def to_peft_dict(self, target_modules: str | Iterable[str], *, fan_in_fan_out: bool = False) -> dict[str, Any]:
        """The content of adapter_config.json, with `target_modules` as they resolved on the model.

        Where PEFT has the method with these options the names are PEFT's; otherwise they are ours beside a
        `peft_type` that PEFT refuses.
        """
        rank, alpha = methods.resolve(self.method, self.r, self.lora_alpha)
        known = self.peft_format()
        plain = {**self.to_dict(), **methods.options(self.method), **self.options}
        del plain["method"], plain["autocast_adapter_dtype"]
        plain |= {
            "r": rank,
            "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
            "inference_mode": True,
        }
        if known is None:  # an alpha that was not given stays so: it may be the rank of each layer
            return {**plain, "peft_type": _OURS + self.method.upper(), "library": "lowrank_fused"}
        plain |= {"lora_alpha": int(alpha) if alpha.is_integer() else alpha, "fan_in_fan_out": fan_in_fan_out}
        for name in known.requires:
            del plain[name]
        for name, values in known.written.items():
            plain[name] = values.get(plain[name], plain[name])
        for name, theirs in known.fields.items():
            value = plain.pop(name)
            if theirs is not None:
                plain[theirs] = value
        return {**plain, **known.fixed, "peft_type": known.peft_type}

    @classmethod
    def from_peft_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """The config of an adapter_config.json, PEFT's or ours.

        Raises UnsupportedError for what changes the computation and is not known here (layers_to_transform,
        …), ValueError for an unknown method.
        """
        method, known = _method_of(values)
        theirs = {their: our for our, their in known.fields.items() if their is not None}
        absent = {our for our, their in known.fields.items() if their is None}
        ours = {f.name for f in fields(cls)} - {"method", "options"} | set(methods.options(method))
        ours -= absent | set(known.fields) | set(known.requires)
        kept: dict[str, Any] = {}
        for name, value in values.items():
            our = theirs.get(name, name if name in ours else None)
            if our is not None:
                kept[our] = known.read.get(our, {}).get(value, value) if isinstance(value, (str, int)) else value
            elif name not in (*_WITHOUT_EFFECT, *known.ignored, *known.fixed) and value:
                raise UnsupportedError(
                    f"adapter_config.json asks for {name}={value!r}, which lowrank_fused does not have"
                )
        return cls(method, **known.requires, **kept)


def _method_of(values: Mapping[str, Any]) -> tuple[str, PeftFormat]:
    """The method of an adapter_config.json and the names that it is written with."""
    peft_type = str(values.get("peft_type", ""))
    if peft_type.startswith(_OURS):
        method = peft_type.removeprefix(_OURS).lower()
        methods.get(method)
        return method, PeftFormat(peft_type)
    for method in methods.registry():
        known = methods.peft_format(method)
        if known is not None and known.describes(values):
            return method, known
    methods.get(peft_type.lower())
    raise UnsupportedError(f"adapter_config.json describes a kind of {peft_type} that lowrank_fused does not have")


def _common_multiple(rank: int, numbers: Iterable[int]) -> int:
    """The least one, of the smallest numbers as long as a matrix of that size has a countable number of bytes.

    Numbers that have to divide a dimension are small; large ones are seeds and steps.
    """
    size = rank
    for number in sorted(numbers):
        multiple = math.lcm(size, number)
        size = multiple if multiple < 2**30 else size
    return size


def _is_all_linear(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == ALL_LINEAR


def _names(value: str | Iterable[str] | None) -> Any:
    """A string stays a string, anything else becomes a tuple of strings in a fixed order."""
    if value is None or isinstance(value, str):
        return value
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"module names must be strings, got {names!r}")
    return tuple(names)


def _first_match(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return otherwise
