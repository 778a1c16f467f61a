"""Models by name, and the parameters that methods train in them."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

from lowrank_fused import AdapterConfig
from lowrank_fused.adaptable import as_matrix, is_linear_like
from lowrank_fused.methods import registry
from lowrank_fused.target_modules import find_targets
from lowrank_fused.tools.footprint import count_in_model, kept_per_token, method_facts
from lowrank_fused.tools.model_shapes import MODELS, build, linear_shapes, target_modules

MLP_TOO = "q_proj,k_proj,v_proj,up_proj,down_proj"
LORA_RANKS = (4, 8, 32, 64)
# model, targets, layers, LoRA's parameters at rank 4: 4 · Σ (in + out), {rank: LoLDU's: rank per layer}.
COUNTS = [
    ("roberta-base", "qv", 24, 147_456, {768: 18_432, 64: 1_536}),
    ("vit-b", "qv", 24, 147_456, {768: 18_432, 1: 24}),
    ("roberta-large", "qv", 48, 393_216, {256: 12_288}),
    ("vit-l", "qv", 48, 393_216, {256: 12_288}),
    ("llama2-7b", "qv", 64, 2_097_152, {256: 16_384, 1024: 65_536}),
    ("llama2-7b", MLP_TOO, 160, 7_012_352, {256: 40_960}),
    ("llama2-7b", "all", 224, 9_994_240, {256: 57_344}),
    ("llama2-13b", "all", 280, 15_646_720, {256: 71_680}),
    ("llama-3.1-8b", "all", 224, 10_485_760, {256: 57_344}),
    ("llama-3-8b", MLP_TOO, 160, 7_077_888, {256: 40_960}),
    ("llama-3.2-3b", "qv", 56, 1_146_880, {256: 14_336}),
    ("gemma-7b", "all", 196, 12_500_992, {256: 50_176}),
]
ROWS = [pytest.param(*row, id=f"{row[0]}-{row[1][:6]}") for row in COUNTS]


@pytest.mark.parametrize(("model", "targets", "layers", "at_rank_4", "_loldu"), ROWS)
def test_lora_counts(model: str, targets: str, layers: int, at_rank_4: int, _loldu: dict[int, int]) -> None:
    for rank in LORA_RANKS:
        count = count_in_model(model, "lora", targets, rank)
        assert (count.layers, count.trainable) == (layers, at_rank_4 * rank // 4)


@pytest.mark.parametrize(("model", "targets", "layers", "_lora", "by_rank"), ROWS)
def test_loldu_counts(model: str, targets: str, layers: int, _lora: int, by_rank: dict[int, int]) -> None:
    for rank, expected in by_rank.items():
        count = count_in_model(model, "loldu", targets, rank)
        assert (count.layers, count.trainable) == (layers, expected)


def test_loldu_counts_its_scale_when_that_trains() -> None:
    assert count_in_model("vit-b", "loldu", "qv", 768, train_sigma=True).trainable == 18_456


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("roberta-base", 124_054_272),
        ("gpt2", 124_439_808),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("gemma-7b", 8_537_680_896),
    ],
)
def test_models_have_their_published_size(model: str, parameters: int) -> None:
    assert sum(p.numel() for p in build(model).parameters()) == parameters


@pytest.mark.parametrize("model", MODELS)
def test_linears_are_those_that_all_linear_adapts(model: str) -> None:
    built = build(model)
    targets = find_targets(built, AdapterConfig(target_modules="all-linear")).found
    expected: Counter[tuple[str, int, int, bool]] = Counter()
    for target in targets:
        out_features, in_features = as_matrix(target.module).shape
        name = target.paths[0].rpartition(".")[2]
        expected[name, in_features, out_features, target.module.bias is not None] += 1
    assert {(s.name, s.in_features, s.out_features, s.bias): s.count for s in linear_shapes(built)} == expected
    heads = [name for name, module in built.named_modules() if is_linear_like(module) and name.endswith("lm_head")]
    assert sum(is_linear_like(module) for module in built.modules()) - len(targets) == len(heads)


def test_llama_3_8b_has_the_shapes_of_its_paper() -> None:
    found = {(s.name, s.in_features, s.out_features, s.count) for s in linear_shapes(build("llama-3-8b"))}
    assert found == {
        ("q_proj", 4096, 4096, 32),
        ("k_proj", 4096, 1024, 32),
        ("v_proj", 4096, 1024, 32),
        ("o_proj", 4096, 4096, 32),
        ("gate_proj", 4096, 14336, 32),
        ("up_proj", 4096, 14336, 32),
        ("down_proj", 14336, 4096, 32),
    }


def test_conv1d_counts_as_in_by_out() -> None:
    (c_attn,) = linear_shapes(build("gpt2"), ["c_attn"])
    assert (c_attn.in_features, c_attn.out_features, c_attn.count) == (768, 2304, 12)


def test_settings_override_the_config() -> None:
    model = build("llama-3-8b", num_hidden_layers=2)
    assert sum(shape.count for shape in linear_shapes(model)) == 14


def test_targets_as_typed() -> None:
    assert target_modules(nn.Module(), "all") == "all-linear"
    assert target_modules(nn.Module(), " k_proj, v_proj ,") == ["k_proj", "v_proj"]
    assert target_modules(build("roberta-base"), "qv") == ["query", "value"]
    assert target_modules(build("llama-3.2-3b"), "qv") == ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="no separate projections"):
        target_modules(build("gpt2"), "qv")


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'llama-3-8b'"):
        build("llama3-8b")
    with pytest.raises(ValueError, match="unknown method 'lara'.*did you mean 'lora'"):
        count_in_model("vit-b", "lara")
    with pytest.raises(ValueError, match="matches no module"):
        count_in_model("vit-b", "lora", "gate_proj")
    with pytest.raises(TypeError, match="use_rslora"):
        count_in_model("vit-b", "lora", use_rslorra=True)


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_method_has_facts(name: str) -> None:
    facts = method_facts(name)
    assert facts.name == name and facts.trained and facts.formula
    assert all(shape.startswith("[") for shape in facts.trained.values())


def test_kept_bytes_of_the_methods() -> None:
    assert kept_per_token("lora").at(4096, 4096, 16) == 2 * 4096 + 2 * 16
    assert kept_per_token("lora", dropout=0.1).at(4096, 4096, 16) == 8736
    assert kept_per_token("loldu").at(4096, 4096, 16) == 2 * 16
    assert str(kept_per_token("lora")) == "2·in + 2·r"
    assert str(kept_per_token("loldu")) == "2·r"


def test_facts_name_shapes() -> None:
    assert method_facts("lora").trained == {"lora_A": "[r, in]", "lora_B": "[out, r]"}
    assert method_facts("loldu").trained == {"loldu_z": "[r]"}
