"""VB-LoRA's bank: what a mixture is, when it is computed, and PEFT's files with only the top weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_fused as lf
from lowrank_fused.tools.tiny_models import logits, tiny_model

SETTINGS = {"method": "vblora", "num_vectors": 5, "vector_length": 4, "rank": 2}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 20))


def test_with_one_vector_each_the_factors_are_the_banks_vectors():
    layer = lf.inject(make_model(), **SETTINGS, topk=1)[0]
    bank = layer.vblora_vector_bank
    a, b = layer.generated
    assert a.shape == (2, 20) and b.shape == (12, 2)
    chosen = layer.vblora_logits_A.argmax(-1)
    for row in range(2):
        for part in range(5):
            assert torch.equal(a[row, 4 * part : 4 * part + 4], bank[chosen[row, part]])
    chosen = layer.vblora_logits_B.argmax(-1)
    for column in range(2):
        for part in range(3):
            assert torch.equal(b[4 * part : 4 * part + 4, column], bank[chosen[part, column]])


def test_the_mixture_weighs_by_a_softmax_over_the_largest():
    layer = lf.inject(make_model(), **SETTINGS)[0]
    with torch.no_grad():
        layer.vblora_logits_A[0, 0] = torch.tensor([0.0, 2.0, -1.0, 2.0 + torch.log(torch.tensor(3.0)), 1.9])
    bank = layer.vblora_vector_bank
    torch.testing.assert_close(layer.generated[0][0, :4], 0.25 * bank[1] + 0.75 * bank[3])


def test_all_layers_share_the_bank():
    model = lf.inject(make_model(), **SETTINGS)
    assert model[0].vblora_vector_bank is model[2].vblora_vector_bank
    assert lf.trainable_parameters(model).trainable == 5 * 4 + 2 * 5 * 2 * (5 + 3)


def test_factors_are_mixed_once_per_step():
    model = lf.inject(make_model(), **SETTINGS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        for _ in range(3):
            model(torch.randn(4, 20)).square().sum().backward()
        optimizer.step()
    assert [cache.evaluations for layer in (model[0], model[2]) for cache in layer.caches()] == [2, 2]


def test_pefts_files_with_only_the_top_weights_load_and_train_on(tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"num_vectors": 12, "vector_length": 16, "topk": 3, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model(tiny_model("llama"), peft.VBLoRAConfig(save_only_topk_weights=True, **settings))
    with torch.no_grad():
        theirs.base_model.vblora_vector_bank["default"].mul_(20)
        for name, logit in theirs.named_parameters():
            if "logits" in name:
                logit.mul_(20)
    theirs.eval().save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(key.endswith("_topk_weights") for key in keys) and not any(key.endswith("logits_A") for key in keys)
    ours = lf.load_adapter(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(ours) - logits(tiny_model("llama"))).abs().max() > 1e-3
    layer = ours.model.layers[0].self_attn.q_proj
    before = layer.vblora_logits_A.detach().clone()
    assert (before.isfinite().sum(-1) == 3).all()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.01)
    logits(ours).square().sum().backward()
    optimizer.step()
    after = layer.vblora_logits_A
    assert torch.equal(after.isfinite(), before.isfinite()) and not torch.equal(after, before)
    assert logits(ours).isfinite().all()
    lf.save_adapter(ours, tmp_path / "again")
    assert torch.equal(logits(lf.load_adapter(tiny_model("llama"), tmp_path / "again")), logits(ours))
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-4, atol=1e-5)


def test_a_length_that_does_not_divide_names_the_numbers():
    model = make_model()
    before = list(model)
    with pytest.raises(ValueError, match="0: vector_length must divide in_features = 20 and out_features = 12, got 8"):
        lf.inject(model, **{**SETTINGS, "vector_length": 8})
    assert list(model) == before
    with pytest.raises(ValueError, match="topk must be from 1 to num_vectors = 5, got 6"):
        lf.AdapterConfig(**SETTINGS, topk=6)
