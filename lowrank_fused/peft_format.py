"""PeftFormat: how PEFT writes a method's adapter to disk, as far as it differs from how we do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SHARED", "PeftFormat"]

# What a key of a tensor starts with that belongs to the model rather than to one layer.
SHARED = "shared:"


@dataclass(frozen=True)
class PeftFormat:
    """Names in PEFT's adapter_config.json and adapter_model.safetensors.

    Args:
        peft_type: PEFT's name of the method.
        fields: our name of a field or option -> PEFT's, where they differ; None where PEFT has no such field.
        fixed: fields that are always written so, and that tell methods of one peft_type apart (`use_dora`).
        requires: options with the only values that PEFT has; with others the adapter is written in our format.
        written: option -> {our value: what is written for it}.
        read: field -> {PEFT's value: ours}.
        ignored: fields of PEFT's that do not change what a layer computes.
        keys: tensor of a layer -> key. "{path}" stands for the layer's path, other braces for constants of the layer; a
            key that begins with `SHARED` is the model's. A tensor that is not named has "{path}.<name>".
    """

    peft_type: str
    fields: Mapping[str, str | None] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    read: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)

    def key(self, path: str, name: str, constants: Mapping[str, Any]) -> str:
        """The key of a layer's tensor."""
        return self.keys.get(name, "{path}." + name).format(path=path, **constants)

    def describes(self, values: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this method."""
        return values.get("peft_type") == self.peft_type and all(
            (values.get(name) or False) == value for name, value in self.fixed.items()
        )

    def has(self, options: Mapping[str, Any]) -> bool:
        """Whether PEFT has the method with these options."""
        return all(options.get(name, value) == value for name, value in self.requires.items())
