"""Checkpoints of the methods that PEFT has beside LoRA, written by PEFT and read here, and the other way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_fused as lf
from lowrank_fused.tools.tiny_models import logits, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fan_in_fan_out.*", "ignore:Specified to not.*", "ignore:.*save_projection.*"
)

# Name of a case -> PEFT's config class, its settings, the same for ours. The layers of the tiny models are 32 x 32,
# 16 x 32, 48 x 32 and 32 x 48.
CASES = {
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "total_step": 9, "tinit": 1, "lora_alpha": 6},
        {"r": 4, "target_r": 2, "total_step": 9, "tinit": 1, "alpha": 6},
    ),
    "vera": (
        "VeraConfig",
        {"r": 8, "d_initial": 0.3, "vera_dropout": 0.1},
        {"r": 8, "d_initial": 0.3, "dropout": 0.1},
    ),
    "vera-unsaved": (
        "VeraConfig",
        {"r": 8, "save_projection": False, "projection_prng_key": 7},
        {"r": 8, "save_projection": False, "projection_prng_key": 7},
    ),
    "vblora": (
        "VBLoRAConfig",
        {"r": 3, "num_vectors": 12, "vector_length": 16},
        {"r": 3, "num_vectors": 12, "vector_length": 16},
    ),
    "tinylora": ("TinyLoraConfig", {"u": 5}, {"u": 5}),
    "tinylora-tied": (
        "TinyLoraConfig",
        {"r": 3, "u": 5, "weight_tying": 0.7, "init_weights": "uniform"},
        {"r": 3, "u": 5, "weight_tying": 0.7, "init_weights": "uniform"},
    ),
    "tinylora-unsaved": (
        "TinyLoraConfig",
        {"u": 5, "save_projection": False},
        {"u": 5, "save_projection": False},
    ),
    "miss": ("MissConfig", {"r": 5}, {"r": 5}),
    "miss-mini": (
        "MissConfig",
        {"r": 8, "init_weights": "mini", "mini_r": 4},
        {"r": 8, "init_weights": "mini", "mini_r": 4},
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def moved(model: nn.Module) -> nn.Module:
    """In eval mode, with what trains moved away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def theirs(case: str, kind: str = "llama", **more) -> nn.Module:
    config, settings, _ = CASES[case]
    chosen = {"target_modules": "all-linear", **settings, **more}
    return moved(peft.get_peft_model(tiny_model(kind), getattr(peft, config)(**chosen)))


def ours(case: str, kind: str = "llama", **more) -> nn.Module:
    method = case.partition("-")[0]
    return moved(lf.inject(tiny_model(kind), method=method, **{**CASES[case][2], **more}))


def same(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-4, atol=1e-5)


@each_case
def test_we_load_pefts_and_write_them_again(case, tmp_path):
    model = theirs(case)
    assert (logits(model) - logits(tiny_model("llama"))).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "theirs")
    loaded = lf.load_adapter(tiny_model("llama"), tmp_path / "theirs")
    same(loaded, model)
    lf.save_adapter(loaded, tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "again"))
    changed = {k: v for k, v in after.items() if k != "target_modules" and v != before.get(k) and (v or before.get(k))}
    assert changed == {}, "fields that changed on the way"
    assert sorted(before["target_modules"]) == after["target_modules"]


@each_case
@pytest.mark.parametrize("kind", ["llama", "roberta", "gpt2"])
def test_peft_loads_ours(case, kind, tmp_path):
    if kind == "gpt2" and case.startswith("miss"):
        pytest.skip("PEFT's MiSS does not know Conv1D")
    model = ours(case, kind)
    lf.save_adapter(model, tmp_path)
    same(peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path), model)


@each_case
def test_a_fresh_adapter_of_pefts_starts_like_ours(case, tmp_path):
    """Frozen tensors are the same without a file to carry them, since both make them from the same seed and weight."""
    config, settings, _ = CASES[case]
    fresh = peft.get_peft_model(tiny_model("llama"), getattr(peft, config)(target_modules="all-linear", **settings))
    tensors = fresh.state_dict() | dict(fresh.named_buffers(remove_duplicate=False))
    state = {key.replace(".default", ""): value for key, value in tensors.items()}
    mine = lf.inject(tiny_model("llama"), method=case.partition("-")[0], **CASES[case][2])
    compared = 0
    for path, layer in mine.named_modules():
        if isinstance(layer, lf.LowRankLinear):
            for name in layer.frozen_names:
                known = state.get(f"base_model.model.{path}.{name}")
                if known is not None:
                    assert torch.equal(getattr(layer, name), known), f"{path}.{name}"
                    compared += 1
    assert (compared > 0) == case.startswith(("vera", "tinylora"))


@each_case
def test_an_adapter_in_place_takes_the_values(case, tmp_path):
    model, other = ours(case), ours(case)
    lf.save_adapter(model, tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    assert not torch.equal(logits(other), logits(model))
    assert torch.equal(logits(lf.load_adapter(other, tmp_path)), logits(model))


@pytest.mark.parametrize("case", ["vera-unsaved", "tinylora-unsaved"])
def test_an_adapter_with_another_projection_is_refused(case, tmp_path):
    lf.save_adapter(ours(case), tmp_path)
    seed = {"vera-unsaved": {"projection_prng_key": 8}, "tinylora-unsaved": {"projection_seed": 8}}[case]
    other = ours(case, **seed)
    with pytest.raises(lf.CheckpointError, match="the files were written with"):
        lf.load_adapter(other, tmp_path)


@each_case
def test_biases_and_what_is_excluded_travel(case, tmp_path):
    layers = {"target_modules": ["query", "key", "value"], "exclude_modules": ["query"]}
    model = ours(case, "roberta", bias="lora_only", **layers)
    assert model.roberta.encoder.layer[0].attention.self.value.bias.requires_grad
    assert not model.roberta.encoder.layer[0].attention.self.query.bias.requires_grad
    lf.save_adapter(model, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(tiny_model("roberta"), tmp_path / "ours")
    assert not any(".query." in name and "lora" in name for name, _ in read.named_parameters())
    same(read, model)
    read.save_pretrained(tmp_path / "theirs")
    same(lf.load_adapter(tiny_model("roberta"), tmp_path / "theirs"), model)


@pytest.mark.parametrize("more", [{"alpha": 12}, {"rank_pattern": {"k_proj": 2}}, {"alpha_pattern": {"k_proj": 9}}])
@pytest.mark.parametrize("case", ["vera", "vblora", "tinylora", "miss"])
def test_what_peft_has_no_field_for_is_written_in_our_format(case, more, tmp_path):
    model = ours(case, **more)
    lf.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == f"LOWRANK_FUSED_{case.upper()}"
    assert torch.equal(logits(lf.load_adapter(tiny_model("llama"), tmp_path)), logits(model))


def test_large_seeds_are_no_obstacle():
    lf.AdapterConfig("vera", projection_prng_key=2**61 - 1)
    lf.AdapterConfig("adalora", rank=7, total_step=104_729, tinit=1_009, deltaT=997)
    lf.AdapterConfig("vblora", vector_length=96, num_vectors=2039)
