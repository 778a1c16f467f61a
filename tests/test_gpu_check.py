"""The GPU check without a GPU: its stages run on small CPU layers; it stops, crashes and resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_graph, gpu_kernels, gpu_stages, stages
from bench.causal import CausalCase
from bench.gpu_stages import Setting
from bench.stages import Case, Stage, Store, run_stage
from lowrank_fused.benchmark import Step
from lowrank_fused.kernels.tables import read
from lowrank_fused.routes import unavailable

CPU = torch.device("cpu")
TINY_LLAMA = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
TINY_MODEL = CausalCase("llama-3-8b", batch=2, length=16, rank=4, settings=tuple(TINY_LLAMA.items()))


def pretended(run: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
    """What a CUDA graph does, without one: each replay computes anew, into the tensors of the capture."""
    result = run()
    tensors = result if isinstance(result, tuple) else (result,)

    def replay(_: Any) -> None:
        again = run()
        for old, new in zip(tensors, again if isinstance(again, tuple) else (again,), strict=True):
            old.data.copy_(new)

    return Step(replay), result


TINY = Setting(
    device=CPU,
    shapes=((64, 48), (48, 80)),
    tokens=(33, 1),
    ranks=(8, 4),
    routes=("reference", "addmm"),
    timed_tokens=(33,),
    timed_ranks=(8,),
    block=(64, 96, 32),
    steps=(TINY_MODEL,),
    memory=TINY_MODEL,
    budget_s=0.0,
    capture=pretended,
)


def fail() -> None:
    raise ValueError("no")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "gpu" / "gpu_check.json")


def statuses(store: Store, stage: str) -> dict[str, str]:
    return {name: result["status"] for name, result in store.cases(stage).items()}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 3
    assert "no CUDA device here" in capsys.readouterr().err


def test_a_stage_records_and_resumes(store: Store) -> None:
    ran: list[str] = []

    def noted(name: str) -> Case:
        return Case(name, lambda: ran.append(name) or {"n": len(ran)})  # type: ignore[func-returns-value]

    stage = Stage("s", "", [noted("a"), Case("b", fail), noted("c")])
    assert run_stage(stage, store, time.time() + 60)
    assert statuses(store, "s") == {"a": "ok", "b": "failed", "c": "ok"}
    assert store.cases("s")["b"]["error"] == "ValueError: no" and store.cases("s")["c"]["result"] == {"n": 2}
    again = Store(store.path)
    assert run_stage(stage, again, time.time() + 60) and ran == ["a", "c"]
    again.forget_bad("s")
    assert [case.name for case in again.left(stage)] == ["b"]
    assert Store(store.path, fresh=True).left(stage) == list(stage.cases)


def test_a_stage_stops_when_time_is_up(store: Store) -> None:
    stage = Stage("s", "", [Case("a", dict)])
    said: list[str] = []
    assert run_stage(stage, store, time.time() - 1, say=said.append)
    assert store.left(stage) and "1 of 1 cases left" in said[0]


def test_what_was_running_when_the_process_died_has_crashed(store: Store) -> None:
    stage = Stage("s", "", [Case("a", fail), Case("b", dict)])
    store.put("s", "a", status="running")
    run_stage(stage, Store(store.path), time.time() + 60)
    store.reload()
    assert statuses(store, "s") == {"a": "crashed", "b": "ok"}


def test_a_broken_device_ends_the_process(store: Store) -> None:
    stage = Stage("s", "", [Case("a", fail), Case("b", dict)])
    assert not run_stage(stage, store, time.time() + 60, healthy=lambda: False)
    assert statuses(store, "s") == {"a": "failed"}
    assert run_stage(stage, store, time.time() + 60), "a new process goes on behind it"
    assert statuses(store, "s") == {"a": "failed", "b": "ok"}


def test_results_of_other_code_are_dropped(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("s", "a", status="ok")
    assert Store(store.path).cases("s")
    monkeypatch.setattr(stages, "fingerprint", lambda: "another")
    assert not Store(store.path).cases("s")


def test_fingerprint_sees_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("lowrank_fused/methods", "kernels/tuned"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    seen = {stages.fingerprint()}
    for file in ("lowrank_fused/methods/new.py", "kernels/gemm.py", "kernels/tuned/sm_90.json"):
        (tmp_path / file).write_text("x")
        seen.add(stages.fingerprint())
    (tmp_path / "kernels/gemm.py").write_text("y")
    seen.add(stages.fingerprint())
    assert len(seen) == 5


def test_important_points_come_first() -> None:
    order = gpu_stages.by_priority((1, 2, 3), "ab")
    assert order[0] == (1, "a") and set(order[1:3]) == {(1, "b"), (2, "a")} and order[-1] == (3, "b")
    assert len(order) == 6


def test_the_real_plan_is_complete() -> None:
    plan = gpu_stages.stages(Setting())
    assert [stage.name for stage in plan] == [
        "tests", "correct", "sanitizer", "kernels", "tune", "block", "layers", "model", "memory", "graph"
    ]  # fmt: skip
    assert all(stage.seconds < 240 for stage in plan) and sum(stage.seconds for stage in plan) < 20 * 60
    for stage in plan:
        names = [case.name for case in stage.cases]
        assert len(set(names)) == len(names) > 0
    correct = [case.name for case in plan[1].cases]
    assert len(correct) == 4 * 3 * 5 * 2 * 3 * 3
    assert correct[0] == "split bf16 4096x4096 M8192 r16 p0"
    # Wide N tiles at rank 16 produced NaN on Hopper in the past: they belong to the first that are tried.
    assert "split bf16 4096x14336 M8192 r16 p0" in correct[:10]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store after all stages but pytest's own, compilation left out."""
    store = Store(tmp_path_factory.mktemp("finished") / "gpu_check.json")
    for stage in gpu_stages.stages(replace(TINY, tuned=store.path.with_name("tuned.json")))[1:]:
        cases = [case for case in stage.cases if not case.name.startswith("compile")]
        run_stage(Stage(stage.name, stage.what, cases), store, time.time() + 100)
    return store


def test_every_stage_runs(finished: Store) -> None:
    for stage in gpu_stages.stages(TINY)[1:]:
        assert set(statuses(finished, stage.name).values()) == {"ok"}, finished.cases(stage.name)
    json.loads(finished.path.read_text())


def test_a_wrong_route_fails_its_case(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_fused.benchmark import providers

    good = providers.lowrank_linear
    monkeypatch.setattr(providers, "lowrank_linear", lambda *given, **named: good(*given, **named) * 1.5)
    for stage in (gpu_stages.stages(TINY)[i] for i in (1, 5, 6)):
        first = Stage(stage.name, stage.what, stage.cases[:1])
        run_stage(first, store, time.time() + 60)
        assert set(statuses(store, stage.name).values()) == {"failed"}
        assert "ours max" in store.cases(stage.name)[stage.cases[0].name]["error"]


def test_results_of_the_stages(finished: Store) -> None:
    results = {
        name: [r["result"] for r in finished.cases(name).values()]
        for name in ("kernels", "tune", "layers", "model", "memory")
    }
    assert results["kernels"][0]["copy_gb_per_s"] > 0
    assert [o["what"] for o in results["tune"][0]["outcomes"]] == ["forward", "backward"]
    table = read(finished.path.with_name("tuned.json"))
    assert len(table.routes) == 2 * len(results["tune"]) and table.measured() == table
    assert [64, 32, 32] in [row["n"] for row in table.routes] and {o["refused"] == {} for o in results["tune"]} == {
        True
    }
    assert set(results["kernels"][1]["library_us"]) == {
        "mm:forward",
        "addmm:forward",
        "mm:backward",
        "addmm:backward",
    }
    assert {row["provider"] for row in results["layers"][0]} >= {"frozen", "eager", "addmm"}
    steps = {row["provider"]: row for row in results["model"][0]}
    assert {"frozen", "eager", "eager-fp32", "accelerate", "accelerate-fp32", "inject", "grouped"} == set(steps)
    assert steps["frozen"]["ms_p50"] < steps["eager"]["ms_p50"] and steps["inject"]["speedup"] > 0
    kept = results["memory"][1]
    assert kept["inject"]["kept_bytes_per_token"] < kept["eager"]["kept_bytes_per_token"], "with dropout"


def frozen_seed(run: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
    """A graph that draws the same random numbers in every replay."""

    def repeated() -> Any:
        torch.manual_seed(7)
        return run()

    return pretended(repeated, device)


def test_replays_with_one_mask_are_found_out() -> None:
    layer = TINY.layer((64, 48), 33, 8, 0.1, torch.float32)
    found = gpu_graph.replayed_masks("addmm", layer, pretended)
    assert len(found["kept"]) == 2 * gpu_graph.REPLAYS and min(found["different_from_the_replay_before"]) > 0.1
    with pytest.raises(AssertionError, match="replays repeat their masks"):
        gpu_graph.replayed_masks("addmm", layer, frozen_seed)


@pytest.mark.parametrize(("broken", "what"), [(0, "mask of y"), (2, "mask of dA")])
def test_a_replay_whose_masks_disagree_is_found_out(broken: int, what: str) -> None:
    def disagreeing(run: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
        return pretended(lambda: tuple(t * (1.05 if i == broken else 1.0) for i, t in enumerate(run())), device)

    layer = TINY.layer((64, 48), 33, 8, 0.1, torch.float32)
    with pytest.raises(AssertionError, match=what):
        gpu_graph.replayed_masks("addmm", layer, disagreeing)


def test_a_graph_that_needs_an_earlier_one_is_found_out() -> None:
    """The second graph computes what it should only once the first has run."""
    started: list[bool] = []

    def dependent(run: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
        step, result = pretended(run, device)
        place = len(started)
        started.append(False)

        def replay(given: Any) -> None:
            step.run(given)
            started[place] = True
            if not all(started[: place + 1]):
                result[2].mul_(0.0)

        return Step(replay), result

    layer = TINY.layer((64, 48), 33, 8, 0.1, torch.float32)
    with pytest.raises(AssertionError, match="mask of dA"):
        gpu_graph.replayed_masks("addmm", layer, dependent)


def test_a_replay_that_does_not_train_is_found_out() -> None:
    def idle(run: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
        return Step(lambda _: None), run()

    with pytest.raises(AssertionError, match="left 14 of 14 factors"):
        gpu_graph.replayed_step(TINY_MODEL, idle, 0.0)


FAKE_SANITIZER = """#!/bin/sh
# compute-sanitizer --tool NAME --error-exitcode N COMMAND...
echo "$2" >> "$0.log"; shift 4
"$@" || exit 9
echo "ERROR SUMMARY: 0 errors"
"""


def test_the_sanitizer_runs_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as nowhere:
        nowhere.setattr(shutil, "which", lambda name: None)
        assert gpu_stages.sanitize("memcheck", "addmm", "cpu") == {"skipped": "compute-sanitizer is not installed"}
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE_SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_stages.sanitize("racecheck", "addmm", "cpu") == {"report": ["ERROR SUMMARY: 0 errors"]}
    assert (tmp_path / "compute-sanitizer.log").read_text() == "racecheck\n"
    with pytest.raises(RuntimeError, match="(?s)memcheck exit 9: .*no_such_route"):
        gpu_stages.sanitize("memcheck", "no_such_route", "cpu")


@pytest.mark.skipif(
    unavailable("split", CPU, torch.float32) is not None and not torch.cuda.is_available(),
    reason="needs Triton, interpreting or on a GPU",
)
def test_kernels_are_timed_one_by_one() -> None:
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    layer = Setting(device=device).layer((32, 24), 9, 4, 0.1, torch.float32)
    found = gpu_kernels.time_kernels(layer, ("thin", "split"), budget_s=0.0, min_rounds=1)
    routes = [row["route"] for row in found["launches"]]
    assert routes.count("split:forward") == 2 and routes.count("split:backward") == 3
    assert routes.count("thin:forward") == 2 and routes.count("thin:backward") == 2
    assert all(row["us"] > 0 and row["gb_per_s"] > 0 and row["tile"] for row in found["launches"])
    assert found["e_forward"] > 0 and found["e_backward"] > 0


def test_the_summary_tells_the_exit_status(store: Store) -> None:
    from rich.console import Console

    plan = [Stage("s", "what", [Case("a", dict), Case("b", fail)])]
    console = Console(record=True, width=120)
    assert gpu_check.summary(plan, store, console) == 4
    store.put("s", "a", status="ok", result={})
    store.put("s", "b", status="ok", result={})
    assert gpu_check.summary(plan, store, console) == 0
    store.put("s", "b", status="crashed", error="gone [red]")
    assert gpu_check.summary(plan, store, console) == 1
    assert "s: b: gone [red]" in console.export_text()


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Stage("one", "", [Case("a", lambda: {"x": 1})]), Stage("two", "", [Case("b", fail)])]
    monkeypatch.setattr(gpu_check, "stages", lambda setting: plan)
    monkeypatch.setattr(
        gpu_check, "run_apart", lambda stage, store, out, until: gpu_check.run_here(stage, store, until, CPU)
    )

    def check(*words: str) -> tuple[int, dict[str, Any]]:
        words = (*words, "--out", str(tmp_path))
        status = gpu_check.check_device(CPU, TINY, gpu_check.parse(words), words)
        path = tmp_path / "cpu" / "gpu_check.json"
        return status, json.loads(path.read_text()) if path.is_file() else {}

    assert check("--stage", "three")[0] == 2
    status, content = check()
    assert status == 1 and content["stages"]["one"]["a"]["result"] == {"x": 1}
    assert {"environment", "commit", "command", "time", "fingerprint", "gpus_after_stage"} <= set(content)
    plan[1] = Stage("two", "", [Case("b", dict)])
    assert check()[0] == 1, "a failure stays until it is retried"
    assert check("--retry")[0] == 0
    assert check("--fresh", "--minutes", "0")[0] == 4, "no time: nothing is done"


def test_a_stage_in_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    """The first process dies in case a, the second asks for a new one after b, the third finishes."""
    stage = Stage("s", "", [Case(name, dict) for name in "abc"])
    store.save()
    status = iter([-9, gpu_check.NEW_PROCESS, 0, 1])

    def process(command: list[str], seconds: float) -> int:
        assert command[1:4] == ["-m", "bench.gpu_check", "--stage"] and 0 < seconds <= 60 + gpu_check.GRACE_SECONDS
        child = Store(store.path)
        if (code := next(status)) != 1:
            name = child.left(stage)[0].name
            child.put("s", name, status="running" if name == "a" else "ok")
        return code

    monkeypatch.setattr(gpu_check, "run_group", process)
    gpu_check.run_apart(stage, store, tmp_path, time.time() + 60)
    assert statuses(store, "s") == {"a": "crashed", "b": "ok", "c": "ok"}
    gpu_check.run_apart(Stage("t", "", stage.cases), store, tmp_path, time.time() + 60)
    assert not store.cases("t"), "a process that cannot even begin is not started again and again"


def test_a_hanging_process_is_stopped_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check.run_group([sys.executable, "-c", parent], 0.5)
    time.sleep(1.6)
    assert not mark.exists()


def test_a_case_that_hangs_ends_its_process(tmp_path: Path) -> None:
    program = f"""
import time
from collections.abc import Callable
from pathlib import Path
from bench.stages import Case, Stage, Store, run_stage
cases = [Case("quick", dict), Case("hangs", lambda: time.sleep(60)), Case("behind", dict)]
stage, store = Stage("s", "", cases, case_seconds=0.5), Store(Path({str(tmp_path / "r.json")!r}))
run_stage(stage, store, time.time() + 60, watchdog=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=stages.ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and "Timeout" in done.stderr and "<lambda>" in done.stderr
    store = Store(tmp_path / "r.json")
    store.settle("s")
    assert statuses(store, "s") == {"quick": "ok", "hangs": "crashed"}


def test_kernel_tests_report(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "shrink": (0, "12 passed, 3 skipped in 4s"),
        "expand": (1, "1 failed, 2 passed"),
        "linear": (5, "nothing"),
    }

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        keyword = command[command.index("-k") + 1].split()[0]
        return subprocess.CompletedProcess(command, answers[keyword][0], answers[keyword][1], "")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_stages.run_tests("shrink") == {"passed": 12, "skipped": 3}
    for keyword in ("expand", "linear"):
        with pytest.raises(RuntimeError, match=f"pytest exit {answers[keyword][0]}"):
            gpu_stages.run_tests(keyword)


def test_folder_name() -> None:
    assert gpu_check.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
