"""Every tile that the kernel routes can ask for, compiled without a GPU and judged. Takes minutes, not seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lowrank_fused.cli import app

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ARCHS = (80, 89, 90, 100, 120)


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def inspect(*options: str) -> list[dict]:
    """The rows that `lowrank-fused inspect --json` reports; that process interprets no kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    workers = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # the other core has tests of its own
    command = [sys.executable, "-m", "lowrank_fused.cli", "inspect", *options, "--workers", workers, "--json"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(done.stdout)
    assert done.returncode == any(row["violations"] for row in rows)
    return rows


def every_kernel() -> set[str]:
    """Names of all kernels that are written down."""
    sources = (Path(__file__).resolve().parents[1] / "kernels").glob("*.py")
    return {
        name for source in sources for name in re.findall(r"^def _(\w+)_kernel\(", source.read_text(), re.MULTILINE)
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_may_ship(arch):
    """One test for all that is asked of a target, because each of its binaries takes half a second to compile."""
    if triton_version() < (3, 7):
        pytest.skip("tiles are chosen with the compiler of triton 3.7; older ones spill a few bytes in one of them")
    rows = inspect("--target", f"sm_{arch}", "--all-tiles", "--no-masks")
    assert {row["kernel"] for row in rows} == {k for k in every_kernel() if arch in (90, 100) or not k.endswith("_tma")}
    wrong = [
        f"{row['kernel']} {row['tile']} {row['dtype']} ({', '.join(row['flags'])}): {'; '.join(row['violations'])}"
        for row in rows
        if row["violations"]
    ]
    assert not wrong, "\n".join(wrong)
    check_every_tile_of_the_big_products(arch, rows)
    check_every_tile_of_the_single_launch(arch, rows)
    check_what_big_products_are_built_from(arch, rows)
    if arch == 90:
        check_what_the_low_rank_term_costs(rows)


def check_every_tile_of_the_big_products(arch: int, rows: list[dict]) -> None:
    from lowrank_fused.kernels.gemm import TILES

    def blocks(tile: dict) -> tuple[int, ...]:
        return tuple(sorted(tile[name] for name in ("block_m", "block_n", "block_k")))

    for kernel in ("lowrank_forward", "grad_input"):
        compiled = {blocks(row["tile"]) for row in rows if row["kernel"].startswith(kernel)}
        for access in ("descriptors" if arch in (90, 100) else "vectors", "elements"):
            assert {blocks(vars(tile)) for tile, _ in TILES[access]} <= compiled


def check_every_tile_of_the_single_launch(arch: int, rows: list[dict]) -> None:
    from lowrank_fused.kernels.single_forward import TILES

    def blocks(tile: dict) -> tuple[int, ...]:
        return tuple(tile[name] for name in ("block_m", "block_n", "block_k"))

    compiled = {blocks(row["tile"]) for row in rows if row["kernel"].startswith("single_forward")}
    for access in ("descriptors" if arch in (90, 100) else "vectors", "elements"):
        wanted = {blocks(vars(tile)) for tile, _ in TILES[access]}
        assert wanted - compiled <= ({(128, 256, 64)} if arch == 100 else set())


def check_what_big_products_are_built_from(arch: int, rows: list[dict]) -> None:
    """The largest tile, aligned bf16: the tensor-core instruction of the target, several loads under way."""
    rows = [r for r in rows if r["dtype"] == "bf16" and r["kernel"].startswith(("lowrank_f", "grad_"))]
    large = [r for r in rows if r["tile"]["block_m"] * r["tile"]["block_n"] * r["tile"]["block_k"] >= 128 * 256 * 32]
    assert {row["kernel"].removesuffix("_tma") for row in large} == {"lowrank_forward", "grad_input"}
    for row in large:
        stages = row["tile"]["num_stages"]
        assert row["tensor_core"] == {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
        assert row["stages_in_flight"] == stages - 1
        assert row["bytes_in_flight"] >= (stages - 1) * 2 * (128 + 256) * 32
        if arch in (90, 100):
            assert row["tma_loads"] >= stages * 2, row
        else:  # 16 bytes each: 6 a thread for a stage of 128 x 32 + 32 x 256
            assert row["async_copies"] >= stages * 6, row


def check_what_the_low_rank_term_costs(rows: list[dict]) -> None:
    """Up to rank 128 the forward product takes at most 4 registers and no shared memory more than without a rank, for
    weights [N, K] and [K, N], with every tile and every block of ranks; and so for ranks that are multiples of 8.
    """
    aligned = [r for r in rows if r["kernel"] == "lowrank_forward_tma" and "no v" in r["flags"]]
    tiles = {
        (r["tile"]["block_m"], r["tile"]["block_n"], r["tile"]["block_r"], "w_along_k True" in r["flags"])
        for r in aligned
    }
    wanted = itertools.product(((64, 64), (64, 128), (128, 128), (128, 256)), (16, 64, 128), (True, False))
    assert tiles == {(m, n, r, along_k) for (m, n), r, along_k in wanted}
    for row in aligned:
        assert row["low_rank_registers"] <= 4 and row["low_rank_shared_bytes"] <= 0, row


def sound_report():
    """A binary with nothing wrong with it: the forward product on sm_90."""
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.tools.codegen import CodeReport

    return CodeReport(
        "lowrank_forward_tma", 90, Tile(128, 256, 64, num_warps=8, num_stages=3, use_tma=True), "bf16", ["no bias"],
        products=2, registers=200, shared_bytes=208 * 1024, tensor_core="HGMMA", tensor_core_count=5, tma_loads=6,
        stages_in_flight=2, instructions=1000,
    )  # fmt: skip


def test_what_is_asked_depends_on_dtype_products_and_loads():
    from lowrank_fused.tools.codegen import violations

    good = sound_report()
    pointers = replace(good, tile=replace(good.tile, use_tma=False), tensor_core="HMMA", tma_loads=0)
    assert violations(good) == violations(pointers) == violations(replace(pointers, stages_in_flight=None)) == []
    assert violations(replace(pointers, stages_in_flight=0)) == ["not pipelined: loads 0 steps ahead of 2"]
    scalar = replace(pointers, tensor_core="", tensor_core_count=0)
    assert violations(scalar) == ["products are not on tensor cores"]
    assert violations(replace(scalar, dtype="fp32")) == []
    assert violations(replace(scalar, dtype="fp32", instructions=70)) == ["empty: 70 instructions"]
    assert violations(replace(scalar, dtype="fp32", instructions=70, products=0)) == []
    assert violations(replace(scalar, dtype="fp32", instructions=16, products=0)) == ["empty: 16 instructions"]


def test_says_why_it_cannot_compile(monkeypatch):
    from lowrank_fused.tools import sass

    sass.compile_tools.cache_clear()
    monkeypatch.setattr(sass, "INTERPRETING", True)
    result = CliRunner().invoke(app, ["inspect", "--target", "sm_80"])
    assert result.exit_code == 3
    assert "TRITON_INTERPRET" in result.stderr
    sass.compile_tools.cache_clear()


FAULTS = {
    "empty": dict(registers=8, tensor_core="", tensor_core_count=0, tma_loads=0, instructions=16),
    "spills: 8 bytes": dict(stack_bytes=8),
    "spills: 0 bytes of stack, 1 accesses": dict(local_accesses=1),
    "shared memory": dict(shared_bytes=228 * 1024),
    "tensor memory": dict(arch=100, tensor_core="UTCHMMA", tmem_columns=544),
    "global scratch": dict(global_scratch_bytes=128),
    "not HGMMA": dict(tensor_core="HMMA"),
    "not on tensor cores": dict(tensor_core="", tensor_core_count=0),
    "TMA loads for 3 stages": dict(tma_loads=0),
    "steps ahead of 2": dict(stages_in_flight=1),
    "5 registers more": dict(low_rank_registers=5),
    "16 bytes of shared memory more": dict(low_rank_shared_bytes=16),
    "does not compile": dict(failure="PassManager::run failed"),
}


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_a_fault_is_told_and_makes_the_exit_status_1(fault, monkeypatch):
    from lowrank_fused.tools import codegen

    report = replace(sound_report(), **FAULTS.get(fault, {}))
    free = ["no bias", "no v", "w_along_k False"]
    report = replace(report, flags=free) if report.low_rank_registers or report.low_rank_shared_bytes else report
    monkeypatch.setattr(codegen, "compile_tools", lambda: None)
    monkeypatch.setattr(codegen, "Request", lambda arch, *_: SimpleNamespace(arch=arch, count=lambda: 0))
    monkeypatch.setattr(codegen, "compile_all", lambda request, workers: iter(()))
    monkeypatch.setattr(codegen, "reports_of", lambda request, binaries: [report])
    result = CliRunner().invoke(app, ["inspect", "--target", f"sm_{report.arch}"])
    assert result.exit_code == (1 if fault else 0), result.output
    assert fault in " ".join(result.output.split())
    assert ("no bias" in result.output) == bool(fault)  # what all binaries of a kernel have is told with faults alone
    rows = json.loads(CliRunner().invoke(app, ["inspect", "--target", f"sm_{report.arch}", "--json"]).stdout)
    assert any(fault in text for text in rows[0]["violations"]) if fault else rows[0]["violations"] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_layer_is_inspected_with_what_its_masks_and_its_low_rank_term_cost():
    rows = inspect("--target", "sm_80", "--shape", "512x768", "--tokens", "256")
    masks = {row["kernel"]: row["mask_instructions"] for row in rows}
    assert masks["dy_factors"] is None and masks["lowrank_forward"] is None
    assert all(2 < masks[kernel] < 30 for kernel in ("shrink", "x_factors", "grad_input")), masks
    assert all(1 <= row["programs_per_sm"] <= 32 for row in rows)
    (forward,) = (row for row in rows if row["kernel"] == "lowrank_forward")
    assert 0 <= forward["low_rank_registers"] < forward["registers"]
    assert all(row["low_rank_registers"] is None for row in rows if row is not forward)


def test_loads_in_flight_are_those_of_rings_of_buffers():
    from lowrank_fused.tools.pipeline import Pipeline, read_pipeline

    def ring(name: str, buffers: int, shape: str) -> str:
        return f"""
            %{name} = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x{shape}, #shared, #smem, mutable>
            %{name}_0 = ttg.memdesc_index %{name}[%c0_i32] : !ttg.memdesc<{buffers}x{shape}> -> !ttg.memdesc<{shape}>"""

    def copy(name: str) -> str:
        return f"%{name}_1 = ttg.async_copy_global_to_local %{name}_ptrs, %{name}_0 mask %m : tensor<!tt.ptr<bf16>>"

    main = ring("x", 2, "64x32xbf16") + ring("w", 3, "32x128xbf16") + ring("bar", 3, "1xi64")
    main += copy("x") + "\nttng.async_tma_copy_global_to_local %w_desc[%c0, %c1] %w_0, %bar_0, %true : !tt.tensordesc"
    of_main = 2 * 2 * 64 * 32 + 2 * 2 * 32 * 128  # two of three stages: the third is being multiplied
    assert read_pipeline(main, 3) == Pipeline(of_main, {(32, 64): 2, (32, 128): 2})
    assert read_pipeline(ring("x", 1, "64x32xf32") + copy("x"), 2) == Pipeline(4 * 64 * 32, {(32, 64): 1})
    freed = main + "\nttg.local_dealloc %x : !ttg.memdesc\nttg.local_dealloc %w : !ttg.memdesc"
    after = ring("u", 2, "64x16xbf16") + copy("u")
    assert read_pipeline(freed + after, 3).bytes_in_flight == of_main
    assert read_pipeline(main + after, 3).bytes_in_flight == of_main + 2 * 2 * 64 * 16
    assert read_pipeline(ring("x", 2, "64x32xbf16"), 3) == Pipeline()  # nothing is loaded into it


def test_few_launches_cover_every_tile_mask_dtype_and_flag_of_every_kernel():
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.tools.variants import covering, flags_of

    parameters = [SimpleNamespace(name=name, is_constexpr=False) for name in ("x_ptr", "b_ptr", "seed_ptr", "K")]

    def launch(name="shrink", rows=64, dtype=torch.bfloat16, factor=torch.bfloat16, seed=False, k=4096):
        args = {"x_ptr": torch.empty(1, dtype=dtype), "b_ptr": torch.empty(1, dtype=factor), "K": k}
        args["seed_ptr"] = torch.empty(1, dtype=torch.int64) if seed else None
        return SimpleNamespace(name=name, tile=Tile(rows), args=args, kernel=SimpleNamespace(params=parameters))

    def kinds(launches) -> set[tuple]:
        masked = {(one.name, one.tile, one.args["seed_ptr"] is not None) for one in launches}
        dtypes = {(one.name, one.args["x_ptr"].dtype) for one in launches}
        return dtypes | {(one.name, flag) for one in launches for flag in flags_of(one)} | {m for m in masked if m[2]}

    several = launch(factor=torch.float32, seed=True, k=4100)
    assert flags_of(several) == ["b fp32", "K 4100"]
    half = launch(dtype=torch.float16, factor=torch.float16)
    only = [several, half, launch(rows=32, seed=True), launch(rows=16), launch("expand")]
    launches = [launch(), launch(seed=True), *only, launch(k=4100), launch(factor=torch.float32), launch(rows=32)]
    chosen = covering(launches)
    assert kinds(chosen) == kinds(launches)
    assert {one.tile for one in chosen} == {one.tile for one in launches}
    assert chosen == only  # in the order in which they were given


def test_an_unknown_target_is_told_with_the_known_ones():
    result = CliRunner().invoke(app, ["inspect", "--target", "sm90"])
    assert result.exit_code == 2
    assert "did you mean 'sm_90'" in result.stderr


def test_how_many_programs_fit():
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.tools.codegen import CodeReport, _programs_per_sm

    report = CodeReport("shrink", 90, Tile(), "bf16", [], registers=128, shared_bytes=60 * 1024)
    assert _programs_per_sm(report, 4) == 3  # 61 of 228 KiB each
    assert _programs_per_sm(replace(report, shared_bytes=0), 4) == 4  # 16384 of 65536 registers
    assert _programs_per_sm(replace(report, shared_bytes=0, registers=24), 8) == 8  # 256 of 2048 threads
    assert _programs_per_sm(replace(report, arch=86, shared_bytes=0, registers=24), 1) == 16
    assert _programs_per_sm(replace(report, arch=100, shared_bytes=0, registers=24, tmem_columns=256), 4) == 2
