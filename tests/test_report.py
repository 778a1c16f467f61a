"""Results become tables, CSV, pictures and a page; what does not belong together is refused; nothing is made up."""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench import readme
from bench.stages import ROOT
from lowrank_fused import cli
from lowrank_fused.benchmark import Case, Row, document, write_json
from lowrank_fused.benchmark.block import BlockCase
from lowrank_fused.report import load, pictures, tables, write_report
from lowrank_fused.report.judged import judge

LAYER = Case(4096, 4096, 8192, 16, 0.0, torch.bfloat16, label="q_proj")
BLOCK = BlockCase(4096, 14336, 8192, 16, 0.1, torch.bfloat16, label="block", kv_features=1024)
CPU = {"cpu": "Some Processor", "torch_threads": 2, "torch": "2.13.0", "gpus": []}
H100 = {**CPU, "gpus": [{"name": "NVIDIA H100 80GB HBM3", "clock_sm_mhz": "1755", "clock_sm_max_mhz": "1980"}]}
TIMES = {"frozen": 1.0, "eager": 1.5, "three-gemm": 1.3, "auto": 1.2}


def rows_of(case: Case, times: dict[str, float] | None = None, device: str = "cpu", **more: Any) -> list[Row]:
    """Rows with these medians, a range of 10 % about them, and no ratios yet."""
    found = []
    for name, ms in (times or TIMES).items():
        found.append(Row.of(case, name, "both", ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms, rounds=5, **more))
        found[-1].device = device
    return found


def written(path: Path, rows: list[Row], environment: dict[str, Any], **more: Any) -> Path:
    write_json(path, document(rows, environment, ["lowrank-fused", "bench"], **more))
    return path


def store_of(path: Path, stages: dict[str, dict[str, Any]], environment: dict[str, Any] = H100) -> Path:
    cases = {
        stage: {name: {"status": "ok", "result": result} for name, result in found.items()}
        for stage, found in stages.items()
    }
    write_json(path, {"environment": environment, "commit": "abc", "command": [], "time": "now", "stages": cases})
    return path


LAUNCH = {"route": "split:forward", "kernel": "shrink", "us": 25.0, "bytes": 50_000_000, "flops": 10**9}
KERNELS = {
    "in_features": 4096, "out_features": 4096, "tokens": 8192, "rank": 16, "dropout": 0.1, "dtype": "bf16",
    "launches": [LAUNCH], "e_forward": 0.96, "beta1_cost_forward": 0.02,
}  # fmt: skip


@pytest.fixture
def gpu_results(tmp_path: Path) -> Any:
    stages = {
        "kernels": {"ceilings": {"copy_gb_per_s": 2500.0, "gemm_tflops": 700.0}, "a layer": KERNELS},
        "block": {"M8192": [asdict(row) for row in rows_of(BLOCK, device="cuda")]},
        "layers": {"q": [asdict(row) for row in rows_of(LAYER, device="cuda")], "lorafusion": {"skipped": "why"}},
    }
    return load([store_of(tmp_path / "gpu_check.json", stages)])


def table(results: Any, title: str) -> list[dict[str, str]]:
    found = next(t for t in tables(results) if t.title == title)
    return [dict(zip(found.header, row, strict=True)) for row in found.rows]


def test_ratios_of_a_bench_file(tmp_path: Path) -> None:
    results = load([written(tmp_path / "a.json", rows_of(LAYER), CPU)])
    ours = next(row for row in results.rows if row.provider == "auto")
    assert ours.speedup == pytest.approx(1.5 / 1.2) and ours.overhead == pytest.approx(1.2)
    assert ours.speedup_p20 == pytest.approx(1.5 / 1.32) and ours.speedup_p80 == pytest.approx(1.5 / 1.08)
    shown = {row["provider"]: row for row in table(results, "Layers")}
    assert shown["auto"]["over eager"] == "1.25x" and shown["auto"]["over frozen"] == "1.20x"
    assert shown["frozen"]["over eager"] == "" and "of the limit" not in shown["auto"], "a CPU has no known limit"
    assert judge(results) == [] and "Goal lines" not in {t.title for t in tables(results)}


def test_ratios_in_the_file_are_kept(tmp_path: Path) -> None:
    rows = rows_of(LAYER)
    rows[-1].speedup = 1.27  # the median of ratios within rounds, which is not the ratio of medians
    assert load([written(tmp_path / "a.json", rows, CPU)]).rows[-1].speedup == 1.27


def test_adapters_of_one_dtype_are_compared(tmp_path: Path) -> None:
    rows = rows_of(LAYER, {**TIMES, "eager-fp32": 2.4, "auto-fp32": 1.2})
    found = {row.provider: row for row in load([written(tmp_path / "a.json", rows, CPU)]).rows}
    assert found["auto-fp32"].speedup == pytest.approx(2.0)


def test_clocks_are_not_mixed(tmp_path: Path) -> None:
    cold = rows_of(LAYER, clock="CUDA events, cold L2", device="cuda")
    graph = rows_of(LAYER, {"eager": 1.0, "auto": 0.5}, clock="CUDA graph, cold L2", device="cuda")
    results = load([written(tmp_path / "a.json", [*cold, *graph], H100)])
    ratios = {(row.clock, row.provider): row.speedup for row in results.rows}
    assert ratios["CUDA events, cold L2", "auto"] == pytest.approx(1.25)
    assert ratios["CUDA graph, cold L2", "auto"] == pytest.approx(2.0)


def test_the_limit_is_what_arithmetic_and_traffic_allow(gpu_results: Any) -> None:
    layer = next(row for row in gpu_results.rows if row.what == "layer" and row.provider == "auto")
    # Two GEMMs of 2·8192·4096² FLOP and three passes of rank 16 over either side, at 790 TFLOP/s.
    flops = 4 * 8192 * 4096**2 + 3 * 2 * 8192 * 16 * 8192
    assert gpu_results.limit_ms(layer) == pytest.approx(1e3 * flops / 790e12)
    assert gpu_results.share_of_limit(layer) == pytest.approx(1e3 * flops / 790e12 / 1.2)
    assert {row["provider"]: row["of the limit"] for row in table(gpu_results, "Layers")}["frozen"] == ""
    narrow = Row.of(Case(64, 64, 8192, 8, 0.0, torch.bfloat16), "auto", "forward")
    assert gpu_results.limit_ms(narrow) == pytest.approx(1e3 * 2 * (2 * 8192 * 64 + 64 * 64) / 3.0e12)


def test_goal_lines_stand_beside_measurements(gpu_results: Any) -> None:
    lines = {(row["against"], row["linears"], row["dropout"]): row for row in table(gpu_results, "Goal lines")}
    q = lines["PEFT", "q_proj, o_proj", "0"]
    assert (q["must"], q["aim"], q["measured"], q["reaches"]) == ("1.25x", "1.33x", "1.250x (auto)", "must")
    block = lines["frozen", "block", "0.1"]
    assert (block["aim"], block["measured"], block["reaches"]) == ("1.08x", "1.200x (auto)", "below must")
    trainers = next(row for key, row in lines.items() if key[0].startswith("three GEMMs") and key[2] == "0.1")
    assert trainers["measured"] == "1.083x (auto)", "against the provider three-gemm, not against our route addmm"
    absent = [row for row in lines.values() if row["measured"] == "not offered"]
    assert {(row["linears"], row["aim"]) for row in absent} == {
        ("q_proj, o_proj", "1.5x"), ("gate_proj, up_proj", "1.5x"),
    }  # fmt: skip
    assert all("no frozen forward in fp8" in row["against"] for row in absent)
    empty = [row for row in lines.values() if row["measured"] == "not measured"]
    assert len(empty) == len(lines) - len(absent) - 6 and not any(row["reaches"] for row in (*empty, *absent))
    assert any(row["against"].startswith("lorafusion") for row in empty) and lines["frozen", "block", "0"] in empty
    note = next(t.note for t in tables(gpu_results) if t.title == "Goal lines")
    told = f"6 of {len(lines)} goal lines measured, 3 of these reach must or better, {len(absent)} for what"
    assert told in note, "4096 -> 4096 is q_proj too, measured once and judged twice"


def test_goals_at_the_sizes_of_others_stand_beside_what_was_measured_there(tmp_path: Path) -> None:
    case = Case(5120, 5120, 2048, 16, 0.1, torch.bfloat16)
    path = written(tmp_path / "a.json", rows_of(case, {**TIMES, "lorafusion": 1.26}, device="cuda"), H100)
    judged = {(j.goal.baseline, j.goal.scope): j for j in judge(load([path])) if j.tokens == 2048 and j.dropout}
    own, eager = judged["lorafusion", "5120 -> 5120"], judged["eager", "5120 -> 5120"]
    assert (own.measured, own.standing) == (pytest.approx(1.05), "must")
    assert (eager.measured, eager.standing) == (pytest.approx(1.25), "below must")
    assert judged["lorafusion", "8192 -> 8192"].standing == "not measured"


def test_goal_lines_are_of_one_gpu(tmp_path: Path) -> None:
    other = {**CPU, "gpus": [{"name": "Some Other GPU"}]}
    assert judge(load([written(tmp_path / "a.json", rows_of(LAYER, device="cuda"), other)])) == []
    a100 = {**CPU, "gpus": [{"name": "NVIDIA A100-SXM4-80GB"}]}
    found = judge(load([written(tmp_path / "b.json", rows_of(BLOCK, device="cuda"), a100)]))
    assert {j.goal.gpu for j in found} == {"A100"} and found[1].measured == pytest.approx(1.25)


def test_kernels_of_a_check(gpu_results: Any, tmp_path: Path) -> None:
    (kernel,) = table(gpu_results, "Kernels")
    assert (kernel["GB/s"], kernel["of a copy"], kernel["TFLOP/s"]) == ("2,000", "80 %", "40.0")
    (gemm,) = table(gpu_results, "Main GEMMs")
    assert (gemm["e forward"], gemm["e backward"], gemm["beta = 1 costs, forward"]) == ("0.960", "", "+2.0 %")
    write_report(gpu_results, tmp_path / "out")
    (line,) = csv.DictReader((tmp_path / "out" / "kernels.csv").open())
    assert float(line["gb_per_s"]) == 2000 and line["kernel"] == "shrink"


def test_what_failed_is_told(tmp_path: Path) -> None:
    rows = [*rows_of(LAYER), Row.of(LAYER, "split", "both", status="wrong: y: off")]
    results = load([written(tmp_path / "a.json", rows, CPU, wrong=["peft, a layer: no"])])
    told = " ".join(" ".join(row.values()) for row in table(results, "Without a number"))
    assert "split wrong: y: off" in told and "a layer: no" in told
    assert "split" not in {row["provider"] for row in table(results, "Layers")}


def entry(case: Case, provider: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    extra = {key: value for key, value in asdict(Row.of(case, provider, "both")).items() if value is not None}
    return {"name": f"test[{provider}]", "extra_info": extra | more, "stats": {"data": seconds}}


def test_the_json_of_pytest_benchmark(tmp_path: Path) -> None:
    times = {"cold": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "graph, cold": {"p20": 0.5, "p50": 1.0, "p80": 1.5}}
    slow = {"cold": {"p20": 3.0, "p50": 3.0, "p80": 3.0}}
    entries = [entry(LAYER, "auto", [9.0], device_ms=times), entry(LAYER, "eager", [9.0], device_ms=slow)]
    for one in entries:
        one["extra_info"]["device"] = "cuda"
    content = {
        "machine_info": {"lowrank_fused": H100},
        "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": entries,
    }
    write_json(tmp_path / "gpu.json", content)
    found = {(row.provider, row.clock): row for row in load([tmp_path / "gpu.json"]).rows}
    assert found["auto", "CUDA events, cold L2"].speedup == pytest.approx(1.5)
    assert found["auto", "CUDA graph, cold L2"].speedup is None, "its rival was not timed with that clock"
    entries = [entry(LAYER, "auto", [0.001, 0.002, 0.003]), entry(LAYER, "eager", [0.004] * 3)]
    write_json(tmp_path / "cpu.json", {**content, "machine_info": {"lowrank_fused": CPU}, "benchmarks": entries})
    auto = load([tmp_path / "cpu.json"]).rows[0]
    assert (auto.ms_p50, auto.rounds, auto.clock) == (2.0, 3, "wall clock") and auto.speedup == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a result file"),
        ('{"results": []}', "is not a result file"),
        ('{"rows": [], "environment": {}}', "has no rows"),
        ('{"rows": [{"label": "x"}], "environment": {}}', "row 1 has another schema: device, "),
        ('{"rows": [3], "environment": {}}', "row 1 has another schema"),
        ('{"benchmarks": [], "machine_info": {}}', "has no benchmarks"),
        ('{"benchmarks": [{"name": "test_x"}]}', "was not recorded by this package"),
        ('{"stages": {"tests": {"shrink": {"status": "ok", "result": {"passed": 3}}}}, "environment": {"gpus": []}}',
         "no stage of the check that measures"),
    ],
)  # fmt: skip
def test_bad_files_are_told(content: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(hint)) as told:
        load([path])
    assert "a.json" in str(told.value) or "GPU" in str(told.value)


def test_bad_mixtures_are_told(tmp_path: Path) -> None:
    on_cpu = written(tmp_path / "cpu.json", rows_of(LAYER), CPU)
    on_gpu = written(tmp_path / "gpu.json", rows_of(LAYER, device="cuda"), H100)
    with pytest.raises(ValueError, match="come from 2 devices .*Some Processor.*H100"):
        load([on_cpu, on_gpu])
    half = {"eager": 1.5, "auto": 1.0}
    both = [*rows_of(LAYER, half), *rows_of(LAYER, half, device="cuda")]
    with pytest.raises(ValueError, match=r"mixes devices \(cpu, cuda\)"):
        load([written(tmp_path / "both.json", both, H100)])
    two = {**CPU, "gpus": [*H100["gpus"], {"name": "NVIDIA A100"}]}
    with pytest.raises(ValueError, match=r"several GPUs \(NVIDIA A100, NVIDIA H100 80GB HBM3\)"):
        load([written(tmp_path / "two.json", rows_of(LAYER, device="cuda"), two)])
    with pytest.raises(ValueError, match="does not say of which"):
        load([written(tmp_path / "none.json", rows_of(LAYER, device="cuda"), CPU)])
    with pytest.raises(ValueError, match="nothing was measured"):
        load([written(tmp_path / "no.json", [Row.of(LAYER, "auto", "both", status="failed")], CPU)])
    with pytest.raises(ValueError, match="at least one"):
        load([])
    with pytest.raises(ValueError, match=r"gone\.json cannot be read"):
        load([tmp_path / "gone.json"])


class Page(HTMLParser):
    """Tags, addresses and text of a page; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_else(gpu_results: Any, tmp_path: Path) -> None:
    paths = write_report(gpu_results, tmp_path / "out")
    assert {path.name for path in paths} == {
        "report.html", "speedup.png", "overhead.png", "roofline.png", "rows.csv", "kernels.csv"
    }  # fmt: skip
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object"} and "url(" not in text and "@import" not in text
    assert len(page.addresses) == 3
    for address, name in zip(page.addresses, ("speedup", "overhead", "roofline"), strict=True):
        kind, data = address.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / "out" / f"{name}.png").read_bytes()
    words = " ".join(page.words)
    for fact in ("NVIDIA H100 80GB HBM3", "torch 2.13.0", "abc", "1755", "1980", "not measured", "Goal lines"):
        assert fact in words, fact
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text


def test_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    case = Case(64, 64, 8, 4, label="<b>&")
    results = load([written(tmp_path / "a.json", rows_of(case), {**CPU, "cpu": "A & <i>B"})])
    write_report(results, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;&amp;, 64 -&gt; 64" in text


def test_a_picture_that_nothing_fills_is_left_out(tmp_path: Path) -> None:
    alone = load([written(tmp_path / "a.json", rows_of(LAYER, {"auto": 1.0}), CPU)])
    assert pictures.speedup(alone) is None and pictures.overhead(alone) is None
    assert {path.name for path in write_report(alone, tmp_path / "out")} == {"report.html", "roofline.png", "rows.csv"}
    assert "Nothing here fills the pictures speedup and overhead" in (tmp_path / "out" / "report.html").read_text()


def run(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, ["report", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_results_in_this_repository(tmp_path: Path) -> None:
    for name in ("cpu/cpu.json", "methods/methods.json"):
        result = run(ROOT / "bench" / "results" / name, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name / "report.html").is_file() and "Goals of the run itself" in result.output
    assert (tmp_path / "cpu/cpu.json" / "speedup.png").is_file()


def test_a_fresh_measurement(tmp_path: Path) -> None:
    words = ["bench", "--shape", "64x48", "-t", "32", "-t", "16", "-r", "8", "--seconds", "0", "--device", "cpu"]
    assert CliRunner().invoke(cli.app, [*words, "--json", str(tmp_path / "b.json")]).exit_code == 0
    result = run(tmp_path / "b.json", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "64 -> 48, 32 tokens, rank 8" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html", "speedup.png", "overhead.png", "roofline.png", "rows.csv"
    }  # fmt: skip
    found = json.loads(run(tmp_path / "b.json", "--json").stdout)
    assert [t["title"] for t in found] == ["Measured on", "Layers"] and len(found[1]["rows"]) == 2 * 5


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    result = run(tmp_path / "gone.json")
    assert result.exit_code == 2 and "gone.json cannot be read" in result.stderr and "Traceback" not in result.output
    source = written(tmp_path / "a.json", rows_of(LAYER), CPU)
    result = run(source, "--out", source)
    assert result.exit_code == 2 and "could not be written" in result.stderr


def test_the_readme_says_what_was_measured(gpu_results: Any, tmp_path: Path) -> None:
    assert readme.main(["--check"]) == 0, "run python -m bench.readme"
    (tmp_path / "none").mkdir()
    assert readme.measured_text(tmp_path / "none") == readme.NOTHING + "\n" and "not measured yet" in readme.NOTHING
    rows = [asdict(r) for p in (0.0, 0.1) for r in rows_of(replace(BLOCK, dropout=p), device="cuda")]
    few = [asdict(r) for r in rows_of(replace(BLOCK, tokens=1024, dropout=0.0), {"eager": 9, "auto": 1}, "cuda")]
    store_of(tmp_path / "h100" / "gpu_check.json", {"block": {"a": rows, "b": few}})
    store_of(tmp_path / "empty" / "gpu_check.json", {"tests": {"a": {"passed": 1}}})
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    words = ["--readme", str(page), "--results", str(tmp_path)]
    assert readme.main([*words, "--check"]) == 1 and "old" in page.read_text()
    assert readme.main(words) == 0 and readme.main([*words, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "NVIDIA H100 80GB HBM3, SM clock 1755 of 1980 MHz; torch 2.13.0" in text
    assert "| block 4096 -> 14336, rank 16, bf16, auto, 8192 tokens | 1.25x | 1.20x | 1.25x | 1.20x |" in text
    with pytest.raises(ValueError, match="must have the marks"):
        readme.updated("no marks", "x")
