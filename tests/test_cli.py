"""The command line: every command, what it prints for people and machines, and its exit status."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lowrank_fused import benchmark, cli, methods
from lowrank_fused.benchmark import Provider
from lowrank_fused.benchmark.providers import eager
from lowrank_fused.cli import common
from lowrank_fused.routes import ROUTES
from lowrank_fused.tools import doctor
from lowrank_fused.tools.model_shapes import MODELS

COMMANDS = ("doctor", "methods", "bench", "tune", "report", "demo")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def run(*words: str) -> Result:
    """Run the command line in this process, wide enough for its tables."""
    return CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out", "err"):
        monkeypatch.setattr(getattr(common, name), "_width", 200)


def told(result: Result, status: int) -> str:
    """The one sentence of an error; no traceback."""
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit) or result.exception is None
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    assert command in run("--help").output
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Exit status: 0 all well" in " ".join(result.output.split())
    if command != "demo":
        assert result.output.count(f"lowrank-fused {command}") >= 3, "examples"


def test_no_command_shows_help() -> None:
    assert "Commands" in run().output


def test_doctor_for_people() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output and "lowrank_fused works here" in result.output
    assert all(route in result.output for route in ROUTES)


def test_doctor_for_machines() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["works"] and found["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert [route["name"] for route in found["routes"]] == list(ROUTES)
    assert all(route["check"] == "ok" or not route["available"] for route in found["routes"])
    assert {"numpy", "transformers", "peft", "triton", "triton_interpreter", "gpus"} <= set(found["environment"])


@no_gpu
def test_doctor_says_why_kernels_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    routes = {route["name"]: route for route in json.loads(run("doctor", "--json").stdout)["routes"]}
    assert not routes["split"]["available"] and "CUDA device" in routes["split"]["reason"]
    assert routes["addmm"]["available"] and routes["addmm"]["reason"] is None
    result = run("doctor", "--need-gpu", "--no-check")
    assert result.exit_code == 3 and "no CUDA device here" in result.stderr


def test_doctor_finds_what_stops_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.version_of
    fake = {"torch": "2.7.1+cu128", "safetensors": None, "peft": "0.11.0"}
    monkeypatch.setattr(doctor, "version_of", lambda name: fake.get(name, installed(name)))
    result = run("doctor", "--json", "--no-check")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["problems"] == [
        "torch 2.8 or newer is needed, 2.7.1+cu128 is installed",
        "safetensors 0.4 or newer is needed and not installed: pip install 'safetensors>=0.4'",
    ]
    assert "peft 0.18 or newer is needed, 0.11.0 is installed" in found["notes"]
    assert "does not work here" in run("doctor", "--no-check").output


def wrong(x, weight, a, b, bias, scale, p):
    return eager(x, weight, a, b, bias, 1.5 * scale, p)


def test_doctor_checks_the_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "providers_for", lambda names, case: [Provider(names[0], wrong)])
    result = run("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["works"] and "ours max" in found["routes"][0]["check"]


def test_gpu_facts_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "Some GPU", 9, 0, 80 << 30, 132
        uuid = "0-1"

    asked: list[list[str]] = []

    def answer(query: list[str], **_: Any) -> Any:
        asked.append(query)
        if any("GPU-0-1" in word for word in query):
            raise doctor.subprocess.CalledProcessError(6, query)
        return doctor.subprocess.CompletedProcess(query, 0, "570.1, 1980, 1980, 2619, 700.00, 35\n", "")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(doctor.subprocess, "run", answer)
    facts = doctor.gpu_facts(0)
    assert facts["driver"] == "570.1" and facts["clock_sm_max_mhz"] == "1980" and len(asked) == 2
    assert facts["name"] == "Some GPU" and facts["compute_capability"] == "9.0" and facts["memory_gib"] == 80.0

    def missing(query: list[str], **_: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(doctor.subprocess, "run", missing)
    assert doctor.gpu_facts(0)["driver"] is None


def test_methods_lists_the_registry() -> None:
    result = run("methods")
    assert result.exit_code == 0
    for name, method in methods.registry().items():
        assert name in result.output and method.formula in result.output
    assert "2·in + 2·r" in result.output


def test_methods_for_machines() -> None:
    result = run("methods", "--json", "--model", "llama2-7b", "--targets", "q_proj,v_proj", "--rank", "4")
    found = json.loads(result.stdout)
    assert [method["name"] for method in found["methods"]] == list(methods.registry())
    counts = {count["method"]: count for count in found["counts"]}
    assert counts["lora"]["trainable"] == 2_097_152 and counts["lora"]["layers"] == 64
    assert counts["loldu"]["trainable"] == 64 * 4


def test_methods_counts_in_a_model() -> None:
    result = run(
        "methods",
        "--model",
        "vit-b",
        "--targets",
        "qv",
        "--method",
        "loldu",
        "--rank",
        "768",
        "-o",
        "train_sigma=true",
    )
    assert result.exit_code == 0 and "18,456" in result.output and "lora" not in result.output


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--model", "llama-3-8"], "did you mean 'llama-3-8b'"),
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--model", "vit-b", "--method", "lora", "--rank", "0"], "positive"),
        (["--model", "vit-b", "--method", "lora", "--targets", "gate_proj"], "matches no module"),
        (["--model", "vit-b", "--method", "lora", "--targets", "embeddings"], "can't carry an adapter"),
        (["--model", "vit-b", "--method", "lora", "--option", "use_rslora"], "name=value"),
        (["--model", "vit-b", "--method", "lora", "--option", "rslora=true"], "use_rslora"),
    ],
)
def test_mistakes_with_methods(words: list[str], hint: str) -> None:
    assert hint in told(run("methods", *words), 2)


def test_traceback_on_request() -> None:
    result = run("methods", "--model", "llama-3-8", "--traceback")
    assert isinstance(result.exception, ValueError)


SMALL = ("--shape", "64x48", "--tokens", "32", "--rank", "8", "--seconds", "0", "--device", "cpu")


def test_bench_writes_what_it_shows(tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "a" / "rows.json"), "--csv", str(tmp_path / "b" / "rows.csv"))
    result = run("bench", *SMALL, "--dropout", "0", "--dropout", "0.25", "--mode", "forward", "--mode", "both", *files)
    assert result.exit_code == 0, result.output
    assert "64 -> 48, 32 tokens, rank 8, dropout 0.25, fp32" in result.output
    content = json.loads((tmp_path / "a" / "rows.json").read_text())
    with (tmp_path / "b" / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["rows"]) == 2 * 2 * len(("frozen", "eager", "three-gemm", "reference", "addmm"))
    assert all(row["status"] == "ok" and row["ms_p50"] > 0 for row in content["rows"])
    assert {(row["mode"], row["dropout"]) for row in content["rows"]} == {
        (mode, p) for mode in ("forward", "both") for p in (0.0, 0.25)
    }
    assert content["environment"]["torch"] and content["commit"] and content["command"][0] == "lowrank-fused"


def test_bench_of_a_model_measures_each_size_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(benchmark, "measure", lambda case, *_, **__: seen.append(case) or [])  # type: ignore[func-returns-value]
    result = run("bench", "--model", "llama-3-8b", "--tokens", "16", "--device", "cpu", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    assert [(case.label, case.in_features, case.out_features) for case in seen] == [
        ("llama-3-8b q_proj, o_proj", 4096, 4096),
        ("llama-3-8b k_proj, v_proj", 4096, 1024),
        ("llama-3-8b gate_proj, up_proj", 4096, 14336),
        ("llama-3-8b down_proj", 14336, 4096),
    ]
    assert all(case.tokens == 16 and case.dtype == torch.bfloat16 and not case.bias for case in seen)
    seen.clear()
    run("bench", "--model", "roberta-base", "--targets", "qv", "--device", "cpu")
    assert [(case.label, case.bias) for case in seen] == [("roberta-base query, value", True)]


def test_bench_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def measure(case: Any, providers: Any, modes: Any, **named: Any) -> list[Any]:
        given.update(case=case, names=[p.name for p in providers], modes=modes, **named)
        return []

    monkeypatch.setattr(benchmark, "measure", measure)
    words = (
        "--provider",
        "eager",
        "--provider",
        "addmm-fp32",
        "--mode",
        "backward",
        "--dtype",
        "fp16",
        "--no-flush-l2",
    )
    assert run("bench", *SMALL, *words).exit_code == 0
    assert given["names"] == ["eager", "addmm-fp32"] and given["modes"] == ["backward"]
    assert given["budget_s"] == 0 and given["flush_l2"] is False and given["case"].dtype == torch.float16
    assert (given["case"].tokens, given["case"].rank, given["case"].dropout) == (32, 8, 0.0)


def test_bench_shows_no_number_for_a_wrong_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = benchmark.providers_for
    monkeypatch.setattr(
        benchmark,
        "providers_for",
        lambda names, case: [*good(["frozen", "eager"], case), Provider("addmm", wrong)],
    )
    result = run("bench", *SMALL, "--csv", str(tmp_path / "rows.csv"))
    assert result.exit_code == 1
    assert "no number" in result.output and "addmm, both: wrong: y: ours max" in result.output
    assert (tmp_path / "rows.csv").read_text().count("wrong: y") == 1


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--shape", "1024"], "such as 1024x4096, got '1024'"),
        (["--shape", "64x48", "--rank", "64"], "rank must be at most min(in, out) = 48"),
        (["--model", "bert"], "unknown model 'bert'"),
        (["--dtype", "int8"], "dtype must be one of fp32, fp16, bf16"),
        (["--mode", "train"], "--mode must be one of forward, backward, both"),
        (["--dropout", "1"], "dropout must lie in [0, 1)"),
        (["--provider", "peft"], "provider must be one of"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
    ],
)
def test_mistakes_with_bench(words: list[str], hint: str) -> None:
    assert hint in told(run("bench", *words), 2)


def test_bench_tells_when_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("bench", *SMALL, "--provider", "frozen", "--json", str(tmp_path / "file" / "rows.json"))
    assert result.exit_code == 2 and "could not be written" in result.stderr


@no_gpu
def test_a_gpu_that_is_needed_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "no CUDA device here" in told(run("bench", "--device", "cuda"), 3)
    assert "route 'split' cannot run here" in told(run("bench", "--provider", "split"), 3)


def test_an_unknown_option_is_a_usage_error() -> None:
    assert run("bench", "--tokenz", "3").exit_code == 2


def test_help_names_every_model() -> None:
    output = run("bench", "--help").output
    assert all(name in output for name in MODELS)
