"""The tuner: who wins, what is written when, what an interrupted run leaves, and what the command tells."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowrank_fused import cli, tuning
from lowrank_fused.benchmark import Case, Step
from lowrank_fused.benchmark.linears import check_linears
from lowrank_fused.benchmark.timing import cpu_clock
from lowrank_fused.kernels import measured
from lowrank_fused.kernels.tables import Table, read, shipped_path
from lowrank_fused.routes import ROUTES, by_model, choose_for_group
from lowrank_fused.target import Target
from lowrank_fused.tools.model_shapes import LinearShape
from lowrank_fused.tuning import Measuring, Store, cases_for, dump, shipped_table, tune, verdict
from lowrank_fused.tuning import run as tuner
from lowrank_fused.tuning.group import GroupCase, GroupProvider
from lowrank_fused.tuning.store import key_of

CPU = torch.device("cpu")
CASE = Case(in_features=48, out_features=40, tokens=33, rank=4, label="q")
LIBRARY = {"forward": ("addmm", "reference"), "backward": ("addmm", "reference")}
SOURCE = {
    "kind": "measured", "gpu": "a clock", "date": "2026-01-02", "torch": "2", "triton": "3", "driver": None,
    "lowrank_fused": "0.1.0", "commit": "0",
}  # fmt: skip


def test_the_fastest_wins_if_it_beats_the_model_by_more_than_noise() -> None:
    times = {"addmm": [10.0, 10.0], "thin": [9.7, 9.7], "split": [9.6, 9.6]}
    assert verdict(times, "thin").winner == "thin", "1 % is noise"
    assert verdict(times, "addmm").winner == "split"
    assert verdict(times, "single").winner == "split", "the model's choice got no number"
    assert verdict(times, "addmm").us == {"addmm": 10000, "thin": 9700, "split": 9600}
    assert verdict(times, "addmm").gain == pytest.approx(10 / 9.6) and verdict(times, "single").gain is None


def test_drift_that_hits_all_alike_decides_nothing() -> None:
    """Medians alone would call the second one faster: its slow rounds are everybody's."""
    assert verdict({"addmm": [1, 1, 1, 9, 9], "thin": [1.1, 1.1, 1.1, 9.9, 9.9]}, "addmm").winner == "addmm"


def test_nobody_slower_than_the_floor_stays() -> None:
    times = {"addmm": [10.0], "split": [10.1]}
    assert verdict(times, "split").winner == "split"
    assert verdict(times, "split", "addmm").winner == "addmm"
    assert verdict({**times, "split": [10.0]}, "split", "addmm").winner == "addmm", "as fast is not faster"
    assert verdict({**times, "split": [9.9]}, "split", "addmm").winner == "split"
    with pytest.raises(ValueError, match="nobody"):
        verdict({}, "split")


@dataclass
class FakeClock:
    """Runs a step and says how long the last one that asked took: milliseconds by name, 1 for any other."""

    ms: dict[str, float]
    ran: list[str] = field(default_factory=list)
    stop_at: int | None = None
    rounds: int = 3

    def named(self, name: str) -> Callable[[Step], float]:
        def clock(step: Step) -> float:
            step.run(step.prepare())
            self.ran.append(name)
            if self.stop_at is not None and len(self.ran) >= self.stop_at:
                raise KeyboardInterrupt
            return self.ms.get(name, 1.0)

        return clock


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Every contestant is timed by its name: "addmm forward", "lowrank_forward 16x64x64"."""
    clock = FakeClock({})

    def interleave(steps: dict[str, Step], _: Any, **more: Any) -> dict[str, list[float]]:
        return {name: [clock.named(name)(step) for _ in range(clock.rounds)] for name, step in steps.items()}

    monkeypatch.setattr(tuning.measure, "interleave", interleave)
    return clock


@pytest.fixture
def measuring() -> Measuring:
    return Measuring(CPU, cpu_clock, budget_s=0.0)


def store_at(path: Path, **changes: Any) -> Store:
    return Store(path, "sm_0", {**SOURCE, **changes})


def test_before_and_after_are_told_and_written(tmp_path: Path, fake: FakeClock, measuring: Measuring) -> None:
    fake.ms = {"addmm": 2.0, "reference": 1.5}
    store = store_at(tmp_path / "new" / "t.json")
    outcomes = list(tune([CASE], store, measuring, LIBRARY))
    told = [(o.what, o.before, o.before_us, o.after, o.after_us, o.gain, o.again) for o in outcomes]
    assert told == [(d, "addmm", 2000, "reference", 1500, pytest.approx(4 / 3), False) for d in LIBRARY]
    forward, backward = read(store.path).routes[::-1]
    assert forward == {
        "direction": "forward", "tokens": 32, "n": 40, "k": 48, "rank": 4, "dtype": "fp32", "dropout": False,
        "route": "reference", "us": 1500, "model": "addmm", "model_us": 2000, "addmm_us": 2000, "by": 0,
    }  # fmt: skip
    assert backward["direction"] == "backward" and read(store.path).provenance == [SOURCE]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, fake: FakeClock, measuring: Measuring) -> None:
    cases = [CASE, replace(CASE, tokens=64), replace(CASE, dropout=0.5)]
    path = tmp_path / "t.json"
    fake.stop_at = 16  # in the second case
    with pytest.raises(KeyboardInterrupt):
        list(tune(cases, store_at(path), measuring, LIBRARY))
    assert len(read(path).routes) == 2 and not list(tmp_path.glob("*.partial"))
    fake.stop_at, before = None, len(fake.ran)
    again = list(tune(cases, store_at(path, date="2026-01-03"), measuring, LIBRARY))
    assert [o.again for o in again] == [True, True, False, False, False, False]
    assert len(fake.ran) - before == 2 * 2 * 2 * 3 and len(read(path).routes) == 6
    assert [p["date"] for p in read(path).provenance] == ["2026-01-02", "2026-01-03"]
    before = len(fake.ran)
    assert all(o.again for o in tune(cases, store_at(path), measuring, LIBRARY)) and len(fake.ran) == before


def test_other_versions_are_measured_again(tmp_path: Path, fake: FakeClock, measuring: Measuring) -> None:
    path = tmp_path / "t.json"
    list(tune([CASE], store_at(path), measuring, LIBRARY))
    assert not any(o.again for o in tune([CASE], store_at(path, torch="3"), measuring, LIBRARY))
    assert len(read(path).routes) == 2 and [p["torch"] for p in read(path).provenance] == ["3"]


def test_a_table_of_another_gpu_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    store_at(path).put({"direction": "forward", **tuner._about(CASE, "forward"), "route": "addmm"})
    with pytest.raises(ValueError, match="is of a clock, sm_0, and this is another, sm_0; give another path"):
        store_at(path, gpu="another")
    assert Store(path, "sm_0", {**SOURCE, "gpu": "another"}, fresh=True).table.routes == []


def test_a_route_that_is_wrong_gets_no_number(tmp_path: Path, fake: FakeClock, measuring: Measuring) -> None:
    fake.ms = {"addmm": 2.0, "reference": 1.0}
    measuring.verdict_of = lambda provider, case: "wrong: dA" if provider.name == "reference" else "ok"
    outcomes = list(tune([CASE], store_at(tmp_path / "t.json"), measuring, LIBRARY))
    assert {o.after for o in outcomes} == {"addmm"} and set(fake.ran) == {"addmm"}
    assert measuring.refused == {"reference, q 48 -> 40, 33 tokens, rank 4, dropout 0, fp32": "wrong: dA"}
    measuring.verdict_of = lambda provider, case: "wrong: y"
    assert list(tune([replace(CASE, tokens=5)], store_at(tmp_path / "t.json"), measuring, LIBRARY)) == []


def test_timed_for_real_on_a_cpu(tmp_path: Path) -> None:
    """Without dropout the reference differentiates through more passes; who wins is not the point, that both ran is."""
    case = Case(256, 256, 512, rank=8)
    outcomes = list(tune([case], store_at(tmp_path / "t.json"), Measuring.on(CPU, budget_s=0.05), LIBRARY))
    assert [o.what for o in outcomes] == ["forward", "backward"] and all(o.after_us > 10 for o in outcomes)
    for o, row in zip(outcomes, read(tmp_path / "t.json").routes[::-1], strict=True):
        assert (row["us"], row["route"], row["model_us"]) == (o.after_us, o.after, row["addmm_us"])


KERNEL = Case(in_features=48, out_features=96, tokens=70, rank=4, dtype=torch.float16)


@pytest.mark.triton
def test_tiles_of_the_winner_are_measured(tmp_path: Path, fake: FakeClock, measuring: Measuring) -> None:
    """Interpreted: the tile asked for is the tile launched, a winner is checked, and the row is one that is used."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    fake.rounds, fake.ms = 1, {"addmm": 3.0, "split": 1.0, **{str(place): 5.0 for place in range(9)}, "4": 2.0}
    store = store_at(tmp_path / "t.json")
    routes = {"forward": ("addmm", "split")}
    outcomes = list(tune([KERNEL], store, measuring, routes))
    assert [(o.what, o.after) for o in outcomes[:1]] == [("forward", "split")] and measuring.refused == {}
    found = {row["kernel"]: row for row in read(store.path).tiles}
    gemm = found["lowrank_forward"]
    assert set(found) == {"lowrank_forward", "shrink"} and gemm["us"] == 2000 and gemm["model_us"] == 5000
    assert gemm["tile"]["block_m"] == 32 and outcomes[1].gain in (1.0, 2.5)
    assert (gemm["tokens"], gemm["n"], gemm["k"], gemm["rank"], gemm["variant"]) == (64, 96, 48, 4, "vectors")
    assert all(o.again for o in tune([KERNEL], store_at(store.path), measuring, routes))

    from lowrank_fused.kernels.launch import record
    from lowrank_fused.kernels.lowrank_forward import lowrank_forward

    operands = [torch.zeros(s, dtype=torch.float16) for s in ((70, 48), (96, 48), (70, 4), (96, 4))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measured._lookups, (0, ""), measured.Lookup([read(store.path)]))
        with record() as log:
            lowrank_forward(*operands)
    assert log[0].tile.block_m == 32


@pytest.mark.triton
def test_a_tile_that_is_wrong_gives_way_to_the_next(tmp_path: Path, fake: FakeClock, measuring: Measuring) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    fake.rounds, fake.ms = (
        1,
        {"addmm": 3.0, "split": 1.0, **{str(place): 5.0 for place in range(9)}, "4": 2.0, "3": 2.5},
    )
    checks: list[int] = []

    def judge(provider: Any, case: Any) -> str:
        checks.append(1)
        return "wrong: y" if len(checks) == 3 else "ok"  # after two routes; the tile of shrink is the model's

    measuring.verdict_of = judge
    list(tune([KERNEL], store_at(tmp_path / "t.json"), measuring, {"forward": ("addmm", "split")}))
    found = {row["kernel"]: row["us"] for row in read(tmp_path / "t.json").tiles}
    assert found["lowrank_forward"] == 2500 and len(checks) == 4
    assert [(name[:20], why) for name, why in measuring.refused.items()] == [("lowrank_forward Tile", "wrong: y")]


def test_layers_of_one_size_are_one_case() -> None:
    linears = [
        LinearShape(n, 64, out, bias=b, count=2)
        for n, out, b in (("out", 64, True), ("up", 32, False), ("down", 32, True))
    ]
    cases = cases_for(linears, [8, 8, 16], [4], [0.0, 0.1], torch.float32, CPU)
    assert [(c.label, c.out_features, c.tokens, c.dropout) for c in cases[:4]] == [
        ("out", 64, 8, 0.0), ("up, down", 32, 8, 0.0), ("out", 64, 8, 0.1), ("up, down", 32, 8, 0.1)
    ] and len(cases) == 8  # fmt: skip
    with pytest.raises(ValueError, match="dropout from none"):
        cases_for(linears, [8], [4], [0.1, 0.2], torch.float32, CPU)


QKV = [LinearShape(f"{n}_proj", 48, out, bias=False, count=2) for n, out in (("q", 32), ("k", 16), ("v", 16))]


def test_layers_that_share_x_are_a_case_too() -> None:
    wide = [replace(one, in_features=64, out_features=64) for one in QKV]
    assert [c.rank for c in cases_for(wide, [8], [42, 43], [0.0], torch.float32, CPU) if isinstance(c, GroupCase)] == [
        42
    ]
    cases = cases_for(QKV, [8], [4], [0.0], torch.float32, CPU)
    assert [(c.label, c.out_features, c.rank) for c in cases if isinstance(c, GroupCase)] == [
        ("q_proj + k_proj + v_proj", 64, 4)
    ]
    assert not any(isinstance(c, GroupCase) for c in cases_for(QKV, [8], [4], [0.0], torch.float32, CPU, groups=False))
    assert tuning.routes_by_direction(cases[-1])["forward"] in (("addmm",), ("addmm", "thin", "split"))


@pytest.mark.triton
def test_groups_are_measured_and_their_rows_are_found(
    tmp_path: Path, fake: FakeClock, measuring: Measuring, monkeypatch: pytest.MonkeyPatch, p: float = 0.25
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    (case,) = [c for c in cases_for(QKV, [17], [4], [p], torch.float16, CPU) if isinstance(c, GroupCase)]
    fake.rounds, fake.ms = 1, {"addmm": 3.0, "thin": 2.0, "split": 1.0}
    timed: list[int] = []
    monkeypatch.setattr(tuning.measure, "_run", lambda launch, _: timed.append(launch.args.get("N")))
    store = store_at(tmp_path / "t.json")
    routes = {"forward": ("addmm", "thin", "split"), "backward": ("addmm", "thin", "split")}
    outcomes = list(tune([case], store, measuring, routes))
    assert measuring.refused == {} and [o.after for o in outcomes if o.what in routes] == ["split", "split"]
    kernels = {o.what for o in outcomes}
    assert {"shrink", "lowrank_forward", "grad_input"} <= kernels
    products = [row["n"] for row in store.table.tiles if row["kernel"] == "lowrank_forward"]
    assert sorted(products) == [16, 32] and timed.count(32) == 6, "q's tiles on q's product, those of k and v on theirs"
    row = store.table.routes[0]
    assert (row["n"], row["rank"], row["k"], row["dropout"]) == ([32, 16, 16], [4, 4, 4], 48, p > 0)
    monkeypatch.setitem(measured._lookups, (90, "a clock"), measured.Lookup([read(store.path)]))
    monkeypatch.setattr("lowrank_fused.routes.target_of", lambda device: Target(90, True, "a clock"))
    shapes = [(32, 4), (16, 4), (16, 4)]
    assert choose_for_group("auto", 17, 48, shapes, torch.float16, p > 0, CPU) == ("split", "split")


def test_a_wrong_group_is_found_out() -> None:
    class Wrong(GroupProvider):
        def __call__(self, o: Any, dropout_p: float) -> Any:
            *others, last = super().__call__(o, dropout_p)
            return *others, last * 1.01

    case = GroupCase(48, 128, 33, 4, 0.25, members=(64, 32, 32))
    check_linears(GroupProvider("addmm"), case)
    with pytest.raises(AssertionError, match="y of 2"):
        check_linears(Wrong("addmm"), case)


@pytest.mark.parametrize("arch", tuning.TARGETS)
def test_the_shipped_table_is_what_the_command_writes(arch: int) -> None:
    text = shipped_path(arch).read_text(encoding="utf-8")
    assert text == dump(shipped_table(arch)), "lowrank-fused tune --write-shipped kernels/tuned"
    assert len(text) < 100_000
    table = read(shipped_path(arch))
    assert len(table.routes) > 300 and table.gpu is None and table.target == f"sm_{arch}"
    assert all(table.provenance[row["by"]]["kind"] in ("measured", "model") for row in table.routes)
    assert not any(row["by"] for row in table.measured().routes), "no row of a model counts as measured"


def test_measured_rows_take_the_place_of_the_models() -> None:
    plain = shipped_table(90)
    row = {**plain.routes[7], "route": "addmm", "us": 3.0, "by": 0}
    other = {**row, "k": 7}
    merged = shipped_table(90, Table("sm_90", "a GPU", [SOURCE], [row, other], []))
    assert len(merged.routes) == len(plain.routes) + 1
    by_key = {key_of(found): found for found in merged.routes}
    assert by_key[key_of(row)] == row and merged.is_measured(by_key[key_of(other)])
    with pytest.raises(ValueError, match="rows for sm_80 cannot come from a table for sm_90"):
        shipped_table(80, Table("sm_90"))


def test_shipped_rows_say_what_the_model_says() -> None:
    for row in shipped_table(90).measured().routes + shipped_table(90).routes[:40]:
        sizes = (row["tokens"], row["n"], row["k"], row["rank"], torch.bfloat16, row["dropout"])
        assert row["route"] == by_model(row["direction"], *sizes, Target(90, True)) and row["route"] in ROUTES


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: FakeClock) -> Iterator[Callable[..., Any]]:
    """`lowrank-fused tune` on a CPU that it takes for a GPU."""
    fake.ms = {"addmm": 2.0, "reference": 1.0}
    monkeypatch.setattr(sys.modules["lowrank_fused.cli.tune"], "_device", lambda dry_run: CPU)
    monkeypatch.setattr(tuning, "routes_by_direction", lambda case: LIBRARY)
    monkeypatch.setenv("LOWRANK_FUSED_TUNED", str(tmp_path / "mine.json"))

    def run(*words: str) -> Any:
        options = ("tune", "--shape", "48x40", "-t", "8", "-r", "4", "--dtype", "fp32", "--seconds", "0")
        return CliRunner().invoke(cli.app, [*options, *words], env={"COLUMNS": "200", "TERM": "dumb"})

    yield run
    measured.forget()


def test_the_command_tells_before_and_after(command: Callable[..., Any], tmp_path: Path) -> None:
    result = command()
    assert result.exit_code == 0, result.output
    assert result.output.count("reference") == 2 and result.output.count("2.00x") == 2
    assert (
        "48 -> 40, 8 tokens, rank 4, dropout 0, fp32" in result.output and str(tmp_path / "mine.json") in result.output
    )
    assert "earlier run" not in result.output and command().output.count(" *") == 2
    told = json.loads(command("--json").stdout)
    assert told["complete"] and [o["gain"] for o in told["outcomes"]] == [2.0, 2.0]


def test_the_command_may_be_stopped(command: Callable[..., Any], fake: FakeClock, tmp_path: Path) -> None:
    fake.stop_at = 17
    result = command("-t", "16")
    assert result.exit_code == 130 and "goes on from here" in result.output
    assert len(read(tmp_path / "mine.json").routes) == 2


def test_the_command_writes_the_tables_that_ship(tmp_path: Path) -> None:
    row = {**tuner._about(replace(CASE, dtype=torch.bfloat16), "forward"), "route": "addmm", "by": 0}
    mine = tmp_path / "mine.json"
    mine.write_text(dump(Table("sm_90", "a GPU", [SOURCE], [row], [])))
    result = CliRunner().invoke(cli.app, ["tune", "--write-shipped", str(tmp_path), "--table", str(mine), "--json"])
    counts = json.loads(result.stdout)
    assert [count["measured"] for count in counts.values()] == [0, 0, 1, 0, 0]
    assert (tmp_path / "sm_80.json").read_text() == shipped_path(80).read_text()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 3, "no CUDA device here, so there is nothing to measure; --dry-run"),
        (["--dry-run", "--shape", "4096"], 2, "a shape must be"),
        (["--dry-run", "--model", "llama-9"], 2, "unknown model 'llama-9'"),
        (["--dry-run", "-r", "5000"], 2, "rank must be at most min(in, out) = 4096"),
        (["--dry-run", "-p", "0.1", "-p", "0.2"], 2, "dropout from none"),
        (["--dry-run", "--dtype", "int8"], 2, "dtype must be one of"),
        (["--write-shipped", "nowhere/at/all"], 2, "could not be written"),
    ],
)
def test_mistakes(words: list[str], status: int, said: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    result = CliRunner().invoke(cli.app, ["tune", *words])
    assert result.exit_code == status and said in " ".join(result.stderr.split()), result.output


def test_a_plan_needs_no_gpu() -> None:
    result = CliRunner().invoke(cli.app, ["tune", "--dry-run", "-p", "0", "-p", "0.1", "--json"])
    rows = json.loads(result.stdout)
    assert len(rows) == 12 and {row["out_features"] for row in rows} == {4096, 1024, 14336, 6144, 28672}
    assert rows[0]["routes"]["backward"] == ["addmm", "thin", "split"]


def test_a_plan_for_a_config_of_ones_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=200, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)

    def plan(path: Path) -> Any:
        return CliRunner().invoke(cli.app, ["tune", "--dry-run", "--json", "-r", "4", "--model", str(path)])

    for path in (tmp_path, tmp_path / "config.json"):
        rows = json.loads(plan(path).stdout)
        assert [(row["in_features"], row["out_features"]) for row in rows] == [
            (64, 64), (64, 32), (64, 96), (96, 64), (64, 128), (64, 192)
        ]  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    result = plan(tmp_path)
    assert result.exit_code == 2 and "neither a known model nor the config of one" in result.stderr
