"""What PEFT's documentation shows people to do, done on accelerated models beside copies that are PEFT's alone."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf
from lowrank_fused.tools.tiny_models import logits, tiny_model
from lowrank_fused.tools.twins import Twins, move, same_state

peft = pytest.importorskip("peft")

FUSED = {"fused"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def needed(*names: str) -> list[Any]:
    """Things of PEFT by dotted name below the package; a PEFT that lacks one skips the test."""
    found = []
    for name in names:
        module, _, attribute = f"peft.{name}".rpartition(".")
        found.append(getattr(pytest.importorskip(module), attribute, None))
        if found[-1] is None:
            pytest.skip(f"PEFT {peft.__version__} has no {name}")
    return found


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


def wearing(config: Any, **settings: Any) -> nn.Module:
    model = peft.get_peft_model(tiny_model("llama"), config, **settings)
    move(model)
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: int = 4, after: Callable[[int], Any] | None = None
) -> None:
    model.train()
    for step in range(steps):
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        if after is not None:
            after(step)
        optimizer.zero_grad()


def eva(tmp_path: Path) -> None:
    EvaConfig, initialize = needed("EvaConfig", "tuners.lora.eva.initialize_lora_eva_weights")
    twins = Twins(wearing(lora(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))))
    data = [{"input_ids": tokens(i), "attention_mask": torch.ones(2, 9, dtype=torch.long)} for i in range(8)]
    twins.each(lambda model: initialize(model, data, show_progress_bar=False))
    assert twins.check() == FUSED


def pissa_saved_as_lora(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model("llama"), lora(init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    twins = Twins(model)
    twins.each(move)
    assert twins.check() == FUSED
    start = str(tmp_path / "start")
    for name, one in (("ours", twins.ours), ("peft", twins.peft)):
        one.save_pretrained(tmp_path / name, path_initial_model_for_weight_conversion=start)
    loaded = [peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name) for name in ("ours", "peft")]
    same_state(*loaded)
    lf.accelerate(loaded[0])
    torch.testing.assert_close(logits(loaded[0]), logits(twins.peft.eval()), rtol=1e-3, atol=1e-4)


def lora_fa(tmp_path: Path) -> None:
    (create,) = needed("optimizers.create_lorafa_optimizer")
    twins = Twins(wearing(lora()))
    twins.each(lambda model: train(model, create(model=model, r=4, lora_alpha=8, lr=1e-3)))
    assert twins.check() == FUSED


def lora_plus(tmp_path: Path) -> None:
    (create,) = needed("optimizers.create_loraplus_optimizer")
    twins = Twins(wearing(lora()))
    settings = dict(optimizer_cls=torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    twins.each(lambda model: train(model, create(model=model, **settings)))
    assert twins.check() == FUSED


def adalora_schedule(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=6, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, target_modules=TARGETS)
    twins = Twins(wearing(config))

    def run(model: Any) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        train(model, optimizer, steps=6, after=model.base_model.update_and_allocate)

    twins.each(run)
    pruned = sum(int((p == 0).sum()) for name, p in twins.ours.named_parameters() if "lora_E" in name)
    assert pruned > 0
    assert twins.check() <= {"fused", "original: every triplet is pruned"}
    assert "fused" in twins.calls()


def arrow(tmp_path: Path) -> None:
    ArrowConfig, create = needed("ArrowConfig", "tuners.lora.create_arrow_model")
    paths = [str(tmp_path / name) for name in ("one", "two")]
    for seed, path in enumerate(paths):
        model = peft.get_peft_model(tiny_model("llama"), lora())
        move(model, seed=seed)
        model.save_pretrained(path)
    twins = Twins(create(tiny_model("llama"), paths, ArrowConfig(top_k=1)))
    assert twins.check(trains=False) == {"original: variant ArrowLinearVariant"}
    twins.each(lambda model: model.set_adapter("task_0"))
    assert twins.check(trains=False) == FUSED


def dora_caching(tmp_path: Path) -> None:
    (caching,) = needed("helpers.DoraCaching")
    twins = Twins(wearing(lora(use_dora=True)))
    with twins.inside(lambda model: caching()):
        assert twins.check() == FUSED
    assert twins.check() == FUSED


def mixed_precision_cast(tmp_path: Path) -> None:
    twins = Twins(wearing(lora()))
    twins.each(lambda model: peft.cast_mixed_precision_params(model, dtype=torch.float16))
    ours, theirs = twins.do(lambda model: {name: p.dtype for name, p in model.named_parameters()})
    assert ours == theirs and set(ours.values()) == {torch.float16, torch.float32}
    twins.each(lambda model: [setattr(p, "data", p.data.float()) for p in model.parameters()])
    assert twins.check() == FUSED


def extended_vocabulary(tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.resize_token_embeddings(70)
    model = peft.get_peft_model(base, lora(target_modules=["q_proj", "embed_tokens", "lm_head"]))
    move(model)
    twins = Twins(model)
    assert twins.check() == FUSED
    ours, theirs = twins.do(lambda model: peft.get_peft_model_state_dict(model, save_embedding_layers=True))
    assert ours.keys() == theirs.keys() and any("embed_tokens" in key for key in ours)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


def perceptron(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Perceptron(), lora(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"]))
    x = torch.randn(32, 20)
    twins = Twins(model, run=lambda model: model(x))
    assert twins.ours.targeted_module_names == twins.peft.targeted_module_names == ["seq.0", "seq.2"]
    twins.each(lambda model: model.print_trainable_parameters())

    def fit(model: nn.Module) -> float:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(20):
            loss = F.cross_entropy(model(x), (x[:, 0] > 0).long())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    ours, theirs = twins.do(fit)
    assert ours == pytest.approx(theirs, rel=1e-3) and ours < 0.1
    assert twins.check() == FUSED


class Own(peft.tuners.lora.Linear):
    """A LoRA layer of somebody's own, which nobody else may take for PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs) + 1.0


def own_layer_class(tmp_path: Path) -> None:
    config = lora(target_modules=["seq.0", "seq.2"])
    config._register_custom_module({nn.Linear: Own})
    torch.manual_seed(0)
    model = peft.get_peft_model(Perceptron(), config)
    report = lf.accelerate(model)
    assert {row.path for row in report.rows} == {"original"}
    assert type(model.base_model.model.seq[0]) is Own


def injected_on_meta(tmp_path: Path) -> None:
    state = peft.get_peft_model_state_dict(wearing(lora()))
    config = lora()

    def load(model: Any) -> None:
        inner = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        peft.set_peft_model_state_dict(model, inner, low_cpu_mem_usage=True)

    model = peft.inject_adapter_in_model(config, tiny_model("llama"), low_cpu_mem_usage=True)
    twins = Twins(model)
    assert next(p for name, p in twins.ours.named_parameters() if "lora_A" in name).is_meta
    twins.each(load)
    assert twins.check() == FUSED


def converted_to_lora(tmp_path: Path) -> None:
    convert, _ = needed("convert_to_lora", "PeanutConfig")
    twins = Twins(wearing(peft.MissConfig(r=4, target_modules=TARGETS)))
    (ours, values), (theirs, others) = twins.do(lambda model: convert(model, rank=4))
    assert ours.to_dict() == theirs.to_dict() and values.keys() == others.keys()
    for key, value in values.items():
        torch.testing.assert_close(value.abs(), others[key].abs(), rtol=1e-3, atol=1e-4)
    assert twins.check() == FUSED


def intruder_dimensions(tmp_path: Path) -> None:
    (reduce,) = needed("tuners.lora.intruders.reduce_intruder_dimension")
    twins = Twins(wearing(lora()))
    twins.each(lambda model: reduce(model, logging_sink=lambda *_: None))
    twins.each(lambda model: model.set_adapter("intruder_reduced"))
    assert twins.check() == FUSED


def other_methods_alone(tmp_path: Path) -> None:
    for config in (
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=TARGETS),
    ):
        twins = Twins(wearing(config))
        assert {row.path for row in twins.report.rows} == {"original"}
        assert twins.check() == set()


def tokens_alone(tmp_path: Path) -> None:
    model = wearing(peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]))
    before = logits(model)
    rows = lf.accelerate(model).rows
    assert [(row.layer, row.path) for row in rows] == [("trainable_tokens.TrainableTokensLayer", "original")]
    assert torch.equal(logits(model), before)


def auto_class(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora(task_type="CAUSAL_LM"))
    move(model)
    twins = Twins(model)
    assert twins.check() == FUSED
    twins.ours.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    lf.accelerate(loaded, strict=True)
    torch.testing.assert_close(logits(loaded), logits(twins.peft.eval()), rtol=1e-4, atol=1e-5)


def frozen_adapters(tmp_path: Path) -> None:
    twins = Twins(wearing(lora()))
    twins.each(lambda model: model.add_adapter("other", lora()))
    twins.each(lambda model: model.set_requires_grad("default", requires_grad=False))
    assert twins.check() == FUSED
    twins.each(lambda model: model.set_requires_grad(["default", "other"], requires_grad=True))
    assert twins.check() == FUSED


DOCUMENTED: dict[str, dict[str, Callable[[Path], None] | str]] = {
    "developer_guides/lora": {
        "initialisation: EVA": eva,
        "initialisation: PiSSA, saved as LoRA": pissa_saved_as_lora,
        "initialisation: OLoRA, orthogonal, gaussian": "test_peft_calls::test_what_a_config_may_ask_for",
        "rsLoRA, rank and alpha patterns": "test_peft_calls::test_what_a_config_may_ask_for",
        "DoRA, and its caching": dora_caching,
        "aLoRA, VeLoRA, KaSA, BD-LoRA": "test_peft_calls::test_what_a_config_may_ask_for",
        "Arrow": arrow,
        "layer replication": "test_peft_calls::test_what_a_config_may_ask_for",
        "parameters without a module": "test_peft_calls::test_parameters_that_are_targeted_without_a_module",
        "LoRA-FA optimiser": lora_fa,
        "LoRA+ optimiser": lora_plus,
        "trainable tokens beside LoRA": "test_peft_calls::test_what_a_config_may_ask_for",
        "merging, unmerging, unloading": "test_peft_calls::test_the_life_of_an_adapter",
        "loading and switching adapters": "test_peft_calls::test_load_adapter",
        "several adapters in one batch": "test_peft_calls::test_batches_of_several_adapters",
    },
    "developer_guides/model_merging": {"weighted, TIES, DARE": "test_peft_calls::test_add_weighted_adapter"},
    "developer_guides/mixed_models": {"LoRA over LoHa": "test_peft_calls::test_methods_mixed_in_one_model"},
    "developer_guides/low_level_api": {
        "injection": "test_peft_calls::test_adapters_injected_into_any_module",
        "injection on the meta device": injected_on_meta,
    },
    "developer_guides/custom_models": {"a perceptron": perceptron, "a layer class of one's own": own_layer_class},
    "developer_guides/troubleshooting": {
        "casting what is trained": mixed_precision_cast,
        "an extended vocabulary": extended_vocabulary,
        "status of layers and model": "test_peft_calls::test_the_life_of_an_adapter",
    },
    "developer_guides/checkpoint": {"files": "test_peft_calls::test_saved_by_one_and_loaded_by_the_other"},
    "package_reference/adalora": {"the schedule of ranks": adalora_schedule},
    "package_reference/auto_class": {"loading base and adapter at once": auto_class},
    "package_reference/helpers": {"rescaling, casting": "test_peft_calls::test_helpers"},
    "package_reference/hotswap": {"one adapter for another": "test_peft_calls::test_hot_swap"},
    "package_reference/lora_conversion": {"another method as LoRA": converted_to_lora},
    "package_reference/lora": {"intruder dimensions": intruder_dimensions, "frozen adapters": frozen_adapters},
    "package_reference/trainable_tokens": {"trainable tokens alone": tokens_alone},
    "methods without a fused path": {"IA3, LoHa": other_methods_alone},
    "transformers": {"adapters without a PeftModel": "test_peft_calls::test_adapters_of_transformers_itself"},
}
SCENARIOS = [
    pytest.param(run, id=f"{page}: {usage}")
    for page, usages in DOCUMENTED.items()
    for usage, run in usages.items()
    if not isinstance(run, str)
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_documented_usage(scenario, tmp_path):
    scenario(tmp_path)


def test_the_table_names_tests_that_exist():
    named = {run for usages in DOCUMENTED.values() for run in usages.values() if isinstance(run, str)}
    found = set()
    for stem in {name.partition("::")[0] for name in named}:
        tree = ast.parse((Path(__file__).parent / f"{stem}.py").read_text(encoding="utf-8"))
        found |= {f"{stem}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert named <= found
