"""Every example, started as its first lines say, offline: it reports, learns, and calls what it promises to call."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LAYERS = 14


@dataclass(frozen=True)
class Example:
    """How many calls of all layers and how many losses it prints, how it starts, and whether it saves an adapter."""

    calls: dict[str, int]
    losses: int = 32
    torchrun: bool = False
    needs: tuple[str, ...] = ()
    saves: bool = False


ALL = {
    "plain_pytorch": Example({"fused": 32 * LAYERS}),
    "accelerate_loop": Example({"fused": 64 * LAYERS}, needs=("accelerate",)),
    "trainer": Example({"fused": 32 * LAYERS}, saves=True, needs=("accelerate",)),
    # TRL checkpoints unless told otherwise: every forward is computed again in backward.
    "trl_sft": Example({"fused": 64 * LAYERS}, saves=True, needs=("trl", "datasets")),
    "trl_dpo": Example({"fused": 64 * LAYERS, "original": 32 * LAYERS}, saves=True, needs=("trl", "datasets")),
    "ddp": Example({"fused": 32 * LAYERS}, torchrun=True),
    "fsdp2": Example({"fused": 32 * LAYERS}, torchrun=True),
    "compile": Example({}, losses=8),
}


# Importing takes longer than most examples, so one interpreter imports for all and forks for each.
IMPORTED = """
import contextlib, importlib, json, os, runpy, sys, traceback
for module in ("accelerate", "datasets", "peft", "torch", "transformers", "trl", "typer"):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
for line in sys.stdin:
    script, folder, arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.path[0], sys.argv = os.path.dirname(script), [script, *arguments]
        status = 1
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment() -> dict[str, str]:
    """Without a hub, and with the package of this repository."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Run(Protocol):
    """Run an example with some arguments in a folder; what it printed."""

    def __call__(self, name: str, folder: Path, *arguments: str) -> str: ...


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """An example in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTED], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None

        def run(name: str, folder: Path, *arguments: str) -> str:
            print(json.dumps([str(EXAMPLES / f"{name}.py"), str(folder), arguments]), file=server.stdin, flush=True)
            answer = "said by a library"
            while not answer.lstrip("-").isdigit():
                answer = server.stdout.readline().strip()
                assert server.poll() is None
            printed = (folder / "printed").read_text()
            assert answer == "0", printed[-6000:]
            return printed

        yield run


def run_with_torchrun(name: str, folder: Path) -> str:
    """What two processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py")],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def losses_of(printed: str) -> list[float]:
    """All losses, whose steps count up from 1."""
    found = re.findall(r"^step +(\d+)  loss (\d+\.\d{4})", printed, re.MULTILINE)
    runs = [int(step) for step, _ in found].count(1)
    assert [int(step) for step, _ in found] == [*range(1, len(found) // runs + 1)] * runs
    return [float(loss) for _, loss in found]


def calls_of(printed: str) -> dict[str, int]:
    """Path -> calls, from the table of `explain`."""
    rows = re.findall(r"lora\.Linear +default +lora +14 +(fused|tail|original) +([\d,]+)", printed)
    return {path: int(calls.replace(",", "")) for path, calls in rows}


def test_all_examples_are_here():
    assert set(ALL) | {"tiny"} == {file.stem for file in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", [name for name in ALL if name != "compile"])
def test_example(name, run, tmp_path):
    example = ALL[name]
    for package in example.needs:
        pytest.importorskip(package)
    arguments = ("--out", str(tmp_path / "adapter")) if example.saves else ()
    printed = run_with_torchrun(name, tmp_path) if example.torchrun else run(name, tmp_path, *arguments)
    assert "14 of 14 adapter layers accelerated (100.0 %)" in printed
    losses = losses_of(printed)
    assert len(losses) == example.losses
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert calls_of(printed) == example.calls
    if example.saves:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000
    if "original" in example.calls:
        assert "adapters disabled" in printed


def test_compile_before_and_after(run, tmp_path):
    """The same losses in both orders."""
    printed = run("compile", tmp_path)
    assert printed.count("14 of 14 adapter layers accelerated (100.0 %)") == 2
    first, second = printed.split("compile then accelerate")
    assert "accelerate then compile" in first
    losses = losses_of(first)
    assert len(losses) == ALL["compile"].losses
    assert losses[-1] < 0.7 * losses[0]
    assert losses_of(second) == pytest.approx(losses, abs=2e-4)


def test_a_model_of_ones_own(run, tmp_path, monkeypatch):
    """`--model` takes any folder that transformers can load."""
    monkeypatch.syspath_prepend(EXAMPLES)
    tiny = importlib.import_module("tiny")
    model, tokenizer = tiny.load()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    printed = run("plain_pytorch", tmp_path, "--model", str(tmp_path / "model"), "--epochs", "1")
    assert "7 of 7 adapter layers accelerated" in printed
    losses = losses_of(printed)
    assert len(losses) == 16
    assert losses[-1] < losses[0]
