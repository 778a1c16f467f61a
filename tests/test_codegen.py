"""Every binary that the kernel routes can ask for, compiled without a GPU and judged. Takes minutes, not seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowrank_fused.cli import app

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ARCHS = (80, 90, 100)


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def run_codegen(arch: int) -> list[dict]:
    """The rows that `lowrank-fused inspect --all-tiles` reports; that process interprets no kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lowrank_fused.cli", "inspect", "--target", f"sm_{arch}", "--all-tiles", "--json"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows_of():
    """arch -> rows, each architecture compiled once."""
    known: dict[int, list[dict]] = {}

    def rows(arch: int) -> list[dict]:
        if arch not in known:
            known[arch] = run_codegen(arch)
        return known[arch]

    return rows


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_binary_may_ship(arch, rows_of):
    if triton_version() < (3, 7):
        pytest.skip("tiles are chosen with the compiler of triton 3.7; older ones spill a few bytes in one of them")
    rows = rows_of(arch)
    kernels = {row["kernel"].removesuffix("_tma") for row in rows}
    products = {"shrink", "expand", "lowrank_forward", "single_forward", "dy_factors", "x_factors", "grad_input"}
    factors = {"gather", "scatter_add", "segment_sum", "weight_factor", "sum_blocks", "repeat_blocks"}
    assert kernels == products | factors
    wrong = [
        f"{row['kernel']} {row['tile']} {row['dtype']} ({row['flags']}): {'; '.join(row['violations'])}"
        for row in rows
        if row["violations"]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_big_products_are_built_from_what_the_gpu_has(arch, rows_of):
    """The largest tile, aligned bf16: the tensor-core instruction of the target, several loads under way."""
    rows = [r for r in rows_of(arch) if r["dtype"] == "bf16" and r["kernel"].startswith(("lowrank_f", "grad_"))]
    large = [r for r in rows if r["tile"]["block_m"] * r["tile"]["block_n"] * r["tile"]["block_k"] >= 128 * 256 * 32]
    assert len(large) >= 6
    for row in large:
        stages = row["tile"]["num_stages"]
        if arch == 80:
            assert row["tensor_core"] == "HMMA"
            assert row["async_copies"] >= stages * 6, (
                row
            )  # 16 bytes each: 6 a thread for a stage of 128 x 32 + 32 x 256
        else:
            assert row["tensor_core"] == {90: "HGMMA", 100: "UTCHMMA"}[arch]
            assert row["tma_loads"] >= stages * 2, row


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_of_the_big_products_is_compiled(arch, rows_of):
    from lowrank_fused.kernels.gemm import TILES

    def blocks(tile: dict) -> tuple[int, ...]:
        return tuple(sorted(tile[name] for name in ("block_m", "block_n", "block_k")))

    for kernel in ("lowrank_forward", "grad_input"):
        compiled = {blocks(row["tile"]) for row in rows_of(arch) if row["kernel"].startswith(kernel)}
        for access in ("vectors" if arch == 80 else "descriptors", "elements"):
            assert {blocks(asdict(tile)) for tile, _ in TILES[access]} <= compiled


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_of_the_single_launch_is_compiled(arch, rows_of):
    from lowrank_fused.kernels.single_forward import TILES

    def blocks(tile: dict) -> tuple[int, ...]:
        return tuple(tile[name] for name in ("block_m", "block_n", "block_k"))

    compiled = {blocks(row["tile"]) for row in rows_of(arch) if row["kernel"].startswith("single_forward")}
    for access in ("vectors" if arch == 80 else "descriptors", "elements"):
        wanted = {blocks(asdict(tile)) for tile, _ in TILES[access]}
        assert wanted - compiled <= ({(128, 256, 64)} if arch == 100 else set())


def test_violations_are_recognised():
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.tools.codegen import CodeReport, violations

    tile = Tile(128, 256, 64, num_warps=8, num_stages=3, use_tma=True)
    good = CodeReport(
        "lowrank_forward_tma", 90, tile, "bf16", "", products=2, registers=200, shared_bytes=208 * 1024,
        tensor_core="HGMMA", tensor_core_count=5, tma_loads=6, instructions=1000,
    )  # fmt: skip
    assert violations(good) == []
    empty = replace(good, registers=8, tensor_core="", tensor_core_count=0, tma_loads=0, instructions=16)
    assert any("empty" in found for found in violations(empty))
    assert any("not pipelined" in found for found in violations(replace(good, tma_loads=2)))
    for field, value, word in [
        ("stack_bytes", 8, "spills"),
        ("local_accesses", 1, "spills"),
        ("shared_bytes", 228 * 1024, "shared memory"),
        ("tensor_core", "HMMA", "HGMMA"),
        ("global_scratch_bytes", 128, "global scratch"),
        ("failure", "PassManager::run failed", "does not compile"),
    ]:
        (found,) = violations(replace(good, **{field: value}))
        assert word in found
    (found,) = violations(replace(good, arch=100, tensor_core="UTCHMMA", tmem_columns=544))
    assert "tensor memory" in found
    scalar = replace(good, tile=replace(tile, use_tma=False), tensor_core="", tensor_core_count=0, tma_loads=0)
    assert violations(scalar) == ["products are not on tensor cores"]
    assert violations(replace(scalar, dtype="fp32")) == []
    assert violations(replace(scalar, dtype="fp32", instructions=70)) == ["empty: 70 instructions"]
    assert violations(replace(scalar, dtype="fp32", instructions=70, products=0)) == []
    assert violations(replace(scalar, dtype="fp32", instructions=16, products=0)) == ["empty: 16 instructions"]


def test_says_why_it_cannot_compile(monkeypatch):
    from lowrank_fused.tools import codegen

    codegen.compile_tools.cache_clear()
    monkeypatch.setattr(codegen, "INTERPRETING", True)
    result = CliRunner().invoke(app, ["inspect", "--target", "sm_80"])
    assert result.exit_code == 3
    assert "TRITON_INTERPRET" in result.stderr
    codegen.compile_tools.cache_clear()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_layer_is_inspected_with_what_its_masks_cost():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    layer = ["--target", "sm_80", "--shape", "512x768", "--tokens", "256", "--json"]
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "lowrank_fused.cli", "inspect", *layer]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    rows = json.loads(done.stdout)
    masks = {row["kernel"]: row["mask_instructions"] for row in rows}
    assert masks["dy_factors"] is None and masks["lowrank_forward"] is None
    assert all(2 < masks[kernel] < 30 for kernel in ("shrink", "x_factors", "grad_input")), masks
    assert all(1 <= row["programs_per_sm"] <= 32 for row in rows)


def test_an_unknown_target_is_told_with_the_known_ones():
    result = CliRunner().invoke(app, ["inspect", "--target", "sm90"])
    assert result.exit_code == 2
    assert "did you mean 'sm_90'" in result.stderr


def test_how_many_programs_fit():
    from lowrank_fused.kernels.launch import Tile
    from lowrank_fused.tools.codegen import CodeReport, _programs_per_sm

    report = CodeReport("shrink", 90, Tile(), "bf16", "", registers=128, shared_bytes=60 * 1024)
    assert _programs_per_sm(report, 4) == 3  # 61 of 228 KiB each
    assert _programs_per_sm(replace(report, shared_bytes=0), 4) == 4  # 16384 of 65536 registers
    assert _programs_per_sm(replace(report, shared_bytes=0, registers=24), 8) == 8  # 256 of 2048 threads
    assert _programs_per_sm(replace(report, arch=86, shared_bytes=0, registers=24), 1) == 16
    assert _programs_per_sm(replace(report, arch=100, shared_bytes=0, registers=24, tmem_columns=256), 4) == 2
