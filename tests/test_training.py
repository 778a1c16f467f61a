"""Training small real architectures through the package gives the loss curve and the adapters that PEFT gives."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lowrank_fused as lf

STEPS, VOCABULARY = 20, 128


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


MODELS = {"llama": (llama, r".*_proj"), "bert": (bert, r".*encoder.*(query|key|value|dense)")}


def batches(name: str):
    g = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(0, VOCABULARY, (4, 12), generator=g)
        labels = ids if name == "llama" else ids[:, 0] % 2
        yield {"input_ids": ids, "labels": labels}


def train(model: nn.Module, name: str, dtype: torch.dtype) -> list[float]:
    """Loss of every step; bf16 trains under autocast, as PEFT users do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    losses = []
    for batch in batches(name):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_curve_and_adapters_are_pefts(name, dtype):
    build, targets = MODELS[name]
    torch.manual_seed(0)
    ours = build()
    theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    lf.inject(ours, lf.AdapterConfig(method="lora", r=8, alpha=16, target_modules=targets))
    layers = {path: m for path, m in ours.named_modules() if isinstance(m, lf.LowRankLinear)}
    twins = {path: theirs.get_submodule(f"base_model.model.{path}") for path in layers}
    assert len(layers) == (14 if name == "llama" else 12)
    with torch.no_grad():
        for path, layer in layers.items():
            layer.lora_A.copy_(twins[path].lora_A["default"].weight)

    expected, got = train(theirs, name, dtype), train(ours, name, dtype)
    assert expected[-1] < expected[0]
    # fp32 differs by the order of sums alone; bf16 by one rounding of the low-rank term a layer.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert max(abs(e - g) for e, g in zip(expected, got, strict=True)) < tolerance
    if dtype == torch.float32:
        for path, layer in layers.items():
            assert layer.lora_B.any()
            torch.testing.assert_close(layer.lora_A, twins[path].lora_A["default"].weight, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(layer.lora_B, twins[path].lora_B["default"].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", sorted(lf.methods.registry()))
def test_every_method_trains(method):
    """The loss of a small Llama on one repeated batch falls clearly, with dropout and checkpointing on."""
    torch.manual_seed(0)
    model = llama()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    options = {"vblora": {"vector_length": 16}}.get(method, {})  # one that divides this model's sizes
    config = lf.AdapterConfig(method=method, r=16, alpha=16, dropout=0.05, target_modules="all-linear", **options)
    lf.inject(model, config)
    batch = next(batches("llama"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
