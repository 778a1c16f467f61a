"""The files of a saved adapter: adapter_config.json beside adapter_model.safetensors, as PEFT writes them.

Keys in the tensor file are `base_model.model.<path>.<tensor>`, or `base_model.<tensor>` for what layers share.
Two things PEFT does not have: a residual
start (PiSSA, OLoRA) adds adapter_start.safetensors, the values that its residual weight is made from, which
PEFT does not read (it decomposes the weight again); and the config may hold SHA-256 hashes of frozen matrices
in the place of these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import AdapterConfig
from .errors import CheckpointError, UnsupportedError
from .peft_format import SHARED

__all__ = ["AdapterFiles", "sha256"]

_CONFIG, _TENSORS, _STARTS = "adapter_config.json", "adapter_model.safetensors", "adapter_start.safetensors"
_HASHES = "frozen_sha256"
_PREFIX, _SHARED_PREFIX = "base_model.model.", "base_model."


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor's elements, row by row."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@dataclass
class AdapterFiles:
    """The content of an adapter folder; keys are without PEFT's prefix."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    starts: dict[str, Tensor] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write the folder; each file appears whole or not at all, an earlier save is replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in ((_TENSORS, self.tensors), (_STARTS, self.starts)):
            if tensors or name == _TENSORS:
                plain = {_external(key): value.detach().cpu().contiguous() for key, value in tensors.items()}
                _replace(self.folder / name, partial(save_file, plain, metadata={"format": "pt"}))
            else:
                (self.folder / name).unlink(missing_ok=True)
        values = self.config | ({_HASHES: self.hashes} if self.hashes else {})
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        _replace(self.folder / _CONFIG, partial(Path.write_text, data=text, encoding="utf-8"))

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Read a folder; CheckpointError if a file is missing, damaged or cut short."""
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
            starts = load_file(folder / _STARTS) if (folder / _STARTS).exists() else {}
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} holds no adapter: {error}") from error
        except (ValueError, SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder}: a file is damaged or cut short: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder / _CONFIG} must hold a JSON object, got {type(config).__name__}")
        hashes = config.pop(_HASHES, {})
        return cls(folder, config, _plain(tensors), _plain(starts), hashes)

    def adapter_config(self) -> AdapterConfig:
        """The config as ours; CheckpointError if it asks for what is not known here."""
        try:
            return AdapterConfig.from_peft_dict(self.config)
        except (ValueError, TypeError, UnsupportedError) as error:
            raise CheckpointError(f"{self.folder / _CONFIG}: {error}") from error


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefix, which adapters of transformers' own add_adapter() lack from the start.

    With bias="all" PEFT writes the biases of modules_to_save again, under its wrapper's names: left out.
    """
    kept = {k: v for k, v in tensors.items() if ".modules_to_save." not in k and ".original_module." not in k}
    return {_internal(key): value for key, value in kept.items()}


def _external(key: str) -> str:
    if key.startswith(SHARED):
        return _SHARED_PREFIX + key.removeprefix(SHARED)
    return _PREFIX + key


def _internal(key: str) -> str:
    if key.startswith(_SHARED_PREFIX) and not key.startswith(_PREFIX):
        return SHARED + key.removeprefix(_SHARED_PREFIX)
    return key.removeprefix(_PREFIX)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the file, then move over it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
