"""What the compiler makes of every launch that the kernel routes can issue, read from the binaries, without a GPU.

`inspect_launch` compiles a launch and counts what decides its speed, `violations` says what is wrong with it.
`python -m lowrank_fused.tools.codegen --arch 90` does both for all `shipped_launches`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lowrank_fused.kernels.launch import INTERPRETING, Launch, Tile, shared_bytes

from ..errors import UnsupportedError
from .shipped import shipped_launches

__all__ = [
    "ARCHS",
    "CodeReport",
    "Limits",
    "inspect_launch",
    "inspect_shipped",
    "limits",
    "violations",
]

ARCHS = (80, 86, 89, 90, 100, 120)

# A kernel that the compiler gave up on has some 16 instructions. The smallest real one has several hundred with a
# product, 70 without.
_INSTRUCTION_FLOOR, _FLOOR_WITHOUT_PRODUCT = 150, 40
# Products of 16-bit operands by mma.sync, wgmma, tcgen05; the last that a binary has is the one that it is built on.
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
_MNEMONIC = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Limits:
    """What one program of a GPU may use, and the instruction its big products should be made of."""

    shared_bytes: int
    tmem_columns: int
    tensor_core: str


def limits(arch: int) -> Limits:
    """The limits of compute capability `arch`."""
    best = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
    return Limits(shared_bytes(arch), 512 if arch == 100 else 0, best)


@dataclass(frozen=True)
class CodeReport:
    """One compiled launch. Counts are of instructions in the binary (not executed), sizes in bytes a program.

    `products` counts tl.dot in the program, `tensor_core` is the kind of instruction that its products became,
    `tma_loads` and `async_copies` are loads that a pipelined loop has in flight, `failure` what the compiler said.
    """

    kernel: str
    arch: int
    tile: Tile
    dtype: str
    flags: str
    products: int = 0
    registers: int = 0
    stack_bytes: int = 0
    local_accesses: int = 0
    shared_bytes: int = 0
    tmem_columns: int = 0
    tensor_core: str = ""
    tensor_core_count: int = 0
    tma_loads: int = 0
    async_copies: int = 0
    instructions: int = 0
    global_scratch_bytes: int = 0
    failure: str = ""


def inspect_launch(launch: Launch, arch: int) -> CodeReport:
    """Compile a launch for `arch` and read the binary. A compiler's failure is reported, not raised."""
    tool = _cuobjdump()
    report = CodeReport(launch.name, arch, launch.tile, _dtype_of(launch), _flags_of(launch))
    try:
        compiled = launch.compile(arch)
    except Exception as error:  # whatever a compiler pass throws belongs into the table
        return replace(report, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [tool, "-sass", "-res-usage", str(binary)], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    counts = Counter(_MNEMONIC.findall(text))
    tensor_core = next((name for name in reversed(_TENSOR_CORE) if counts[name]), "")
    return replace(
        report,
        products=compiled.asm["ttir"].count("tt.dot "),
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        local_accesses=counts["STL"] + counts["LDL"],
        shared_bytes=compiled.metadata.shared,
        tmem_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_core=tensor_core,
        tensor_core_count=counts[tensor_core],
        tma_loads=counts["UTMALDG"],
        async_copies=counts["LDGSTS"],
        instructions=counts.total(),
        global_scratch_bytes=compiled.metadata.global_scratch_size,
    )


def violations(report: CodeReport) -> list[str]:
    """What is wrong with a binary, in words; nothing for one that may ship."""
    if report.failure:
        return [f"does not compile: {report.failure}"]
    allowed = limits(report.arch)
    found = []
    if report.instructions < (_INSTRUCTION_FLOOR if report.products else _FLOOR_WITHOUT_PRODUCT):
        found.append(f"empty: {report.instructions} instructions")
    if report.stack_bytes or report.local_accesses:
        found.append(f"spills: {report.stack_bytes} bytes of stack, {report.local_accesses} accesses")
    if report.shared_bytes > allowed.shared_bytes:
        found.append(f"shared memory: {report.shared_bytes} of {allowed.shared_bytes} bytes")
    if report.tmem_columns > allowed.tmem_columns:
        found.append(f"tensor memory: {report.tmem_columns} of {allowed.tmem_columns} columns")
    if report.global_scratch_bytes:
        found.append(f"global scratch: {report.global_scratch_bytes} bytes")
    if report.dtype != "fp32" and report.products and not report.tensor_core:
        found.append("products are not on tensor cores")
    if report.tile.use_tma and report.tensor_core != allowed.tensor_core:
        found.append(f"products by {report.tensor_core or 'no tensor core'}, not {allowed.tensor_core}")
    if report.tile.use_tma and report.tma_loads < 2 * report.tile.num_stages:
        found.append(f"not pipelined: {report.tma_loads} TMA loads for {report.tile.num_stages} stages")
    return found


@cache
def _cuobjdump() -> str:
    """The disassembler that comes with Triton; raises where kernels cannot be compiled and read."""
    import triton

    if INTERPRETING:
        raise UnsupportedError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.is_file():
        raise UnsupportedError(f"reading binaries needs cuobjdump, which this build of Triton lacks ({path})")
    return str(path)


def _dtype_of(launch: Launch) -> str:
    """The dtype of the first operand, which all products of a launch share."""
    operands = (getattr(value, "base", value) for value in launch.args.values())
    return next(_DTYPES[t.dtype] for t in operands if isinstance(t, Tensor) and t.dtype in _DTYPES)


def _flags_of(launch: Launch) -> str:
    """What tells launches of one kernel and tile apart: optional operands, other dtypes, switches, odd sizes."""
    main, flags = _dtype_of(launch), []
    for param in launch.kernel.params:
        value = launch.args[param.name]
        name = param.name.removesuffix("_ptr")
        if value is None:
            flags.append(f"no {name}")
        elif isinstance(value, Tensor) and _DTYPES.get(value.dtype, main) != main:
            flags.append(f"{name} {_DTYPES[value.dtype]}")
        elif name == "index":
            flags.append(f"{name} {str(value.dtype).removeprefix('torch.')}")
        elif param.is_constexpr and not name.startswith("BLOCK"):
            flags.append(f"{name.lower()} {value}")
        elif name in ("N", "K", "R") and value % 16:
            flags.append(f"{name} {value}")
        elif name in ("stride_wn", "stride_xm", "stride_dym") and value == 1:
            flags.append(f"{name} 1")
    return ", ".join(flags)


_prepared: list[Launch] = []


def _prepare(arch: int) -> None:
    """Launches hold kernels, which do not travel between processes: every worker builds the same list."""
    _prepared[:] = shipped_launches(arch)


def _inspect_prepared(index: int, arch: int) -> CodeReport:
    return inspect_launch(_prepared[index], arch)


def inspect_shipped(arch: int, workers: int = 2) -> Iterator[CodeReport]:
    """Reports of all `shipped_launches(arch)`, in order, as they come."""
    count = len(shipped_launches(arch))
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare, (arch,)) as pool:
        yield from pool.map(partial(_inspect_prepared, arch=arch), range(count))


def _table(reports: list[CodeReport], arch: int) -> Table:
    columns = "kernel tile dtype flags regs local shared tmem tensor-core TMA async instr verdict"
    table = Table(*columns.split(), title=f"sm_{arch}: {len(reports)} binaries", title_justify="left")
    for r in reports:
        t = r.tile
        tile = f"{t.block_m}x{t.block_n}x{t.block_k} r{t.block_r} w{t.num_warps} s{t.num_stages}"
        wrong = violations(r)
        table.add_row(
            r.kernel, tile, r.dtype, r.flags, str(r.registers), str(r.stack_bytes), f"{r.shared_bytes / 1024:.0f}K",
            str(r.tmem_columns), f"{r.tensor_core} {r.tensor_core_count}", str(r.tma_loads), str(r.async_copies),
            str(r.instructions), "; ".join(wrong) or "ok", style="red" if wrong else None,
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> int:
    """Compile and judge. 0: nothing is wrong, 1: something is, 2: a mistake in the command, 3: cannot be done here."""
    parser = argparse.ArgumentParser(prog="python -m lowrank_fused.tools.codegen", description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=[80, 90, 100], help="compute capabilities"
    )
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    options = parser.parse_args(arguments)
    progress = Console(stderr=True)
    reports: list[CodeReport] = []
    try:
        _cuobjdump()
        for arch in options.arch:
            title, count = f"compiling for sm_{arch}", len(shipped_launches(arch))
            of_arch = list(track(inspect_shipped(arch), title, count, console=progress))
            Console(width=None if sys.stdout.isatty() else 200).print(_table(of_arch, arch))
            reports += of_arch
    except UnsupportedError as error:
        print(error, file=sys.stderr)
        return 3
    if options.json:
        rows = [{**asdict(report), "violations": violations(report)} for report in reports]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(violations(report) for report in reports))


if __name__ == "__main__":
    sys.exit(main())
