"""Tuned tables: what a file must hold, whose rows count, and what a call is given."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_fused.kernels import measured, tables
from lowrank_fused.kernels.measured import Tuned, measured_route, tuned_tile
from lowrank_fused.kernels.tables import bucket, user_path
from lowrank_fused.routes import GROUP_ROUTES, ROUTES, choose, choose_for_group
from lowrank_fused.target import Target

GPU = "NVIDIA H100 80GB HBM3"
H100 = Target(90, has_triton=True, gpu=GPU)
BF16 = torch.bfloat16
MEASURED = {
    "kind": "measured", "gpu": GPU, "date": "2026-01-02", "torch": "2.13.0", "triton": "3.7.1", "driver": "580.1",
    "lowrank_fused": "0.1.0", "commit": "0123456789ab",
}  # fmt: skip
MODEL = {"kind": "model", "assumptions": {"e": 0.96}}


def route_row(route: str, tokens: int = 8192, direction: str = "forward", **more: Any) -> dict[str, Any]:
    sizes = {"tokens": tokens, "n": 4096, "k": 4096, "rank": 16, "dtype": "bf16", "dropout": False}
    return {"direction": direction, **sizes, "route": route, "by": 0, **more}


def content(*routes: dict[str, Any], gpu: str | None = GPU, tiles: list[Any] | None = None) -> dict[str, Any]:
    rows = {"routes": list(routes), "tiles": tiles or []}
    return {"format": tables.FORMAT, "target": "sm_90", "gpu": gpu, "provenance": [MEASURED, MODEL], **rows}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table is looked for; nothing ships."""
    path = tmp_path / "mine.json"
    monkeypatch.setenv(tables.VARIABLE, str(path))
    monkeypatch.setattr(measured, "shipped_path", lambda arch: tmp_path / f"sm_{arch}.json")
    measured.forget()
    yield path
    measured.forget()


def write(path: Path, what: Any) -> None:
    path.write_text(json.dumps(what))
    measured.forget()


def chosen(m: int = 8192, n: int = 4096, target: Target = H100, direction: Any = "forward", **more: Any) -> str:
    return choose(direction, m, n, 4096, 16, BF16, False, target, **more)


def test_without_a_table_the_model_decides(user: Path) -> None:
    assert chosen() == "split" and not user.exists()


def test_what_was_measured_comes_before_the_model(user: Path) -> None:
    write(user, content(route_row("thin"), route_row("addmm", direction="backward")))
    assert (chosen(), chosen(direction="backward")) == ("thin", "addmm")
    assert chosen(n=1024) == "single", "another shape is left to the model"
    assert chosen(target=replace(H100, has_triton=False)) == "addmm", "what cannot run is never chosen"
    assert chosen(among=("split", "addmm")) == "split", "nor what is not asked for"


def test_a_row_serves_its_bucket_of_tokens(user: Path) -> None:
    write(user, content(route_row("thin", 8192), route_row("thin", 4096), route_row("addmm", 1024)))
    got = {m: chosen(m) for m in (724, 725, 1448, 1449, 2896, 2897, 5792, 5793, 8192, 11585, 11586)}
    assert [m for m, route in got.items() if route == "addmm"] == [725, 1448]
    assert [m for m, route in got.items() if route == "thin"] == [2897, 5792, 5793, 8192, 11585]
    assert all(bucket(m) == {725: 1024, 1448: 1024, 2897: 4096, 5792: 4096, 5793: 8192}.get(m, bucket(m)) for m in got)
    assert [bucket(m) for m in (1, 2, 3, 4, 5, 6, 91, 90)] == [1, 2, 4, 4, 4, 8, 128, 64]


def test_the_users_rows_come_before_shipped_ones(user: Path) -> None:
    write(user.with_name("sm_90.json"), content(route_row("addmm"), route_row("addmm", n=1024), gpu=None))
    assert (chosen(), chosen(n=1024)) == ("addmm", "addmm")
    write(user, content(route_row("thin")))
    assert (chosen(), chosen(n=1024)) == ("thin", "addmm")
    assert chosen(target=Target(90, has_triton=True, gpu="NVIDIA H200")) == "addmm", "shipped rows serve all of sm_90"


def test_rows_of_a_model_decide_nothing(user: Path) -> None:
    write(user, content(route_row("addmm", by=1)))
    assert chosen() == "split"


def test_a_table_of_another_gpu_is_not_used(user: Path) -> None:
    write(user, content(route_row("thin"), gpu="NVIDIA A100"))
    assert chosen() == "split"


def test_tables_can_be_turned_off(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(user, content(route_row("thin")))
    write(user.with_name("sm_90.json"), content(route_row("addmm"), gpu=None))
    monkeypatch.setenv(tables.VARIABLE, "off")
    measured.forget()
    assert chosen() == "split" and user_path(GPU) is None


def test_groups_have_rows_of_their_own(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(user, content(route_row("thin", n=[4096, 1024], rank=[16, 16]), route_row("addmm", n=5120, rank=32)))
    monkeypatch.setattr("lowrank_fused.routes.target_of", lambda device: H100)
    shapes = [(4096, 16), (1024, 16)]
    assert choose_for_group("auto", 8192, 4096, shapes, BF16, False, torch.device("cuda"))[0] == "thin"
    write(user, content(route_row("single", n=[4096, 1024], rank=[16, 16])))
    assert choose_for_group("auto", 8192, 4096, shapes, BF16, False, torch.device("cuda"))[0] in GROUP_ROUTES


def test_files_are_read_once(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(user, content(route_row("thin")))
    reads: list[Path] = []
    monkeypatch.setattr(measured, "read", lambda path: reads.append(path) or tables.read(path))
    assert {chosen(m) for m in (8192, 6000, 7000)} == {"thin"} and reads == [user]


def test_where_the_users_table_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tables.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_path(GPU) == tmp_path / "lowrank-fused/tuned/nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert user_path(GPU) == Path.home() / ".cache/lowrank-fused/tuned/nvidia-h100-80gb-hbm3.json"


def broken(**changes: Any) -> dict[str, Any]:
    return content({**route_row("thin"), **changes})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("[", "Expecting value"),
        ([], "format must be"),
        ({**content(), "format": "2"}, "format must be 'lowrank-fused tuned table, version 1', got '2'"),
        ({**content(), "target": 90}, "target must be as sm_90, got 90"),
        ({**content(), "routes": None}, "routes must be a list"),
        ({**content(), "gpu": 3}, "gpu must be a name"),
        ({**content(), "provenance": [{"kind": "measured", "gpu": GPU}]}, "provenance 0 must be measured or model"),
        (broken(route="splitt"), "row 0 of routes is malformed: route must be one of"),
        (broken(tokens=1000), "tokens must be a power of two, got 1000"),
        (broken(dropout=0), "dropout must be bool, got 0"),
        (broken(n=[]), "n must be int, got None"),
        (broken(k=True), "k must be int, got True"),
        (broken(by=2), "by must be the index of a provenance"),
        (broken(dtype="float16"), "dtype must be one of fp32"),
        (content(tiles=[{"kernel": "shrink"}]), "row 0 of tiles is malformed: tokens must be int, got None"),
    ],
)
def test_a_file_that_is_no_table_is_named(user: Path, what: Any, said: str) -> None:
    user.write_text(what if isinstance(what, str) else json.dumps(what))
    with pytest.raises(ValueError, match="cannot be used") as raised:
        chosen()
    assert str(user) in str(raised.value) and said in str(raised.value) and "lowrank-fused tune" in str(raised.value)


def test_route_names_are_those_of_the_routes() -> None:
    assert tables.ROUTES == ROUTES


def tile_row(tile: Any, **more: Any) -> dict[str, Any]:
    sizes = {"tokens": 64, "n": 96, "k": 48, "rank": 4, "dtype": "fp16", "variant": "vectors"}
    return {"kernel": "lowrank_forward", **sizes, "tile": tile, "by": 0, **more}


@pytest.mark.triton
def test_a_tile_is_used_if_the_kernel_may_return_it(user: Path) -> None:
    from lowrank_fused.kernels.launch import record, targeting
    from lowrank_fused.kernels.lowrank_forward import choose_tile, lowrank_forward, tiles

    candidates = tiles(4, torch.float16, "vectors")
    usual = choose_tile(64, 96, 48, 4, torch.float16, "vectors", 108)
    other = next(c for c in candidates if c.tile.block_m == 32)
    x, w, v, b = (torch.empty(s, dtype=torch.float16, device="meta") for s in ((64, 48), (96, 48), (64, 4), (96, 4)))

    def launched(tile: Any) -> Any:
        write(user.with_name("sm_80.json"), {**content(tiles=[tile_row(tile)], gpu=None), "target": "sm_80"})
        with targeting(80), record() as log:
            lowrank_forward(x, w, v, b)
        return log[0].tile

    assert launched(other.fields()) == other.tile != usual
    assert launched({**other.fields(), "block_m": 48}) == usual, "no tile of the kernel's"
    assert launched({**other.fields(), "num_stages": 9}) == usual


def test_what_was_resolved_is_kept() -> None:
    found = measured.Lookup([tables.parse(content(tiles=[tile_row({"split": 1})]))])
    asked: list[int] = []
    for _ in range(2):
        assert found.tile("lowrank_forward", 70, (96, 48, 4, "fp16", "vectors"), lambda: asked.append(1) or []) is None
    assert asked == [1]


@pytest.mark.triton
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_tile_that_a_table_may_name_is_inspected(arch: int) -> None:
    """Layers that the inspected cases do not list: whatever their kernels may be given is among the binaries."""
    from lowrank_fused.kernels.launch import record, targeting
    from lowrank_fused.tools.shipped import CallCase, shipped_cases
    from lowrank_fused.tools.variants import is_masked

    with targeting(arch), record() as log:
        for case in shipped_cases(arch):
            case.launch()
    inspected = {(one.name.removesuffix("_tma"), is_masked(one), one.tile) for one in log}
    named = set()
    for m in (1, 300, 3000, 16384):
        for n, k in ((3584, 18944), (1024, 3072), (1008, 4096)):
            for r, p, adapter in ((16, 0.0, None), (24, 0.1, None), (64, 0.1, torch.float32), (7, 0.1, None)):
                with targeting(arch), measured.probing(arch, "") as probe:
                    CallCase(m, n, k, r, p, adapter=adapter).launch()
                for (kernel, *_, variant), candidates in probe.seen.items():
                    named |= {(kernel, "masked" in variant, candidate.tile) for candidate in candidates}
    assert len({kernel for kernel, _, _ in named}) >= 4 and len(named) > 40
    assert not named - inspected
    with targeting(arch), measured.probing(arch, "") as probe:
        CallCase(3000, 999, 1001, 16, 0.1).launch()
    assert not probe.seen, "of rows that are not aligned not every tile is inspected"


@pytest.mark.triton
def test_a_probe_gives_what_is_forced_and_notes_what_was_asked() -> None:
    from lowrank_fused.kernels.launch import Tile

    one, two = Tuned(Tile(16, 16)), Tuned(Tile(32, 16), 2)
    x = torch.empty(33, 8, dtype=BF16)
    with measured.probing(0, "", {"k": two.fields()}) as probe:
        assert tuned_tile("k", x, 0, (16, 32, 3), "v", lambda: [one, two]) == two
        assert tuned_tile("other", x, 0, (16, 32, 3), "v", lambda: [one, two]) is None
    assert probe.seen["k", 32, 16, 32, 3, "bf16", "v"] == [one, two]
    assert tuned_tile("k", x, 0, (16, 32, 3), "v", lambda: [one, two]) is None, "afterwards all is as before"


def test_measured_route_of_an_unknown_dtype(user: Path) -> None:
    write(user, content(route_row("thin")))
    assert measured_route("forward", 8192, 4096, 4096, 16, torch.float64, False, 90, GPU) is None


def test_doctor_tells_which_tables_are_used(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_fused.tools import doctor

    monkeypatch.setattr(doctor, "shipped_path", lambda arch: user.with_name(f"sm_{arch}.json"))
    write(user.with_name("sm_90.json"), content(route_row("addmm", by=1), gpu=None))

    def told() -> list[tuple[int, int, str | None]]:
        return [(t.measured, t.model, t.unused) for t in doctor._tables(H100)[0]]

    assert told() == [(0, 0, "lowrank-fused tune would write it"), (0, 1, None)]
    write(user, content(route_row("thin"), route_row("thin", 64)))
    assert told() == [(2, 0, None), (0, 1, None)]
    write(user, content(route_row("thin"), gpu="NVIDIA A100"))
    assert told()[0] == (1, 0, "it is of NVIDIA A100")
    user.write_text("{}")
    reports, broken = doctor._tables(H100)
    assert reports[0].unused == "it is broken" and str(user) in broken[0]
    monkeypatch.setenv(tables.VARIABLE, "off")
    assert told() == [(0, 0, "LOWRANK_FUSED_TUNED=off")]
    assert doctor._tables(replace(H100, has_triton=False)) == ([], [])
