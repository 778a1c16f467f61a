"""What PEFT's adapters keep for backward, and what they keep accelerated.

Bytes kept are those of the distinct storages that a forward pass saves, parameters and buffers of the model left out:
a tensor that several layers save is in memory once and counts once. What *adapters* keep is what the adapted model
keeps beyond the same frozen model in the same step, with a gradient that flows to its input as well. The norms, the
attention and the product in the MLP are then the base model's, and so is whatever an adapter saves that the base model
saves anyway: under SDPA the attention's result, which o_proj reads. The eager attention does not save it, so that an
accelerated o_proj has to.

PEFT is counted with the dropout that runs on a GPU, which keeps a byte an element; the one of the CPU keeps as much as
x. Bytes a token of two layers of 1024 with everything linear adapted, r = 16, dropout 0.1, in bf16. The ratio is the
same for any number of tokens, what the whole step keeps is compared for 32:

    attention  proportions  adapters      PEFT     ours    ratio   of the whole step
    sdpa       Llama 2      bf16         53824    21872    0.406         0.743
    sdpa       Llama 2      fp32         89856    22320    0.248         0.579
    sdpa       Llama 3      bf16         58816    25408    0.432         0.749
    sdpa       Llama 3      fp32         98176    25856    0.263         0.581
    eager      Llama 2      bf16         53824    25968    0.482         0.775
    eager      Llama 2      fp32         89856    26416    0.294         0.603
    eager      Llama 3      bf16         58816    29504    0.502         0.789
    eager      Llama 3      fp32         98176    29952    0.305         0.617
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fused as lf
from lowrank_fused.benchmark import kept_bytes
from lowrank_fused.peft import readers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, RANK, P = 1024, 2, 16, 0.1

# Width of the MLP and heads of keys and values beside 16 of queries.
PROPORTIONS = {"Llama 2": (2752, 16), "Llama 3": (3584, 4)}
LIMITS = {torch.bfloat16: 0.55, torch.float32: 0.35}


@pytest.fixture(autouse=True)
def dropout_as_on_a_gpu(monkeypatch):
    """nn.Dropout keeps a boolean mask, not one in x's dtype."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0]

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)


def llama(mlp: int, heads: int, attention: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=mlp, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=heads, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).train()


def adapted(model: nn.Module, config: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """PEFT's model with adapters in this dtype, and the same accelerated."""
    theirs = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=dtype == torch.float32).train()
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours)
    return theirs, ours


def kept(model: nn.Module, tokens: int) -> int:
    """Bytes that a step of a language model keeps."""
    x = torch.ones(2, tokens // 2, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(2, tokens // 2, dtype=torch.int64)
    return kept_bytes(lambda: model(inputs_embeds=x, labels=labels).loss, [*model.parameters(), *model.buffers()])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("proportions", PROPORTIONS)
def test_adapters_of_a_llama_keep_half_of_what_pefts_do(proportions, attention):
    mlp, heads = PROPORTIONS[proportions]
    base = llama(mlp, heads, attention)
    config = peft.LoraConfig(r=RANK, lora_dropout=P, target_modules="all-linear")
    # x of q, k and v, of gate and up, of down, and of o if nobody else keeps it; and a bit of mask for each layer's.
    inputs = 2 * WIDTH + mlp + (WIDTH if attention == "eager" else 0)
    bits = (6 * WIDTH + mlp) // 8
    for dtype, limit in LIMITS.items():
        theirs, ours = adapted(base, config, dtype)
        for tokens in (16, 32):
            frozen = kept(base, tokens)
            of_pefts, of_ours = kept(theirs, tokens) - frozen, kept(ours, tokens) - frozen
            assert of_ours == tokens * LAYERS * (2 * inputs + bits + 7 * RANK * dtype.itemsize)
            assert of_ours <= limit * of_pefts
        assert {row.path for row in lf.explain(ours).rows} == {"fused"}


# PEFT's config class and its settings for layers of 256 x 512.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 16, "total_step": 9, "lora_dropout": P}),
    "dora": ("LoraConfig", {"r": 16, "use_dora": True}),
    "lora": ("LoraConfig", {"r": 16, "lora_dropout": P}),
    "miss": ("MissConfig", {"r": 16, "miss_dropout": P}),
    "peanut": ("PeanutConfig", {"r": 16}),
    "tinylora": ("TinyLoraConfig", {"r": 16, "u": 8, "tinylora_dropout": P}),
    "unilora": ("UniLoraConfig", {"r": 16, "unilora_dropout": P}),
    "vblora": ("VBLoRAConfig", {"r": 16, "num_vectors": 16, "vector_length": 64, "vblora_dropout": P}),
    "vera": ("VeraConfig", {"r": 16, "vera_dropout": P}),
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("method", readers.methods())
def test_no_method_keeps_more_than_pefts(method, dtype):
    """Of what grows with the tokens: factors that are made once a step are not among it."""
    config, settings = METHODS[method]
    if not hasattr(peft, config):
        pytest.skip(f"PEFT {peft.__version__} has no {config}")
    model = nn.Sequential(nn.Linear(256, 512)).to(torch.bfloat16)
    models = adapted(model, getattr(peft, config)(target_modules=["0"], **settings), dtype)

    def a_token(model: nn.Module) -> float:
        few, many = (torch.ones(tokens, 256, dtype=torch.bfloat16, requires_grad=True) for tokens in (32, 64))
        known = [*model.parameters(), *model.buffers()]
        return (kept_bytes(lambda: model(many), known) - kept_bytes(lambda: model(few), known)) / 32

    theirs, ours = (a_token(model) for model in models)
    # PEFT's PEANuT keeps its update, of 512 x 256 elements, in the place of s.
    assert 0 < ours <= theirs + (16 * dtype.itemsize if method == "peanut" else 0)
    assert {row.path for row in lf.explain(models[1]).rows} == {"fused"}
