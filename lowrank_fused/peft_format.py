"""PeftFormat: how PEFT writes a method's adapter to disk, as far as it differs from how we do."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["SHARED", "PeftFormat"]

# What a key of a tensor starts with that belongs to the model rather than to one layer.
SHARED = "shared:"


@dataclass(frozen=True)
class PeftFormat:
    """Names in PEFT's adapter_config.json and adapter_model.safetensors.

    Args:
        peft_type: PEFT's name of the method.
        fields: our name of a field or option -> PEFT's, where they differ; None where PEFT has no such field. What it
            has none for of patterns, alpha and trained biases is written in our format.
        fixed: fields that are always written so, and that tell methods of one peft_type apart (`use_dora`).
        requires: options with the only values that PEFT has; with others the adapter is written in our format.
        values: options of which PEFT has only these values; with others the adapter is written in our format.
        written: option -> {our value: what is written for it}.
        read: field -> {PEFT's value: ours}.
        ignored: fields of PEFT's that do not change what a layer computes.
        keys: tensor of a layer, or regular expression for several -> key. "{path}" stands for the layer's path, "{0}"
            for the expression's first group, other braces for constants of the layer; a key that begins with `SHARED`
            is the model's. A tensor that is not named has "{path}.<name>".
        unpack: (tensors of a file by key, values of its config) -> tensors as a layer holds them, where PEFT can write
            them in a shorter form.
    """

    peft_type: str
    fields: Mapping[str, str | None] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Collection[Any]] = field(default_factory=dict)
    written: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    read: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    unpack: Callable[[dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] | None = None

    def lacks(self, name: str) -> bool:
        """Whether PEFT has no such field."""
        return name in self.fields and self.fields[name] is None

    def key(self, path: str, name: str, constants: Mapping[str, Any]) -> str:
        """The key of a layer's tensor."""
        for pattern, template in self.keys.items():
            if match := re.fullmatch(pattern, name):
                return template.format(*match.groups(), path=path, **constants)
        return f"{path}.{name}"

    def describes(self, values: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this method."""
        return values.get("peft_type") == self.peft_type and all(
            (values.get(name) or False) == value for name, value in self.fixed.items()
        )

    def has(self, options: Mapping[str, Any]) -> bool:
        """Whether PEFT has the method with these options."""
        return all(options.get(name, value) == value for name, value in self.requires.items()) and all(
            options[name] in known for name, known in self.values.items() if name in options
        )
