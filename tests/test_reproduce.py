"""Reproductions: every printed parameter count, runs that are found again, and pages that say what was found."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.progress import Progress
from torch import nn

from lowrank_fused import methods
from lowrank_fused.reproduce import counts, family, initialization
from lowrank_fused.reproduce.counts import PUBLISHED, counted, equal
from lowrank_fused.reproduce.page import mean_and_deviation
from lowrank_fused.reproduce.store import RunStore
from lowrank_fused.reproduce.training import Training


@pytest.fixture
def progress():
    with Progress(disable=True) as bar:
        yield bar


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda r: f"{r.source.split()[0]}-{r.model}-{r.method}-{r.rank}")
def test_a_printed_count_is_counted_or_explained(row):
    count = counted(row)
    if row.why:
        assert not equal(row, count), "the explanation explains nothing"
    else:
        assert equal(row, count), f"printed {row.printed:,}, counted {count:,}"


def test_a_rounded_number_is_compared_at_its_precision():
    row = counts.Published("s", "m", "qv", "lora", 8, 300_000, 100_000)
    assert equal(row, 294_912) and equal(row, 349_999) and not equal(row, 350_001)


def test_an_unexplained_difference_is_told(monkeypatch, tmp_path, progress):
    wrong = counts.Published("nobody", "roberta-base", "qv", "lora", 8, 294_913)
    monkeypatch.setattr(counts, "PUBLISHED", (wrong,))
    with pytest.raises(ValueError, match="printed 294,913, counted 294,912"):
        counts.reproduce_counts(tmp_path, tmp_path, progress)
    assert "DIFFERENT" in (tmp_path / "counts.md").read_text()


def test_finished_runs_are_found_again(tmp_path):
    store = RunStore(tmp_path / "new" / "runs.jsonl")
    store.add({"rate": 1e-3, "seed": 0}, {"accuracy": 0.5})
    store.add({"rate": 1e-3, "seed": 1}, {"accuracy": 0.75})
    again = RunStore(store.path)
    assert len(again) == 2
    assert again.get({"seed": 1, "rate": 1e-3}) == {"accuracy": 0.75}
    assert again.get({"seed": 2, "rate": 1e-3}) is None


def test_a_line_that_was_cut_off_is_dropped_and_written_anew(tmp_path):
    path = tmp_path / "runs.jsonl"
    RunStore(path).add({"seed": 0}, {"accuracy": 0.5})
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    store = RunStore(path)
    assert len(store) == 1 and path.read_text() == whole
    store.add({"seed": 1}, {"accuracy": 1.0})
    assert len(RunStore(path)) == 2


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("not json\n{}\n")
    with pytest.raises(ValueError, match="line 1, is not a finished run"):
        RunStore(path)


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, math.sqrt(2.0))
    assert mean_and_deviation([0.5]) == (0.5, 0.0)


class FakeTask:
    """Accuracies that are a function of start and rate: Init[A] is best at 1e-2, Init[B] at 3e-3 and unstable there."""

    runs = 0

    def __init__(self, *_) -> None:
        pass

    def run(self, config, rate, seed):
        FakeTask.runs += 1
        best = {"init_a": -2.0, "init_b": -2.5}[config["init_lora_weights"]]
        off = abs(math.log10(rate) - best)
        diverged = config["init_lora_weights"] == "init_b" and rate > 1e-2
        loss = None if diverged else 0.4 + 0.05 * off
        return {
            "trained": 1,
            "diverged": diverged,
            "loss": loss,
            "choose": 0.5,
            "accuracy": 0.8 - 0.1 * off + 0.01 * seed,
        }


def test_the_page_on_initialization_says_what_was_found(monkeypatch, tmp_path, progress):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(initialization, "Task", FakeTask)
    FakeTask.runs = 0
    page = initialization.reproduce_initialization(tmp_path, tmp_path, progress, seeds=2)
    text = page.read_text()
    assert "the best rate of Init[A] is higher: yes (Init[A] 0.01, Init[B] 0.003)" in text
    assert "the largest stable rate of Init[A] is higher: yes (Init[A] 0.1, Init[B] 0.01)" in text
    assert (tmp_path / "initialization.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "initialization.json").read_text())
    assert found["best_rate"] == {"init_a": 0.01, "init_b": 0.003}
    assert FakeTask.runs == 2 * 2 * 7
    initialization.reproduce_initialization(tmp_path, tmp_path, progress, seeds=2)
    assert FakeTask.runs == 2 * 2 * 7, "finished runs were trained again"
    initialization.reproduce_initialization(tmp_path, tmp_path, progress, seeds=3)
    assert FakeTask.runs == 2 * 3 * 7


class TinyTask:
    """A real adapter on a small layer, so that the timing has something to time."""

    def __init__(self, training: Training, *_) -> None:
        self.rates: list[float] = []

    def run(self, config, rate, seed):
        return {"trained": 10, "diverged": False, "loss": 0.5, "choose": 1.0 - rate, "accuracy": 0.5 + 0.1 * seed}

    def adapted(self, config, seed):
        import lowrank_fused as lf

        model = nn.Sequential(nn.Linear(32, 32))
        model.loss = lambda batch: model(torch.ones(4, 32)).square().sum()
        return lf.inject(model, **{"rank": 4, **config})

    def some_batches(self, count):
        from lowrank_fused.demo.data import Batch

        return [Batch({"input_ids": torch.ones(4, length)}, torch.ones(4)) for length in range(1, 1 + count)]


def test_the_page_on_methods_has_a_row_for_each(monkeypatch, tmp_path, progress):
    monkeypatch.setattr(family, "Task", TinyTask)
    page = family.reproduce_family(tmp_path, tmp_path, progress, seeds=3, names=["lora", "beamlora"])
    rows = [line for line in page.read_text().splitlines() if line.startswith(("| lora", "| beamlora"))]
    assert len(rows) == 2
    # The rate that did best on the snippets to choose by (lower is better here), and the mean over seeds on the others.
    assert all("| 6.25e-05 |" in row and "60.0% ± 10.0%" in row for row in rows)


@pytest.mark.parametrize(
    ("best_at", "expected"), [(1e-4, 6.25e-5), (2.5e-4, 2.5e-4), (1e-3, 1e-3), (4e-3, 4e-3), (1.6e-2, 1.6e-2)]
)
def test_the_rate_is_looked_for_where_it_gets_better(best_at, expected, monkeypatch, tmp_path, progress):
    class Peaked(TinyTask):
        rates: list[float] = []

        def run(self, config, rate, seed):
            self.rates.append(rate)
            return {**super().run(config, rate, seed), "choose": -abs(math.log(rate / best_at))}

    monkeypatch.setattr(family, "Task", Peaked)
    page = family.reproduce_family(tmp_path, tmp_path, progress, seeds=1, names=["lora"])
    assert f"| {expected:g} |" in page.read_text()
    assert len(Peaked.rates) <= 4


def test_every_method_is_in_the_family_by_default():
    assert family.OPTIONS.keys() <= methods.registry().keys()
