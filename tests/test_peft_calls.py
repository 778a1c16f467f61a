"""Everything PEFT does with adapters, on an accelerated model and on a copy that is PEFT's alone: no difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fused as lf
from lowrank_fused.grouping import group_of
from lowrank_fused.peft.layers import Accelerated
from lowrank_fused.tools.tiny_models import logits, tiny_model
from lowrank_fused.tools.twins import Twins, move, same_state

peft = pytest.importorskip("peft")

FUSED = {"fused"}
TARGETS = ["q_proj", "v_proj", "down_proj"]

# Method -> architecture, PEFT's config class, its settings beside targets.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}),
    "lora-bias": ("gpt2", "LoraConfig", {"r": 4, "lora_bias": True, "use_rslora": True}),
    "dora": ("llama", "LoraConfig", {"r": 4, "use_dora": True}),
    "adalora": ("llama", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "lora_dropout": 0.2}),
    "vera": ("llama", "VeraConfig", {"r": 8, "vera_dropout": 0.2}),
    "vblora": ("llama", "VBLoRAConfig", {"r": 4, "num_vectors": 12, "vector_length": 16, "vblora_dropout": 0.2}),
    "unilora": ("llama", "UniLoraConfig", {"r": 4, "theta_d_length": 300, "unilora_dropout": 0.2}),
    "peanut": ("llama", "PeanutConfig", {"r": 4, "depth": 1}),
    "miss": ("llama", "MissConfig", {"r": 4, "miss_dropout": 0.2}),
    "tinylora": ("llama", "TinyLoraConfig", {"r": 2, "u": 8, "tinylora_dropout": 0.2}),
}
each_method = pytest.mark.parametrize("method", METHODS)


def lora(kind: str = "llama", **settings: Any) -> Any:
    on_gpt2 = {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "fan_in_fan_out": True} if kind == "gpt2" else {}
    return config_of("LoraConfig", **{"r": 4, "lora_alpha": 8, **on_gpt2, **settings})


def config_of(name: str, **settings: Any) -> Any:
    """A config of the installed PEFT."""
    if not hasattr(peft, name):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    known = getattr(peft, name).__dataclass_fields__
    if missing := settings.keys() - known.keys():
        pytest.skip(f"the {name} of PEFT {peft.__version__} has no {', '.join(sorted(missing))}")
    return getattr(peft, name)(**{"target_modules": TARGETS, **settings})


def config(method: str, **settings: Any) -> Any:
    kind, name, own = METHODS[method]
    return lora(kind, **own, **settings) if kind == "gpt2" else config_of(name, **own, **settings)


def adapted(adapter: Any, kind: str = "llama", **settings: Any) -> nn.Module:
    """A tiny model that wears a trained adapter."""
    model = peft.get_peft_model(tiny_model(kind), adapter, **settings)
    move(model)
    return model


def twins_of(method: str) -> Twins:
    return Twins(adapted(config(method), METHODS[method][0]))


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@each_method
def test_the_life_of_an_adapter(method):
    twins = twins_of(method)
    assert twins.report.of_path("fused") == twins.report.layers == 6
    assert twins.check() == FUSED
    for status in (peft.get_layer_status, peft.get_model_status):
        ours, theirs = twins.do(status)
        assert ours == theirs
    twins.each(lambda model: model.print_trainable_parameters())

    with twins.inside(lambda model: model.disable_adapter()):
        assert twins.check(trains=False) == {"original: adapters disabled"}
    assert twins.check() == FUSED
    twins.each(lambda model: model.merge_adapter())
    assert twins.check(trains=False) == {"original: adapters merged"}
    with twins.inside(lambda model: model.disable_adapter()):
        assert twins.check(trains=False) == {"original: adapters disabled"}
    assert twins.check() == FUSED
    twins.each(lambda model: model.unmerge_adapter())
    twins.each(lambda model: model.merge_adapter(safe_merge=True))
    twins.each(lambda model: model.unmerge_adapter())
    assert twins.check() == FUSED

    twins.replace(lambda model: model.merge_and_unload())
    assert twins.check(trains=False) == set()
    assert not any(isinstance(module, Accelerated) for module in twins.ours.modules())


@each_method
def test_a_second_adapter(method):
    only_one_trains = method == "adalora"
    if only_one_trains:
        twins_of(method).do(lambda model: model.add_adapter("other", config(method)), raises=ValueError)
    twins = twins_of(method)
    inference = {"inference_mode": True} if only_one_trains else {}
    twins.each(lambda model: model.add_adapter("other", config(method, **inference)))
    assert twins.check() == FUSED
    twins.each(lambda model: model.set_adapter("other"))
    twins.each(lambda model: move(model, seed=2))
    assert twins.check(trains=not only_one_trains) == FUSED
    twins.each(lambda model: model.base_model.set_adapter(["default", "other"]))
    several = {"original: several adapters, one of which depends on the weight"}
    assert twins.check(trains=not only_one_trains) == (several if method in ("dora", "peanut") else FUSED)
    twins.each(lambda model: model.delete_adapter("default"))
    assert twins.check(trains=not only_one_trains) == FUSED
    twins.do(lambda model: model.set_adapter("gone"), raises=ValueError)
    twins.replace(lambda model: model.unload())
    assert twins.check(trains=False) == set()


def test_an_adapter_on_new_layers_is_left_until_accelerate_is_called_again():
    twins = Twins(adapted(lora(target_modules=["q_proj"])))
    twins.each(lambda model: model.add_adapter("more", lora(target_modules=["q_proj", "up_proj"])))
    twins.each(lambda model: model.base_model.set_adapter(["default", "more"]))
    twins.each(lambda model: move(model, seed=3))
    assert twins.check() == FUSED
    assert "2 PEFT layers came after" in str(lf.explain(twins.ours))
    assert lf.accelerate(twins.ours, dropout="torch").of_path("fused") == 6
    assert twins.check() == FUSED
    assert lf.explain(twins.ours).notes == ()


def test_an_adapter_on_other_layers_alone():
    twins = Twins(adapted(lora(target_modules=["q_proj"])))
    twins.each(lambda model: model.add_adapter("other", lora(target_modules=["up_proj"])))
    lf.accelerate(twins.ours, dropout="torch")
    assert twins.check() == {"fused", "original: no active adapter in this layer"}
    twins.each(lambda model: model.set_adapter("other"))
    assert twins.check() == {"fused", "original: no active adapter in this layer"}


def test_deleting_the_last_adapter():
    twins = Twins(adapted(lora()), run=lambda model: logits(model.base_model.model))
    twins.each(lambda model: model.delete_adapter("default"))
    assert twins.check(trains=False) == {"original: no active adapter in this layer"}
    twins.each(lambda model: model.add_adapter("again", lora()))
    twins.each(lambda model: model.set_adapter("again"))
    assert twins.check() == FUSED


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_safe_merge_refuses_what_is_not_a_number(kind):
    twins = Twins(adapted(lora(kind), kind))
    before = {name: p.clone() for name, p in twins.ours.named_parameters()}

    def spoil(model: nn.Module) -> None:
        next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = torch.nan

    twins.each(spoil)
    twins.do(lambda model: model.merge_adapter(safe_merge=True), raises=ValueError)
    same_state(twins.ours, twins.peft)
    after = dict(twins.ours.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items() if "lora_" not in name)


def with_two(**second: Any) -> Twins:
    twins = Twins(adapted(lora()))
    twins.each(lambda model: model.add_adapter("second", lora(**second)))
    twins.each(lambda model: model.set_adapter("second"))
    twins.each(lambda model: move(model, seed=5))
    return twins


def test_merging_several_adapters_and_some_of_them():
    twins = with_two(r=2)
    twins.each(lambda model: model.base_model.set_adapter(["default", "second"]))
    twins.each(lambda model: model.merge_adapter(adapter_names=["second"]))
    assert twins.check(trains=False) == {"original: adapters merged"}
    twins.each(lambda model: model.set_adapter("default"))
    assert twins.check() == FUSED
    twins.replace(lambda model: model.merge_and_unload(adapter_names=["default", "second"], safe_merge=True))
    assert twins.check(trains=False) == set()


COMBINATIONS = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_add_weighted_adapter(combination):
    twins = with_two()
    density = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
    settings = dict(weights=[0.7, 0.4], adapter_name="mixed", combination_type=combination, **density)
    twins.each(lambda model: model.add_weighted_adapter(["default", "second"], **settings))
    twins.each(lambda model: model.set_adapter("mixed"))
    assert twins.check() == FUSED


SCALINGS: list[Callable[[Any], Any]] = [
    lambda layer: layer.scale_layer(0.5),
    lambda layer: layer.set_scale("default", 3),
    lambda layer: layer.scale_layer(0.25),
    lambda layer: layer.unscale_layer(2),
    lambda layer: layer.unscale_layer(),
    lambda layer: layer.set_scale("default", 0),
]


def test_layers_that_share_x_live_through_all_of_it():
    """q and v as one group, gate and up as another: as single layers where they differ, together again afterwards."""
    twins = Twins(adapted(lora(target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"])))
    groups = {id(group): group for module in twins.ours.modules() if (group := group_of(module)) is not None}.values()
    counts = []

    def check(trains: bool = True) -> bool:
        """Whether all groups shared x in the calls that were compared."""
        before = [group.shared for group in groups]
        twins.check(trains=trains)
        counts.append([group.shared - was for group, was in zip(groups, before, strict=True)])
        return all(counts[-1])

    assert len(groups) == 4 and check()
    twins.each(lambda model: model.merge_adapter())
    assert not check(trains=False)
    twins.each(lambda model: model.unmerge_adapter())
    assert check()
    with twins.inside(lambda model: model.disable_adapter()):
        assert not check(trains=False)
    twins.each(lambda model: model.add_adapter("other", lora(r=2, target_modules=["q_proj", "gate_proj", "up_proj"])))
    twins.each(lambda model: model.base_model.set_adapter(["default", "other"]))
    twins.each(lambda model: move(model, seed=3))
    assert not check() and sum(map(bool, counts[-1])) == 2, "v lacks an adapter that q has; gate and up have both"
    twins.each(lambda model: model.set_adapter("default"))
    twins.each(lambda model: lora_layers(model)[0].scale_layer(0.5))
    assert not check() and sum(map(bool, counts[-1])) == 3
    twins.each(lambda model: lora_layers(model)[0].unscale_layer())
    twins.each(lambda model: model.delete_adapter("other"))
    assert check()


def test_scaling():
    twins = Twins(adapted(lora()))
    for scale in SCALINGS:
        twins.each(lambda model, scale=scale: [scale(layer) for layer in lora_layers(model)])
        assert twins.check() == FUSED


def test_helpers():
    from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale

    twins = Twins(adapted(lora()))
    with twins.inside(lambda model: rescale_adapter_scale(model, 0.5)):
        assert twins.check() == FUSED
    assert twins.check() == FUSED
    with twins.inside(disable_input_dtype_casting):
        assert twins.check() == FUSED
        for layer in (*lora_layers(twins.ours), *lora_layers(twins.peft)):
            layer.lora_A.bfloat16()
            layer.lora_B.bfloat16()
        twins.do(logits, raises=RuntimeError)
        assert twins.calls()["original: the cast of the input is disabled"] == 1


def test_batches_of_several_adapters():
    twins = with_two(r=2)
    tokens = torch.randint(3, 64, (4, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)

    def mixed(names: list[str]) -> Callable[[Any], Tensor]:
        return lambda model: model(input_ids=tokens, adapter_names=names).logits

    names = ["default", "__base__", "second", "default"]
    twins.each(lambda model: model.eval())
    ours, theirs = twins.do(mixed(names))
    torch.testing.assert_close(ours, theirs)
    assert twins.calls() == {"original: called with adapter_names": 6}
    settings = dict(input_ids=tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for batch in ({"adapter_names": names}, {}):
        ours, theirs = twins.do(lambda model, batch=batch: model.generate(**settings, **batch))
        assert torch.equal(ours, theirs) and ours.shape == (4, 8)
    assert twins.check() == FUSED
    twins.do(mixed(names), raises=ValueError)
    twins.each(lambda model: model.eval())
    twins.do(mixed(["nobody"] * 4), raises=ValueError)
    twins.do(mixed(names[:2]), raises=ValueError)


@pytest.mark.parametrize("padded", [False, True], ids=["as it is", "padded for a compiled model"])
def test_hot_swap(padded, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    adapted(lora(r=6 if padded else 4, lora_alpha=30)).save_pretrained(tmp_path)
    twins = Twins(adapted(lora()))
    if padded:
        twins.each(lambda model: prepare_model_for_compiled_hotswap(model, target_rank=8))
    assert twins.check() == FUSED
    twins.each(lambda model: model.eval())
    with torch.no_grad():
        before = logits(twins.ours)
    twins.each(lambda model: hotswap_adapter(model, str(tmp_path), adapter_name="default"))
    assert isinstance(lora_layers(twins.ours)[0].scaling["default"], Tensor) == padded
    assert (logits(twins.ours) - before).abs().max() > 0.01
    assert twins.check() == FUSED
    twins.each(lambda model: model.merge_adapter())
    twins.each(lambda model: model.unmerge_adapter())
    assert twins.check() == FUSED


def files(folder: Path) -> dict[str, Any]:
    """What an adapter was saved as."""
    from safetensors.torch import load_file

    names = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".json", ".bin")]
    found = {
        str(p.relative_to(folder)): load_file(p) if p.suffix == ".safetensors" else json.loads(p.read_text())
        for p in names
    }
    found["adapter_config.json"]["target_modules"].sort()
    return found


@each_method
def test_saved_by_one_and_loaded_by_the_other(method, tmp_path):
    twins = twins_of(method)
    twins.ours.save_pretrained(tmp_path / "ours")
    twins.peft.save_pretrained(tmp_path / "peft")
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "peft")
    assert ours.keys() == theirs.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert ours["adapter_config.json"] == theirs["adapter_config.json"]
    tensors, others = ours["adapter_model.safetensors"], theirs["adapter_model.safetensors"]
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in others)

    expected = logits(twins.peft.eval())
    loaded = peft.PeftModel.from_pretrained(tiny_model(METHODS[method][0]), tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    fresh = twins_of(method)
    fresh.each(lambda model: [p.data.zero_() for p in model.parameters() if p.requires_grad])
    ours, theirs = fresh.do(lambda model: str(peft.set_peft_model_state_dict(model, others)))
    assert ours == theirs
    assert fresh.check() == FUSED
    torch.testing.assert_close(logits(fresh.ours.eval()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter(low_cpu_mem_usage, tmp_path):
    adapted(lora(r=6, lora_alpha=30)).save_pretrained(tmp_path)
    twins = Twins(adapted(lora()))
    twins.each(lambda model: model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage))
    assert twins.check() == FUSED
    twins.each(lambda model: model.set_adapter("loaded"))
    assert twins.check() == FUSED
    twins.do(lambda model: model.load_adapter(tmp_path / "nothing", "absent"), raises=ValueError)
    assert twins.check() == FUSED


# What a config may ask for beside rank and targets -> architecture, settings, paths that calls take.
CONFIGS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}, FUSED),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [1, 5]}, FUSED),
    "bias lora_only": ("roberta", {"bias": "lora_only", "target_modules": ["query", "dense"]}, FUSED),
    "bias all": ("roberta", {"bias": "all", "target_modules": ["query", "dense"]}, FUSED),
    "rank_pattern": ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}}, FUSED),
    "alpha_pattern": ("llama", {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1}}, FUSED),
    "exclude_modules": ("llama", {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, FUSED),
    "layers_to_transform": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}, FUSED),
    "layer_replication": ("llama", {"layer_replication": [[0, 2], [1, 2]]}, FUSED),
    "target_parameters": ("llama", {"target_parameters": ["mlp.up_proj.weight"]}, FUSED),
    "all-linear": ("llama", {"target_modules": "all-linear"}, FUSED),
    "a regular expression": ("llama", {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"}, FUSED),
    "use_rslora": ("llama", {"use_rslora": True}, FUSED),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, FUSED),
    "olora": ("llama", {"init_lora_weights": "olora"}, FUSED),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}, FUSED),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}, FUSED),
    "a dropout of all": ("llama", {"lora_dropout": 1.0}, {"original: a dropout that leaves nothing"}),
    "DoRA on Conv1D": ("gpt2", {"use_dora": True}, FUSED),
    "DoRA with dropout": (
        "llama",
        {"use_dora": True, "lora_dropout": 0.2},
        {"fused", "original: DoRA with dropout, which in PEFT acts on the input of the base weight too"},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, FUSED),
    "the head, tied to the embedding": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}, FUSED),
    "convolutions": ("vit", {"target_modules": ["projection", "q_proj", "query"]}, FUSED),
    "alora_invocation_tokens": (
        "llama",
        {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
        {"original: called with alora_offsets"},
    ),
    "velora_config": ("llama", {"velora_config": {}}, {"original: variant VeloraLinearVariant"}),
    "kasa_config": ("llama", {"kasa_config": {}}, {"original: variant KasaLinearVariant"}),
    "use_bdlora": (
        "llama",
        {"use_bdlora": {"target_modules_bd_a": TARGETS, "nblocks": 2}},
        {"original: variant BdLoraLinearVariant"},
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_what_a_config_may_ask_for(what):
    kind, settings, paths = CONFIGS[what]
    twins = Twins(adapted(lora(kind, **settings), kind))
    assert twins.check() == paths
    merges = twins.attempt(lambda model: model.merge_adapter())
    if merges and twins.attempt(lambda model: model.unmerge_adapter()):
        assert twins.check() == paths


def test_adapters_of_transformers_itself(tmp_path):
    """`add_adapter` and its kin on a model of transformers, without a PeftModel."""

    def plain() -> Any:
        model = tiny_model("llama")
        model.add_adapter(lora(), adapter_name="first")
        move(model)
        return model

    try:
        other = plain()
    except ValueError as error:  # transformers wants a newer PEFT for this
        pytest.skip(str(error))
    move(other, seed=9)
    other.save_pretrained(tmp_path)
    twins = Twins(plain())
    assert twins.report.of_path("fused") == 6 and twins.check() == FUSED
    twins.each(lambda model: model.disable_adapters())
    assert twins.check(trains=False) == {"original: adapters disabled"}
    twins.each(lambda model: model.enable_adapters())
    twins.each(lambda model: model.add_adapter(lora(r=2), adapter_name="second"))
    twins.each(lambda model: move(model, seed=3))
    assert twins.check() == FUSED
    twins.each(lambda model: model.set_adapter(["first", "second"]))
    assert twins.check() == FUSED
    assert twins.do(lambda model: model.active_adapters()) == (["first", "second"],) * 2
    twins.do(lambda model: model.add_adapter(lora(), adapter_name="first"), raises=ValueError)
    twins.each(lambda model: model.load_adapter(str(tmp_path), adapter_name="third"))
    twins.each(lambda model: model.set_adapter("third"))
    assert twins.check() == FUSED
    ours, theirs = twins.do(lambda model: model.get_adapter_state_dict("third"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    twins.each(lambda model: model.delete_adapter(["first", "second"]))
    assert twins.check() == FUSED
    twins.each(lambda model: model.save_pretrained(tmp_path / type(model).__name__))


class Tower(nn.Module):
    """No model of transformers: three linears, an embedding, and one linear used at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(self.embedding(tokens))))
        return self.head(torch.tanh(self.second(torch.relu(x))))


def run_tower(model: nn.Module) -> Tensor:
    return model(torch.arange(10).view(2, 5))


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


@pytest.mark.parametrize("name", ["LoraConfig", "AdaLoraConfig"])
def test_adapters_injected_into_any_module(name):
    extra = {"total_step": 10} if name == "AdaLoraConfig" else {}
    settings = getattr(peft, name)(target_modules=["first", "second", "head"], **extra)
    model = peft.inject_adapter_in_model(settings, tower())
    move(model)
    twins = Twins(model, run_tower)
    assert twins.report.layers == 3 and twins.check() == FUSED
    ours, theirs = twins.do(peft.get_peft_model_state_dict)
    assert ours.keys() == theirs.keys()
    twins.each(lambda model: str(peft.set_peft_model_state_dict(model, {k: v + 0.1 for k, v in theirs.items()})))
    assert twins.check() == FUSED


def test_a_module_used_at_two_places_and_registered_under_two_names():
    model = tower()
    model.again = model.second
    twins = Twins(peft.get_peft_model(model, lora(target_modules=["first", "second"])), run_tower)
    move(twins.ours), move(twins.peft)
    assert twins.report.layers == 2
    assert twins.check() == FUSED
    assert sum(row.calls for row in lf.explain(twins.ours).rows) == 2 * 3


def test_methods_mixed_in_one_model():
    model = peft.get_peft_model(tower(), peft.LoHaConfig(r=2, target_modules=["first", "second"]), "loha", mixed=True)
    model.add_adapter("lora", lora(target_modules=["second", "head"]))
    model.set_adapter(["loha", "lora"])
    move(model)
    twins = Twins(model, run_tower)
    assert twins.check() == {"fused", "original: adapters disabled"} or twins.check() >= FUSED
    with twins.inside(lambda model: model.disable_adapter()):
        twins.check(trains=False)
    twins.each(lambda model: model.set_adapter("lora"))
    twins.check()
    twins.each(lambda model: model.delete_adapter("loha"))
    twins.check()
    twins.replace(lambda model: model.merge_and_unload())
    twins.check(trains=False)


def test_parameters_that_are_targeted_without_a_module():
    twins = Twins(adapted(lora(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])))
    assert {row.layer: row.path for row in twins.report.rows} == {
        "lora.Linear": "fused",
        "lora.ParamWrapper": "original",
    }
    assert twins.check() == FUSED


def test_attention_that_never_calls_its_projection():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    model = peft.get_peft_model(Attends(), lora(target_modules=["attention", "linear"]))
    move(model)
    x = torch.randn(3, 2, 8)
    model.eval()
    twins = Twins(model, lambda model: model(x))
    reasons = {row.reason for row in twins.report.rows if row.path == "original"}
    assert reasons == {"nn.MultiheadAttention never calls it", "no fused path for lora.MultiheadAttention"}
    ours, theirs = twins.do(lambda model: model(x))
    torch.testing.assert_close(ours, theirs)
