"""Adapters on whole models: targets, freezing, merging, disabling, taking off, failing without a trace."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import lowrank_fused as lf
from lowrank_fused.target_modules import find_targets
from lowrank_fused.tools.tiny_models import TINY_MODELS, logits, tiny_model

each_model = pytest.mark.parametrize("kind", TINY_MODELS)
each_method = pytest.mark.parametrize(
    "settings",
    [{"method": "lora"}, {"method": "lora", "init_lora_weights": "pissa"}, {"method": "loldu"}],
    ids=["lora", "pissa", "loldu"],
)
# What "all-linear" reaches in the two layers (and outside), and the head that it leaves out.
ALL_LINEAR = {
    "llama": (14, {"lm_head"}),
    "roberta": (12, {"classifier.dense", "classifier.out_proj"}),
    "bert": (13, {"cls.predictions.decoder"}),
    "vit": (12, {"classifier"}),
    "gpt2": (8, {"lm_head"}),
}


def snapshot(model: nn.Module) -> dict:
    """Everything that must come back: module objects, values, objects and flags of the parameters."""
    return {
        "modules": dict(model.named_modules(remove_duplicate=False)),
        "parameters": dict(model.named_parameters(remove_duplicate=False)),
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": set(model.__dict__),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    now = snapshot(model)
    for part in ("modules", "parameters"):
        assert now[part].keys() == before[part].keys()
        assert all(now[part][key] is before[part][key] for key in before[part]), part
    assert now["values"].keys() == before["values"].keys()
    assert all(torch.equal(now["values"][key], before["values"][key]) for key in before["values"])
    assert now["grads"] == before["grads"] and now["attributes"] == before["attributes"]


def move(model: nn.Module, size: float = 0.05) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


@each_model
@each_method
def test_the_whole_round_on_real_architectures(kind, settings):
    model = tiny_model(kind)
    before, base = snapshot(model), logits(model)
    assert lf.inject(model, rank=4, alpha=8, dropout=0.05, target_modules="all-linear", **settings) is model
    assert set(before["values"]) <= set(model.state_dict())
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    move(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-4
    model.train()
    logits(model).square().sum().backward()
    layers = [m for m in model.modules() if isinstance(m, lf.LowRankLinear)]
    assert all(getattr(layer, name).grad.abs().max() > 0 for layer in layers for name in layer.trained_names)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.eval()
    lf.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    with lf.disable(model):
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    lf.unmerge(model)
    assert torch.equal(logits(model), adapted)
    assert lf.remove(model) is model
    assert_unchanged(model, before)
    assert torch.equal(logits(model), base)


@each_model
def test_all_linear_leaves_out_the_head_and_nothing_else(kind):
    model = tiny_model(kind)
    count, head = ALL_LINEAR[kind]
    targets = find_targets(model, lf.AdapterConfig())
    assert len(targets.found) == count and set(targets.head) == head and not targets.skipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lf.inject(model, rank=2)
    report = lf.trainable_parameters(model)
    assert set(report.skipped) == head and report.rows[0].layers == count


@each_model
def test_all_linear_is_what_peft_takes(kind):
    peft = pytest.importorskip("peft")
    ours = {t.paths[0] for t in find_targets(tiny_model(kind), lf.AdapterConfig()).found}
    task = {"task_type": "SEQ_CLS"} if kind in ("roberta", "vit") else {}
    theirs = peft.get_peft_model(tiny_model(kind), peft.LoraConfig(target_modules="all-linear", **task))
    names = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert ours == names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, 1),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, 2),
        ({"target_modules": r".*\.1\.mlp.*"}, 3),
        ({"exclude_modules": ["down_proj"]}, 12),
        ({"exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": ["q_proj"], "modules_to_save": ["layers.0"]}, 1),
        ({"target_modules": {"lm_head"}}, 1),
    ],
)
def test_targets_follow_pefts_rules(settings, expected):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    found = {t.paths[0] for t in find_targets(model, lf.AdapterConfig(**settings)).found}
    assert len(found) == expected
    if settings.get("target_modules") == r".*\.1\.mlp.*":
        return  # matches a container and an activation as well, at which PEFT stops
    wanted = {"target_modules": "all-linear", **settings}
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**wanted)).base_model.model
    assert found == {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def test_patterns_give_layers_their_own_rank_and_alpha():
    model = tiny_model("llama")
    patterns = {
        "rank_pattern": {"proj": 7, "layers.0.self_attn.q_proj": 2, "up_proj": 6},
        "alpha_pattern": {r"mlp\..*": 3},
    }
    lf.inject(model, rank=4, alpha=8, **patterns)
    first, second = model.model.layers
    assert [first.self_attn.q_proj.rank, second.self_attn.q_proj.rank, second.mlp.up_proj.rank] == [2, 4, 6]
    assert [first.self_attn.q_proj.scaling, second.self_attn.q_proj.scaling] == [4.0, 2.0]
    assert [first.mlp.up_proj.scaling, first.mlp.down_proj.scaling] == [0.5, 0.75]
    assert lf.trainable_parameters(model).rows[0].rank == "2-6"


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_and_heads_train_and_come_back(bias):
    model = tiny_model("roberta")
    before, base = snapshot(model), logits(model)
    lf.inject(model, rank=2, target_modules=["query"], bias=bias, modules_to_save=["classifier"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in before["parameters"] if n.startswith("classifier.")}
    expected = {
        "none": set(),
        "all": {n for n in before["parameters"] if n.endswith("bias")},
        "lora_only": {n for n in before["parameters"] if n.endswith("query.bias")},
    }[bias]
    assert {n for n in trained if "lora_" not in n} == expected | heads
    report = lf.trainable_parameters(model)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.rows[-1].kind == "base model"
    assert "base parameters train" in str(report) and report.to_dict()["trainable"] == report.trainable
    move(model)
    adapted = logits(model)
    with lf.disable(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    lf.remove(model)
    assert_unchanged(model, before)


def test_task_type_trains_the_head_as_peft_does():
    model = tiny_model("roberta")
    lf.inject(model, rank=2, target_modules=["query"], task_type="SEQ_CLS")
    assert lf.AdapterConfig(modules_to_save="classifier").modules_to_save == ("classifier",)
    assert model.classifier.dense.weight.requires_grad and model.classifier.out_proj.bias.requires_grad


def test_disable_restores_even_when_its_body_raises():
    model = lf.inject(tiny_model("llama"), rank=2)
    move(model)
    adapted = logits(model)
    lf.merge(model)
    with pytest.raises(KeyError), lf.disable(model):
        raise KeyError
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    lf.unmerge(model)
    assert torch.equal(logits(model), adapted)


def test_merge_and_unload_leaves_plain_linears_with_the_trained_weights():
    model = tiny_model("gpt2")
    kinds = {name: type(module) for name, module in model.named_modules()}
    lf.inject(model, rank=4)
    move(model)
    adapted = logits(model)
    lf.merge(model, unload=True)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="has no adapters"):
        lf.remove(model)
    lf.inject(model, rank=4)


def test_merge_is_all_or_nothing():
    model = lf.inject(tiny_model("llama").half(), rank=4)
    move(model)
    model.model.layers[1].mlp.down_proj.lora_B.data.fill_(1e5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: the merged weight would not be finite"):
        lf.merge(model)
    assert_unchanged(model, before)
    assert not any(m.merged for m in model.modules() if isinstance(m, lf.LowRankLinear))


@pytest.mark.parametrize("failing", [1, 5, 14])
@each_method
def test_an_inject_that_fails_half_way_leaves_no_trace(failing, settings, monkeypatch):
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before, made = snapshot(model), []
    make = lf.LowRankLinear.from_linear

    def sometimes(*args, **kwargs):
        made.append(args)
        if len(made) == failing:
            raise ValueError("out of luck")
        return make(*args, **kwargs)

    monkeypatch.setattr(lf.LowRankLinear, "from_linear", sometimes)
    with pytest.raises(ValueError, match="out of luck"):
        lf.inject(model, rank=4, modules_to_save=["lm_head"], **settings)
    assert len(made) == failing
    assert_unchanged(model, before)
    monkeypatch.undo()
    lf.inject(model, rank=4, **settings)
    lf.remove(model)
    assert_unchanged(model, before)


def test_an_inject_that_fails_while_placing_leaves_no_trace(monkeypatch):
    model = tiny_model("llama")
    before = snapshot(model)
    attention = type(model.model.layers[1].self_attn)
    place = attention.__setattr__

    def refuse(self, name, value):
        if name == "o_proj" and self is model.model.layers[1].self_attn and isinstance(value, lf.LowRankLinear):
            raise RuntimeError("read-only")
        place(self, name, value)

    monkeypatch.setattr(attention, "__setattr__", refuse)
    with pytest.raises(RuntimeError, match="read-only"):
        lf.inject(model, rank=4, init_lora_weights="olora")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_modules": ["q_porj"]}, ValueError, "matches no module; did you mean 'q_proj'"),
        ({"target_modules": ["proj"]}, ValueError, "matches no module"),
        ({"target_modules": "q_proj"}, ValueError, "regular expression for the whole path; give a list"),
        (
            {"target_modules": ["embed_tokens"]},
            lf.UnsupportedError,
            "model.embed_tokens: Embedding is neither",
        ),
        ({"target_modules": ["self_attn"]}, lf.UnsupportedError, "LlamaAttention is neither"),
        ({"target_modules": "q_proj("}, ValueError, "not a regular expression"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"modules_to_save": ["lm_haed"]}, ValueError, "has no 'lm_haed'; did you mean 'lm_head'"),
        ({"bias": "some"}, ValueError, "bias must be one of none, all, lora_only"),
        (
            {"method": "loldu", "rank": 40},
            ValueError,
            "model.layers.0.self_attn.q_proj: rank 40 is too large",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(settings, error, message):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        lf.inject(model, **settings)
    assert_unchanged(model, before)


def test_a_second_inject_and_a_bare_linear_are_refused():
    model = lf.inject(tiny_model("llama"), rank=2)
    with pytest.raises(ValueError, match="already carries adapters"):
        lf.inject(model, rank=2)
    with pytest.raises(ValueError, match=r"LowRankLinear.from_linear"):
        lf.inject(nn.Linear(4, 4))
    for call in (lf.remove, lf.merge, lf.unmerge, lf.trainable_parameters):
        with pytest.raises(ValueError, match="has no adapters"):
            call(tiny_model("llama"))


class Quantised(nn.Linear):
    """Stands for bitsandbytes' and others' subclasses of nn.Linear."""


def test_layers_that_cannot_carry_an_adapter_are_skipped_with_a_warning_or_refused_by_name():
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "packed": Quantised(4, 4)})
    with pytest.warns(UserWarning, match="linear layers without an adapter: 1, for example packed: Quantised"):
        lf.inject(model, rank=2)
    assert "packed" in lf.trainable_parameters(model).skipped
    lf.remove(model)
    with pytest.raises(lf.UnsupportedError, match="packed: Quantised"):
        lf.inject(model, rank=2, target_modules=["plain", "packed"])
    with pytest.raises(ValueError, match="no layer can carry an adapter; packed"):
        lf.inject(nn.ModuleDict({"packed": Quantised(4, 4)}), rank=2)


def test_layers_whose_weight_is_read_past_them_are_left_alone():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(block, nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="reads its weight instead of calling it|subclass"):
        lf.inject(model, rank=2)
    assert [type(m) for m in (block.linear1, block.linear2)] == [nn.Linear] * 2
    assert isinstance(model[1], lf.LowRankLinear)


def test_a_tied_weight_trains_but_is_neither_merged_nor_replaced():
    model = tiny_model("gpt2")
    before = snapshot(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(lf.UnsupportedError, match="lm_head: its weight is tied to transformer.wte.weight"):
        lf.inject(model, rank=2, target_modules=["c_fc", "lm_head"], init_lora_weights="pissa")
    assert_unchanged(model, before)
    base = logits(model)
    lf.inject(model, rank=2, target_modules=["c_fc", "lm_head"])
    move(model)
    assert model.lm_head.weight is model.transformer.wte.weight and (logits(model) - base).abs().max() > 1e-3
    with pytest.raises(lf.UnsupportedError, match="lm_head: the weight is tied to transformer.wte.weight"):
        lf.merge(model)
    assert not model.transformer.h[0].mlp.c_fc.merged
    lf.remove(model)
    assert_unchanged(model, before)


def test_one_linear_in_two_places_becomes_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    before = snapshot(model)
    lf.inject(model, rank=2)
    assert model["one"] is model["two"] and isinstance(model["one"], lf.LowRankLinear)
    move(model)
    adapted = model["two"](torch.ones(1, 4))
    lf.merge(model)
    torch.testing.assert_close(model["two"](torch.ones(1, 4)), adapted)
    lf.remove(model)
    assert_unchanged(model, before)
    lf.inject(model, rank=2)
    move(model)
    adapted = model["two"](torch.ones(1, 4))
    lf.merge(model, unload=True)
    torch.testing.assert_close(model["one"](torch.ones(1, 4)), adapted)


@each_method
def test_copies_of_an_adapted_model_stand_alone(settings):
    model = lf.inject(tiny_model("llama"), rank=4, modules_to_save=["lm_head"], **settings)
    move(model)
    adapted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), adapted)
        lf.remove(twin)
        assert torch.equal(logits(twin), logits(tiny_model("llama")))
        assert torch.equal(logits(model), adapted)


@each_method
def test_the_replaced_linears_hold_no_memory_on_the_device(settings):
    model = lf.inject(tiny_model("llama"), rank=4, **settings)
    for layer in (m for m in model.modules() if isinstance(m, lf.LowRankLinear)):
        left = [p for p in layer._replaced[0].parameters() if p.device.type != "cpu" or not layer.residual]
        assert not left


def test_wrapped_models_are_unwrapped():
    model = lf.inject(tiny_model("llama"), rank=2)
    compiled = torch.compile(model, backend="eager")
    assert lf.trainable_parameters(compiled).trainable == lf.trainable_parameters(model).trainable
    lf.remove(compiled)
    assert not any(isinstance(m, lf.LowRankLinear) for m in model.modules())


def test_reentrant_checkpointing_and_a_frozen_base_still_train():
    model = lf.inject(tiny_model("llama"), rank=2)
    move(model)
    model.train()
    logits(model).square().sum().backward()
    right = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        logits(model).square().sum().backward()
        for name, grad in right.items():
            torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_config_takes_aliases_and_gives_itself_back():
    config = lf.AdapterConfig(method="lora", rank=16, alpha=32, target_modules="all-linear", dropout=0.05)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert config == lf.AdapterConfig("lora", r=16, lora_alpha=32, lora_dropout=0.05)
    assert lf.AdapterConfig(**config.to_dict()) == config
    other = lf.AdapterConfig("loldu", rank=4, form="residual", target_modules=("a", "b"), modules_to_save=["c"])
    assert lf.AdapterConfig(**other.to_dict()) == other and other.options == {"form": "residual"}
    with pytest.raises(AttributeError):
        config.r = 4


@pytest.mark.gpu
@each_method
def test_on_a_gpu_everything_comes_back_and_originals_wait_on_the_host(settings):
    model = tiny_model("llama").cuda()
    before = snapshot(model)
    lf.inject(model, rank=4, **settings)
    layers = [m for m in model.modules() if isinstance(m, lf.LowRankLinear)]
    assert all(t.is_cuda for layer in layers for t in layer.state_dict().values())
    assert not any(p.is_cuda for layer in layers for p in layer._replaced[0].parameters())
    move(model)
    adapted = logits(model)
    lf.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)
    assert not any(layer._unmerged.is_cuda for layer in layers)
    lf.unmerge(model)
    torch.testing.assert_close(logits(model), adapted)
    lf.remove(model)
    assert_unchanged(model, before)
