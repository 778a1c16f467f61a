"""accelerate, restore, accelerated, explain, the report and the callback: what they promise beside the numbers."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_fused as lf
from lowrank_fused.errors import LaunchError, NotAcceleratedError
from lowrank_fused.factors import weight_factor
from lowrank_fused.grouping import GROUP
from lowrank_fused.peft import layers as peft_layers
from lowrank_fused.peft import readers, swap
from lowrank_fused.peft.layers import STATE, Accelerated
from lowrank_fused.peft.report import Report, Row
from lowrank_fused.routes import addmm
from lowrank_fused.tools.tiny_models import logits, tiny_model
from lowrank_fused.tools.twins import move

peft = pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings})


def wearing(config: Any = None, **settings: Any) -> nn.Module:
    model = peft.get_peft_model(tiny_model("llama"), config or lora(**settings))
    move(model)
    return model


def tower(*targets: str, **settings: Any) -> nn.Module:
    """Two linears of 8 x 8, the named ones adapted."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(base, lora(target_modules=list(targets or ("0", "1")), **settings))
    move(model)
    return model


def photograph(model: nn.Module) -> list[tuple[int, type, dict[str, Any], list[int]]]:
    """Every module: which object, of which class, with which attributes and parameters."""
    found = []
    for module in model.modules():
        attributes = {name: id(value) for name, value in module.__dict__.items()}
        found.append((id(module), type(module), attributes, [id(p) for p in module.parameters(recurse=False)]))
    return found


def settings_of(model: nn.Module) -> list[tuple[str, str, str]]:
    states = [m.__dict__[STATE].settings for m in model.modules() if isinstance(m, Accelerated)]
    return [(s.route, s.precision, s.dropout) for s in states]


def test_restore_is_exact():
    model = wearing()
    before = photograph(model)
    lf.accelerate(model)
    assert photograph(model) != before
    logits(model)
    assert lf.restore(model) is model
    assert photograph(model) == before
    assert lf.restore(model) is model and photograph(model) == before


def test_only_classes_change_and_two_attributes():
    model = wearing()
    before = photograph(model)
    lf.accelerate(model)
    for (this, cls, attributes, parameters), (that, old, had, held) in zip(photograph(model), before, strict=True):
        assert this == that and parameters == held
        assert cls is old or (issubclass(cls, old) and cls.__mro__[1:3] == (Accelerated, old))
        assert attributes.keys() - had.keys() <= {STATE, GROUP} and {n: attributes[n] for n in had} == had


def test_a_second_call_is_harmless_and_changes_the_settings():
    model = wearing()
    first = lf.accelerate(model)
    before = photograph(model)
    assert lf.accelerate(model) == first
    assert photograph(model) == before
    lf.accelerate(model, route="reference", precision="fast", dropout="torch")
    assert set(settings_of(model)) == {("reference", "fast", "torch")} and photograph(model) == before
    logits(model)
    assert lf.explain(model).route == "reference"


def test_other_models_are_untouched():
    one, other = wearing(), wearing()
    before = photograph(other)
    lf.accelerate(one)
    assert photograph(other) == before
    with pytest.raises(ValueError, match="no accelerated layer"):
        lf.explain(other)


def test_accelerated_puts_back_what_was_there():
    model = wearing()
    before = photograph(model)
    with lf.accelerated(model, route="addmm") as report:
        assert report.of_path("fused") == 4 and settings_of(model)[0][0] == "addmm"
    assert photograph(model) == before
    with pytest.raises(KeyError), lf.accelerated(model):
        raise KeyError
    assert photograph(model) == before
    with pytest.raises(ValueError, match="route"), lf.accelerated(model, route="none"):
        raise AssertionError("never entered")
    assert photograph(model) == before

    lf.accelerate(model, route="addmm")
    with lf.accelerated(model, route="off", dropout="torch"):
        model.add_adapter("more", lora(target_modules=["up_proj"]))
        lf.accelerate(model)
        assert len(settings_of(model)) == 6
    assert settings_of(model) == [("addmm", "match", "fused")] * 4


@pytest.mark.parametrize("again", [False, True], ids=["first call", "second call"])
@pytest.mark.parametrize("where", ["accelerated_class", "_report"])
def test_a_failure_in_the_middle_leaves_every_layer_as_it_was(monkeypatch, where, again):
    model = wearing()
    if again:
        lf.accelerate(model, methods=["lora"], route="addmm")
        model.add_adapter("more", lora(target_modules=["up_proj"]))
    before, settings = photograph(model), settings_of(model)
    real, calls = getattr(swap, where), []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if where == "_report" or len(calls) == 2:
            raise MemoryError("in the middle")
        return real(*arguments)

    monkeypatch.setattr(swap, where, fail_at_the_second)
    with pytest.raises(MemoryError):
        lf.accelerate(model, route="reference")
    assert photograph(model) == before and settings_of(model) == settings
    monkeypatch.undo()
    logits(model)


def test_strict_names_what_would_be_left_and_changes_nothing():
    model = wearing(target_modules=["q_proj", "embed_tokens"])
    before = photograph(model)
    with pytest.raises(
        NotAcceleratedError, match=r"1 x lora\.Embedding \(default\): no fused path for lora\.Embedding"
    ):
        lf.accelerate(model, strict=True)
    assert photograph(model) == before
    lf.accelerate(model, route="addmm")
    with pytest.raises(NotAcceleratedError):
        lf.accelerate(model, strict=True, route="reference")
    assert set(settings_of(model)) == {("addmm", "match", "fused")}
    assert lf.accelerate(wearing(), strict=True).of_path("original") == 0
    with pytest.raises(NotAcceleratedError, match="switched off"):
        lf.accelerate(wearing(), strict=True, route="off")


def test_methods_that_were_not_asked_for_are_left():
    model = wearing()
    model.add_adapter("dora", lora(use_dora=True))
    report = lf.accelerate(model, methods=["dora"])
    found = {(row.adapter, row.method, row.path, row.reason) for row in report.rows}
    assert found == {
        ("default", "lora", "original", "not among the methods that were asked for"),
        ("dora", "dora", "fused", ""),
    }
    logits(model)
    assert {row.path for row in lf.explain(model).rows} == {"original"}
    assert lf.accelerate(model, methods="lora").of_path("fused") == 4


# What is asked of a layer that PEFT's own forward computes as fast -> whether it is left to PEFT.
AS_FAST: dict[str, tuple[dict[str, Any], bool]] = {
    "trained in bf16": ({}, True),
    "trained in fp16": ({"dtype": torch.float16}, True),
    "dropout that does nothing": ({"dropout": 0.3, "training": False}, True),
    "dropout": ({"dropout": 0.3}, False),
    "without gradients": ({"grad": False}, False),
    "frozen": ({"frozen": True}, False),
    "fp32": ({"dtype": torch.float32}, False),
    "fp32 adapter": ({"fp32_adapter": True}, True),
    "a route by name": ({"route": "addmm"}, False),
    "a route from outside": ({"environment": "reference"}, False),
    "another method": ({"config": "LoraConfig"}, False),
}


@pytest.mark.parametrize("case", AS_FAST)
def test_what_peft_computes_as_fast_on_a_cpu_is_left_to_it(case, monkeypatch):
    told, left = AS_FAST[case]
    dtype, config, dropout = told.get("dtype", torch.bfloat16), told.get("config", "VeraConfig"), told.get("dropout", 0)
    given = peft.LoraConfig(target_modules=["0"]) if config == "LoraConfig" else vera(dropout)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)).to(dtype), given, autocast_adapter_dtype=told.get("fp32_adapter", False)
    )
    model.train(told.get("training", True)).requires_grad_(not told.get("frozen", False))
    model.base_model.model[0].base_layer.requires_grad_(False)
    monkeypatch.setenv("LOWRANK_FUSED_ROUTE", told.get("environment", ""))
    with torch.set_grad_enabled(told.get("grad", True)):
        report = lf.accelerate(model, route=told.get("route", "auto"))
        model(torch.ones(2, 8, dtype=dtype))
    for rows in (report.rows, lf.explain(model).rows):
        (row,) = rows
        assert row.path == ("original" if left else "fused")
        assert row.reason.startswith("as fast in 16 bits on a CPU") == left
    if left:
        with pytest.raises(NotAcceleratedError, match="as fast in 16 bits"):
            lf.accelerate(model, strict=True)


def vera(dropout: float) -> Any:
    return peft.VeraConfig(r=4, target_modules=["0"], vera_dropout=dropout)


def test_as_fast_is_what_all_active_adapters_have_to_be():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)).bfloat16(), vera(0), autocast_adapter_dtype=False)
    model.add_adapter("frozen", vera(0))
    layer = model.base_model.model[0]
    lf.accelerate(model)
    for active, path in (("default", "original"), ("frozen", "fused"), (["default", "frozen"], "fused")):
        model.base_model.set_adapter(active)
        for vectors in (layer.vera_lambda_d, layer.vera_lambda_b):
            vectors["frozen"].requires_grad_(False)
        peft_layers.state_of(layer).calls.clear()
        model(torch.ones(2, 8, dtype=torch.bfloat16))
        assert [row.path for row in lf.explain(model).rows] == [path]


def test_a_base_layer_that_computes_itself_has_our_term_beside_it():
    """Nobody measured that PEFT would be as fast there."""
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)).bfloat16(), vera(0), autocast_adapter_dtype=False)
    model.base_model.model[0].base_layer.register_forward_hook(lambda module, given, y: None)
    assert [row.path for row in lf.accelerate(model).rows] == ["tail"]
    model(torch.ones(2, 8, dtype=torch.bfloat16))
    assert [row.path for row in lf.explain(model).rows] == ["tail"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"methods": ["dorra"]}, "'dorra'.*did you mean 'dora'"),
    ({"methods": "nothing"}, "'nothing'.*known: adalora"),
    ({"route": "triton"}, "route must be one of auto, off, reference"),
    ({"precision": "exact"}, "precision must be one of match, fast, got 'exact'"),
    ({"dropout": "none"}, "dropout must be one of fused, torch, got 'none'"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_settings_that_do_not_exist(settings, message):
    model = tower()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        lf.accelerate(model, **settings)
    assert photograph(model) == before
    with pytest.raises(ValueError, match=message):
        lf.AccelerateCallback(**settings)
    with pytest.raises(TypeError, match="rute"):
        lf.AccelerateCallback(rute="auto")


def test_the_environment_overrides_the_route(monkeypatch):
    model = tower()
    monkeypatch.setenv("LOWRANK_FUSED_ROUTE", "off")
    report = lf.accelerate(model, route="addmm")
    assert report.route == "off" and {(row.path, row.reason) for row in report.rows} == {("original", "switched off")}
    model(torch.ones(2, 8))
    assert [(row.path, row.reason, row.calls) for row in lf.explain(model).rows] == [("original", "switched off", 2)]
    monkeypatch.setenv("LOWRANK_FUSED_ROUTE", "fastest")
    with pytest.raises(
        ValueError, match="environment variable LOWRANK_FUSED_ROUTE must be one of auto, off.*'fastest'"
    ):
        lf.accelerate(model, route="addmm")
    monkeypatch.setenv("LOWRANK_FUSED_ROUTE", "")
    assert lf.accelerate(model, route="reference").route == "reference"


@pytest.mark.parametrize("route", ["auto", "reference", "addmm", "precise", "off"])
def test_every_route_that_runs_here_gives_the_same(route):
    model = wearing()
    expected = logits(model)
    lf.accelerate(model, route=route)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_peft_layers():
    with pytest.raises(ValueError, match=r"Linear holds no PEFT layers.*get_peft_model.*lowrank_fused\.inject"):
        lf.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no accelerated layer"):
        lf.explain(nn.Linear(2, 2))
    plain = nn.Linear(2, 2)
    assert lf.restore(plain) is plain


def test_peft_that_is_too_old_or_absent(monkeypatch):
    monkeypatch.setattr(swap.importlib.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(lf.UnsupportedError, match=r"peft 0\.18 or newer, found 0\.17\.1"):
        lf.accelerate(tower())

    def absent(name: str) -> str:
        raise swap.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(swap.importlib.metadata, "version", absent)
    with pytest.raises(lf.UnsupportedError, match="pip install"):
        lf.accelerate(tower())


def test_embeddings_and_convolutions_are_listed():
    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.embedding, self.linear = nn.Conv2d(3, 4, 2), nn.Embedding(5, 4), nn.Linear(4, 4)

    model = peft.get_peft_model(Sees(), lora(target_modules=["conv", "embedding", "linear"]))
    rows = {row.layer: (row.path, row.reason) for row in lf.accelerate(model).rows}
    assert rows == {
        "lora.Conv2d": ("original", "no fused path for lora.Conv2d"),
        "lora.Embedding": ("original", "no fused path for lora.Embedding"),
        "lora.Linear": ("fused", ""),
    }


class Wrapped(nn.Module):
    """As DistributedDataParallel and its kin hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)


@pytest.mark.parametrize("wrap", [Wrapped, lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_layers_are_found_in_wrapped_models(wrap):
    model = tower()
    wrapped = wrap(model)
    assert lf.accelerate(wrapped).of_path("fused") == 2
    assert type(model.base_model.model[0]).__name__ == "AcceleratedLoraLayerLinear"
    lf.restore(wrapped)
    assert type(model.base_model.model[0]) is peft.tuners.lora.Linear


def test_three_hundred_layers_take_less_than_a_second():
    model = peft.get_peft_model(nn.Sequential(*(nn.Linear(8, 8) for _ in range(300))), lora(target_modules=r"\d+"))
    lf.accelerate(tower())
    start = time.perf_counter()
    report = lf.accelerate(model)
    elapsed = time.perf_counter() - start
    assert report.of_path("fused") == 300
    assert elapsed < 1.0


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("device-side assert")


def failure_in(model: nn.Module, direction: str, monkeypatch: pytest.MonkeyPatch, *where: Any) -> str:
    """What is told when the function at `where` fails in a forward pass, or in the backward pass of one."""
    x = torch.ones(2, 8)
    y = model(x) if direction == "backward" else None
    monkeypatch.setattr(*where, fail)
    with pytest.raises(LaunchError) as caught:
        model(x) if y is None else y.sum().backward()
    message = str(caught.value)
    assert message.count("RuntimeError: device-side assert") == 1, "told once"
    assert type(caught.value.__cause__) is RuntimeError and "lowrank_fused.restore(model)" in message
    return message


@pytest.mark.parametrize(("direction", "layer"), [("forward", "0"), ("backward", "1")])
def test_a_failing_launch_names_the_layer_and_the_way_around(direction, layer, monkeypatch):
    model = tower()
    lf.accelerate(model)
    message = failure_in(model, direction, monkeypatch, addmm, direction)
    assert message.startswith(f"base_model.model.{layer}: route 'addmm' failed with ")
    assert "LOWRANK_FUSED_ROUTE=addmm" in message
    lf.restore(model)
    model(torch.ones(2, 8)).sum().backward()


@pytest.mark.parametrize("mode", ["forward", "backward", "evaluation"])
def test_a_failing_launch_that_makes_factors_is_named_too(mode, monkeypatch):
    """NEAT's act(A W), which has a kernel of its own whatever the route."""
    if not hasattr(peft, "PeanutConfig"):
        pytest.skip(f"PEFT {peft.__version__} has no PEANuT")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.PeanutConfig(r=2, target_modules=["0"]))
    move(model)
    lf.accelerate(model)
    with torch.set_grad_enabled(mode != "evaluation"):
        model.train(mode != "evaluation")
        message = failure_in(model, mode, monkeypatch, weight_factor, "_uses_kernels")
    assert message.startswith("base_model.model.0: making its factors failed with ")
    assert "LOWRANK_FUSED_ROUTE=off" in message
    monkeypatch.setenv("LOWRANK_FUSED_ROUTE", "off")
    lf.accelerate(model)
    model(torch.ones(2, 8)).sum().backward()


# The report.


def test_the_report_counts_layers_alike():
    model = wearing(target_modules=["q_proj", "down_proj", "embed_tokens"])
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.register_forward_hook(lambda *_: None)
    report = lf.accelerate(model)
    watched = "the base layer has a hook, or a weight that is no whole matrix"
    assert report.rows == (
        Row("lora.Embedding", "default", "", 1, "original", "no fused path for lora.Embedding"),
        Row("lora.Linear", "default", "lora", 2, "fused"),
        Row("lora.Linear", "default", "lora", 1, "tail", watched),
        Row("lora.Linear", "default", "lora", 1, "tail", "the base weight is trained"),
    )
    assert report.layers == 5 and (report.of_path("fused"), report.of_path("tail")) == (2, 2)
    assert report.summary() == (
        "4 of 5 adapter layers accelerated (80.0 %), 2 of them beside a base layer that computes itself, 1 left to PEFT"
    )
    assert report.versions["peft"] == peft.__version__ and report.device == "cpu" and report.route == "auto"


def test_explain_counts_calls():
    model = tower()
    lf.accelerate(model)
    report = lf.explain(model)
    assert report.rows == () and report.summary().startswith("no calls yet: run the model first")
    assert str(report).count("no calls yet") == 1
    model(torch.ones(2, 8))
    model(torch.ones(2, 8))
    with model.disable_adapter():
        model(torch.ones(2, 8))
    report = lf.explain(model)
    assert [(row.path, row.reason, row.count, row.calls) for row in report.rows] == [
        ("fused", "", 2, 4),
        ("original", "adapters disabled", 2, 2),
    ]
    assert report.summary() == "4 of 6 calls accelerated (66.7 %), 2 left to PEFT" and report.notes == ()
    model.base_model.model[0](torch.ones(2, 8))
    assert sum(row.calls or 0 for row in lf.explain(model).rows) == 7


def test_explain_tells_of_layers_without_a_call():
    model = tower()
    lf.accelerate(model)
    model.base_model.model[0](torch.ones(2, 8))
    assert lf.explain(model).notes == ("1 of 2 accelerated layers were not called, or only inside of compiled graphs",)


LONG = "a_module_of_somebody_s_own.WithAQuiteLongClassName"
ROWS = (
    Row("lora.Linear", "default", "lora", 1960, "fused", "", 123456),
    Row("unilora.Linear", "a-rather-long-name", "unilora", 3, "tail", "the base layer is a bitsandbytes.Linear4bit", 7),
    Row(LONG, "style", "lora", 1, "original", "why it was left " * 12, 1),
)


@pytest.mark.parametrize("counted", [False, True])
def test_the_table_fits_a_terminal_and_says_all(counted):
    rows = ROWS if counted else tuple(replace(row, calls=None) for row in ROWS)
    text = str(Report(rows, {"torch": "2.13.0+cpu", "peft": "0.21.2"}, "cpu", "auto", ("a note",)))
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 120
    assert lines[-1] == "a note" and lines[-2] == Report(rows, {}, "cpu", "auto").summary()
    assert ("123,456" in text) == counted == ("calls" in lines[2])
    for word in ("lora.Linear", "bitsandbytes.Linear4bit", "tail", "original", "1960", "torch 2.13.0+cpu"):
        assert word in text
    assert text.count("why it was left") >= 6


def test_the_json_says_what_the_report_says():
    report = lf.accelerate(wearing(target_modules=["q_proj", "embed_tokens"]))
    content = json.loads(report.to_json())
    assert content.pop("summary") == report.summary()
    rows, notes = tuple(Row(**row) for row in content.pop("rows")), tuple(content.pop("notes"))
    assert Report(rows, notes=notes, **content) == report
    assert asdict(report)["rows"][0] == asdict(rows[0])


def test_one_line_is_logged_and_nothing_printed(caplog, capfd):
    with caplog.at_level(logging.INFO, "lowrank_fused"):
        report = lf.accelerate(tower())
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", report.summary())]
    assert report.summary() == "2 of 2 adapter layers accelerated (100.0 %), 0 left to PEFT"
    caplog.clear()
    only_embeddings = wearing(target_modules=["embed_tokens"])
    with caplog.at_level(logging.INFO, "lowrank_fused"):
        lf.accelerate(only_embeddings)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "0 of 1 adapter layers accelerated (0.0 %), 1 left to PEFT")
    ]
    assert capfd.readouterr().out == ""


def test_layers_whose_adapters_are_gone():
    model = tower()
    model.delete_adapter("default")
    assert lf.accelerate(model).summary() == "no adapters in the PEFT layers"
    assert "no adapters" in str(lf.accelerate(model))


# The callback.


def trainer_says(callback: Any, event: str, **more: Any) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    getattr(callback, event)(TrainingArguments(output_dir="unused"), TrainerState(), TrainerControl(), **more)


@pytest.mark.parametrize("restores", [False, True])
def test_the_callback_accelerates_when_training_begins(restores):
    model = tower()
    before = photograph(model)
    callback = lf.AccelerateCallback(restore_at_end=restores, route="addmm", methods=["lora"])
    assert callback.report is None and photograph(model) == before
    trainer_says(callback, "on_train_begin", model=model, optimizer=None, train_dataloader=[])
    assert callback.report.of_path("fused") == 2 and callback.report.route == "addmm"
    assert set(settings_of(model)) == {("addmm", "match", "fused")}
    trainer_says(callback, "on_step_end", model=model)
    trainer_says(callback, "on_train_end", model=model)
    assert (photograph(model) == before) == restores
    trainer_says(callback, "on_train_begin")


def test_the_callback_on_a_model_without_adapters():
    with pytest.raises(ValueError, match="holds no PEFT layers"):
        trainer_says(lf.AccelerateCallback(), "on_train_begin", model=nn.Linear(2, 2))


def test_importing_the_package_patches_nothing_and_imports_no_peft():
    code = """
import sys, torch
from torch import nn
before = {k: v for cls in (nn.Module, nn.Linear, nn.Dropout, torch.Tensor) for k, v in vars(cls).items()}
import lowrank_fused as lf
assert lf.accelerate and lf.restore and lf.Report and lf.explain and lf.accelerated
after = {k: v for cls in (nn.Module, nn.Linear, nn.Dropout, torch.Tensor) for k, v in vars(cls).items()}
assert before == after
assert not {"peft", "transformers", "accelerate", "triton", "rich"} & set(sys.modules)
import peft
from peft.tuners.lora import Linear
own = dict(vars(Linear))
model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
lf.accelerate(model)
assert dict(vars(Linear)) == own and before == {
    k: v for cls in (nn.Module, nn.Linear, nn.Dropout, torch.Tensor) for k, v in vars(cls).items()
}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_a_copy_is_a_model_of_its_own():
    model = tower()
    lf.accelerate(model)
    other = copy.deepcopy(model)
    lf.accelerate(other, route="reference")
    other(torch.ones(2, 8))
    assert settings_of(model) == [("auto", "match", "fused")] * 2
    assert lf.explain(model).rows == () and lf.explain(other).rows[0].calls == 2
    lf.restore(other)
    assert lf.accelerate(model).of_path("fused") == 2


def test_classes_are_made_once_and_can_be_found_by_name():
    classes = peft_layers.accelerated_classes()
    assert classes is peft_layers.accelerated_classes()
    for cls, made in classes.items():
        assert getattr(peft_layers, made.__name__) is made and issubclass(made, cls)
        assert made.forward is Accelerated.forward and made.merge is cls.merge
    assert len({made.__name__ for made in classes.values()}) == len(classes)
    with pytest.raises(AttributeError, match="AcceleratedNothing"):
        peft_layers.AcceleratedNothing  # noqa: B018


def test_readers_are_complete() -> None:
    with pytest.raises(TypeError, match="Half must define modules, read, tensors"):

        @readers.reader("half:Linear")
        class Half(readers.Reader):
            @staticmethod
            def adapters(layer: Any) -> Any:
                return {}
