"""A sentence classifier on a pretrained encoder with LoRA: by PEFT, by PEFT accelerated, by us; equal at the start."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import AdapterConfig, accelerate, group, inject
from .data import Batch

__all__ = [
    "ACCELERATED",
    "FUSED",
    "MODELS",
    "OURS",
    "PEFT",
    "SentimentModel",
    "adapted_models",
    "load_base",
    "load_tokenizer",
]

MODELS = PEFT, ACCELERATED, OURS = "eager PEFT", "accelerated PEFT", "native layers"
FUSED = (ACCELERATED, OURS)  # those that run on our engine
RANK, ALPHA = 8, 16


class SentimentModel(nn.Module):
    """Mean of the encoder's last hidden states over the real tokens, then a linear layer with two outputs.

    The mean is what this encoder was pretrained to make meaningful. The head stays in float32.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [batch, 2], float32."""
        states = self.encoder(**inputs).last_hidden_state.float()  # [batch, length, width]
        real = inputs["attention_mask"].unsqueeze(-1)
        return self.head((states * real).sum(1) / real.sum(1))

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy, a scalar."""
        return nn.functional.cross_entropy(self(batch.inputs), batch.labels)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_base(folder: Path, device: torch.device, dtype: torch.dtype) -> SentimentModel:
    """The pretrained encoder in `dtype` with a new head, whose values follow torch's seed."""
    from transformers import AutoModel

    with _quiet_transformers():
        encoder = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False, dtype=dtype)
    return SentimentModel(encoder).to(device)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar beside the demo's own, no report that the checkpoint's unused pooler was left out."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def linear_paths(encoder: nn.Module) -> list[str]:
    """Paths of all linears of the encoder, which all carry an adapter."""
    return [path for path, module in encoder.named_modules() if isinstance(module, nn.Linear)]


def adapted_models(base: SentimentModel, dropout: float) -> dict[str, SentimentModel]:
    """Copies of `base` with LoRA on every linear of the encoder: PEFT's as it ships, PEFT's accelerated, and ours.

    All start from PEFT's random A and from B = 0, so that they are the same function of the same parameters.
    """
    from peft import LoraConfig, get_peft_model

    models = {PEFT: copy.deepcopy(base), OURS: copy.deepcopy(base)}
    paths = linear_paths(base.encoder)
    theirs = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=paths)
    ours = AdapterConfig(method="lora", rank=RANK, alpha=ALPHA, dropout=dropout, target_modules=paths)
    with warnings.catch_warnings():
        # PEFT asks the encoder for an attribute that transformers is renaming.
        warnings.simplefilter("ignore", FutureWarning)
        models[PEFT].encoder = get_peft_model(models[PEFT].encoder, theirs)
    models[ACCELERATED] = copy.deepcopy(models[PEFT])
    accelerate(models[ACCELERATED])
    inject(models[OURS].encoder, ours)
    group(models[OURS])
    with torch.no_grad():
        for layer, peft_layer in zip(layers_with_adapter(models[OURS]), layers_with_adapter(models[PEFT]), strict=True):
            layer.lora_A.copy_(peft_layer.lora_A["default"].weight)
            layer.lora_B.copy_(peft_layer.lora_B["default"].weight)
    return {name: models[name] for name in MODELS}


def layers_with_adapter(model: SentimentModel) -> list[Any]:
    """The layers that carry an adapter, in the order of the model: PEFT's and ours alike have `lora_A`."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]
