"""Saving and loading adapters: PEFT's format both ways, LoLDU's basis, and files that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_fused as lf
from lowrank_fused.tools.tiny_models import TINY_MODELS, logits, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*pattern keys.*")

RESIDUAL = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"method": "loldu", "form": "residual"},
]
STARTS = [{}, {"init_lora_weights": "init_b"}, {"use_rslora": True}, {"method": "loldu"}, *RESIDUAL]
each_start = pytest.mark.parametrize("settings", STARTS, ids=str)


def move(model: nn.Module, size: float = 0.1) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model


def adapted(kind: str = "llama", **settings) -> nn.Module:
    return move(lf.inject(tiny_model(kind), **{"rank": 4, "alpha": 8, **settings}))


def state(model: nn.Module) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


@pytest.mark.parametrize("kind", TINY_MODELS)
@each_start
def test_a_model_without_adapters_gets_them(kind, settings, tmp_path):
    model = adapted(kind, **settings)
    lf.save_adapter(model, tmp_path / "adapter")
    other = lf.load_adapter(tiny_model(kind), tmp_path / "adapter")
    assert_same_state(other, state(model))
    assert torch.equal(logits(other), logits(model))
    grads = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert grads[0] == grads[1]
    lf.remove(other)
    assert torch.equal(logits(other), logits(tiny_model(kind)))


@each_start
def test_a_model_with_the_same_adapters_gets_the_values(settings, tmp_path):
    model = adapted(**settings)
    lf.save_adapter(model, tmp_path)
    other = move(adapted(**settings), 0.5)
    assert not torch.equal(logits(other), logits(model))
    assert lf.load_adapter(other, tmp_path) is other
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": "init_b", "dropout": 0.1},
        {
            "use_rslora": True,
            "rank_pattern": {"query": 2, "q_proj": 2, "c_fc": 2},
            "alpha_pattern": {"q_proj": 3},
        },
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_peft_loads_ours(kind, settings, tmp_path):
    model = adapted(kind, **settings)
    lf.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    ours, saved = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, save_theirs(theirs, tmp_path)))
    assert ours.keys() == saved.keys() and all(torch.equal(ours[key], saved[key]) for key in ours)


def save_theirs(model, folder):
    model.save_pretrained(folder / "theirs")
    return folder / "theirs"


@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian", "use_rslora": True},
        {"target_modules": "all-linear", "bias": "lora_only", "init_lora_weights": False},
        {"target_modules": "all-linear", "init_lora_weights": "pissa"},
        {"target_modules": "all-linear", "init_lora_weights": "orthogonal", "bias": "all"},
    ],
    ids=str,
)
def test_we_load_pefts(kind, settings, tmp_path):
    # Without a task PEFT adapts the two-class head as well, where a decomposition has no rank of 4.
    task = "SEQ_CLS" if kind in ("roberta", "vit") else None
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type=task, **settings)
    theirs = move(peft.get_peft_model(tiny_model(kind), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = lf.load_adapter(tiny_model(kind), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    lf.save_adapter(ours, tmp_path / "again")
    first, again = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(first[key], again[key]) for key in again)
    # With bias="all" PEFT writes tied biases twice, and those of the head under its wrapper's names as well.
    assert first.keys() == again.keys() or settings.get("bias") == "all"


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_heads_and_biases_travel_both_ways(bias, tmp_path):
    settings = {"target_modules": ["query", "value"], "bias": bias}
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, **settings)
    theirs = move(peft.get_peft_model(tiny_model("roberta"), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lf.load_adapter(tiny_model("roberta"), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-5, atol=1e-6)
    ours = adapted("roberta", modules_to_save=["classifier"], task_type="SEQ_CLS", **settings)
    lf.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_model("roberta"), tmp_path / "ours")
    assert isinstance(back, peft.PeftModelForSequenceClassification)
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-6)
    names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert names == {n for n, p in loaded.named_parameters() if p.requires_grad}


def test_adapters_of_transformers_own_mixin_load(tmp_path):
    theirs = tiny_model("llama")
    theirs.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    move(theirs).eval().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(lf.load_adapter(tiny_model("llama"), tmp_path)), logits(theirs))


def test_the_config_on_disk_is_pefts(tmp_path):
    model = adapted(dropout=0.05, init_lora_weights="init_b", exclude_modules=["o_proj"])
    lf.save_adapter(model, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.05)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert config.init_lora_weights is True and config.fan_in_fan_out is False
    lf.save_adapter(adapted("gpt2"), tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).fan_in_fan_out is True
    # "dense" also ends a path in RoBERTa's head, which "all-linear" leaves out: whole paths are written then.
    lf.save_adapter(adapted("roberta"), tmp_path)
    assert "roberta.encoder.layer.0.output.dense" in peft.PeftConfig.from_pretrained(tmp_path).target_modules


def test_a_randomised_residual_comes_back_through_its_saved_start(tmp_path):
    model = adapted(init_lora_weights="pissa_niter_2")
    lf.save_adapter(model, tmp_path)
    torch.manual_seed(99)
    assert torch.equal(logits(lf.load_adapter(tiny_model("llama"), tmp_path)), logits(model))
    (tmp_path / "adapter_start.safetensors").unlink()
    bare = tiny_model("llama")
    with pytest.raises(lf.CheckpointError, match="randomised decomposition .pissa_niter_2."):
        lf.load_adapter(bare, tmp_path)
    assert_same_state(bare, state(tiny_model("llama")))


def test_another_save_into_the_folder_leaves_nothing_behind(tmp_path):
    lf.save_adapter(adapted(init_lora_weights="pissa"), tmp_path)
    assert (tmp_path / "adapter_start.safetensors").exists()
    lf.save_adapter(adapted(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


# LoLDU's basis


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_saved_factors_do_not_depend_on_the_base_weight(form, tmp_path):
    model = adapted(method="loldu", form=form, init_method="uniform")
    lf.save_adapter(model, tmp_path)
    other = tiny_model("llama", seed=5)
    lf.load_adapter(other, tmp_path)
    ours, theirs = model.model.layers[0].mlp.up_proj, other.model.layers[0].mlp.up_proj
    assert torch.equal(ours.loldu_U, theirs.loldu_U) and torch.equal(ours.loldu_L, theirs.loldu_L)
    change = [m.loldu_L @ (m.loldu_z - m.loldu_z0).diag() @ m.loldu_U for m in (ours, theirs)]
    assert torch.equal(*change)


@pytest.mark.parametrize(
    "settings", [{}, {"form": "residual"}, {"init_method": "normal", "train_sigma": True}], ids=str
)
def test_hashed_factors_are_computed_again_and_verified(settings, tmp_path):
    model = adapted(method="loldu", **settings)
    lf.save_adapter(model, tmp_path / "whole")
    lf.save_adapter(model, tmp_path / "hashed", frozen="hash")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "hashed")]
    assert sizes[1] < sizes[0] / 2
    keys = load_file(tmp_path / "hashed" / "adapter_model.safetensors")
    assert not any(key.endswith(("loldu_L", "loldu_U")) for key in keys)
    torch.testing.assert_close(
        logits(lf.load_adapter(tiny_model("llama"), tmp_path / "hashed")), logits(model), rtol=1e-6, atol=1e-6
    )
    lf.load_adapter(model, tmp_path / "hashed")
    stranger = tiny_model("llama", seed=5)
    before = state(stranger)
    with pytest.raises(lf.CheckpointError, match="not the basis that was trained in"):
        lf.load_adapter(stranger, tmp_path / "hashed")
    assert_same_state(stranger, before)


def test_peft_refuses_what_it_does_not_have(tmp_path):
    lf.save_adapter(adapted(method="loldu"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["library"] == "lowrank_fused"
    with pytest.raises(Exception, match="LOLDU"):
        peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)


# Files that do not fit


def edit_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def cut(folder) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "missing key": (
        lambda f: edit_tensors(f, lambda t: t.pop(KEY)),
        "1 missing from the files: .*q_proj.lora_A.weight",
    ),
    "extra key": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY + "s": t[KEY].clone()})),
        "1 unknown to the model: .*weights",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].T.contiguous()})),
        r"q_proj.lora_A.weight is \(32, 4\) in the file and \(4, 32\) in the model",
    ),
    "wrong rank": (lambda f: edit_config(f, r=3), r"of another shape|written with"),
    "fewer targets": (lambda f: edit_config(f, target_modules=["q_proj"]), "unknown to the model"),
    "no such target": (
        lambda f: edit_config(f, target_modules=["query"]),
        "matches no module|missing|unknown",
    ),
    "cut short": (cut, "damaged or cut short"),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "damaged or cut short"),
    "no tensors": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "holds no adapter: .*adapter_model.safetensors",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter: .*adapter_config.json"),
    "no folder": (shutil.rmtree, "holds no adapter"),
    "broken json": (lambda f: (f / "adapter_config.json").write_text('{"r": '), "damaged or cut short"),
    "not an object": (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
    "unknown method": (lambda f: edit_config(f, peft_type="LOHA"), "unknown method 'loha'"),
    "qalora": (lambda f: edit_config(f, use_qalora=True), "asks for use_qalora=True"),
    "some layers": (lambda f: edit_config(f, layers_to_transform=[0]), "asks for layers_to_transform"),
    "bad value": (lambda f: edit_config(f, lora_alpha=-1), "alpha must be a positive number"),
    "unknown start": (
        lambda f: edit_config(f, init_lora_weights="corda"),
        "unknown init_lora_weights 'corda'",
    ),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["without adapters", "with adapters"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_fit_are_refused_and_change_nothing(damage, fresh, tmp_path):
    spoil, message = DAMAGE[damage]
    lf.save_adapter(adapted(), tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    model = tiny_model("llama") if fresh else move(adapted(), 0.5)
    if not fresh and damage in ("fewer targets", "no such target"):
        return  # with adapters the targets come from the model, and the keys must agree anyway
    before, modules = state(model), dict(model.named_modules())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(lf.CheckpointError, match=message):
        lf.load_adapter(model, tmp_path / "adapter")
    assert_same_state(model, before)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_pivots_that_are_not_integers_are_refused(tmp_path):
    model = adapted(method="loldu")
    lf.save_adapter(model, tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.loldu_pivots"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key].float()}))
    with pytest.raises(lf.CheckpointError, match="loldu_pivots is torch.float32 in the file and torch.int32"):
        lf.load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "loldu"}, "the files hold 'lora', the model has 'loldu'"),
        ({"rank": 3}, "written with .*'rank': 4.* has .*'rank': 3"),
        ({"alpha": 4}, "'scaling': 2.0.*'scaling': 1.0"),
        ({"init_lora_weights": "pissa"}, "'residual': False.*'residual': True"),
        ({"target_modules": ["q_proj"]}, "unknown to the model"),
        ({"modules_to_save": ["norm"]}, "missing from the files: model.norm.weight"),
    ],
)
def test_other_adapters_in_the_model_are_refused(settings, message, tmp_path):
    lf.save_adapter(adapted(), tmp_path)
    model = adapted(**settings)
    before = state(model)
    with pytest.raises(lf.CheckpointError, match=message):
        lf.load_adapter(model, tmp_path)
    assert_same_state(model, before)


def test_merged_adapters_are_refused(tmp_path):
    model = adapted()
    lf.save_adapter(model, tmp_path)
    lf.merge(model)
    before = state(model)
    with pytest.raises(lf.CheckpointError, match="merged"):
        lf.load_adapter(model, tmp_path)
    assert_same_state(model, before)


def test_a_merged_model_saves_the_adapter_that_was_merged(tmp_path):
    model = adapted()
    y = logits(model)
    lf.merge(model)
    lf.save_adapter(model, tmp_path)
    assert torch.equal(logits(lf.load_adapter(tiny_model("llama"), tmp_path)), y)


def test_start_values_that_make_no_finite_residual_are_taken_back(tmp_path):
    model = adapted(init_lora_weights="pissa")
    lf.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_start.safetensors"
    save_file({key: torch.full_like(value, 1e30) for key, value in load_file(file).items()}, file)
    for other in (move(model), tiny_model("llama")):
        before = state(other)
        with pytest.raises(lf.CheckpointError, match="residual weight of the starting values"):
            lf.load_adapter(other, tmp_path)
        assert_same_state(other, before)


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = adapted()
    lf.save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    move(model)

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("lowrank_fused.adapter_files.save_file", full)
    with pytest.raises(OSError, match="no space"):
        lf.save_adapter(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_layers_that_were_placed_by_hand_have_no_config_to_save(tmp_path):
    model = nn.Sequential(lf.LowRankLinear.from_linear(nn.Linear(4, 4), rank=2))
    with pytest.raises(ValueError, match="not put here by .*inject"):
        lf.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="frozen must be"):
        lf.save_adapter(adapted(), tmp_path, frozen="never")
