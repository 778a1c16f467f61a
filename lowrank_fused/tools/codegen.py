"""What the compiler makes of the launches that the kernel routes issue, read from the binaries, without a GPU.

`inspect_launch` compiles a launch and counts what decides its speed, `violations` says what is wrong with it. The
command is `lowrank-fused inspect`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_fused.kernels.launch import INTERPRETING, Launch, Tile, shared_bytes

from ..errors import UnsupportedError
from .shipped import CallCase, launches_of, shipped_launches

__all__ = [
    "ARCHS",
    "CodeReport",
    "Limits",
    "compile_tools",
    "inspect_launch",
    "inspect_launches",
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
    """What one program of a GPU may use, what a multiprocessor has for all of them, and the instruction its big
    products should be made of.
    """

    shared_bytes: int
    tmem_columns: int
    tensor_core: str
    shared_bytes_of_sm: int
    threads_of_sm: int
    programs_of_sm: int


# Shared memory in KiB, threads and programs of a multiprocessor.
_SM = {80: (164, 2048, 32), 86: (100, 1536, 16), 89: (100, 1536, 24), 90: (228, 2048, 32), 100: (228, 2048, 32),
       120: (100, 1536, 24)}  # fmt: skip
_REGISTERS_OF_SM, _REGISTERS_AT_A_TIME, _SHARED_OF_SYSTEM = 65536, 256, 1024


def limits(arch: int) -> Limits:
    """The limits of compute capability `arch`."""
    best = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
    shared, threads, programs = _SM[arch]
    return Limits(shared_bytes(arch), 512 if arch == 100 else 0, best, shared * 1024, threads, programs)


@dataclass(frozen=True)
class CodeReport:
    """One compiled launch. Counts are of instructions in the binary (not executed), sizes in bytes a program.

    `products` counts tl.dot in the program, `tensor_core` is the kind of instruction that its products became,
    `tma_loads` and `async_copies` are loads that a pipelined loop has in flight, `programs_per_sm` is how many programs
    a multiprocessor has room for, `mask_instructions` what drawing or applying a dropout mask costs an element of the
    tile, and `failure` what the compiler said.
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
    programs_per_sm: int = 0
    mask_instructions: float | None = None
    failure: str = ""


def inspect_launch(launch: Launch, arch: int, *, masks: bool = False) -> CodeReport:
    """Compile a launch for `arch` and read the binary. A compiler's failure is reported, not raised.

    `masks` compiles it without its dropout too, to see what that costs.
    """
    compile_tools()
    report = CodeReport(launch.name, arch, launch.tile, _dtype_of(launch), _flags_of(launch))
    try:
        compiled = launch.compile(arch)
        plain = without_mask(launch) if masks else None
        unmasked = None if plain is None else plain.compile(arch)
    except Exception as error:  # whatever a compiler pass throws belongs into the table
        return replace(report, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    usage, counts = _read(compiled)
    tensor_core = next((name for name in reversed(_TENSOR_CORE) if counts[name]), "")
    report = replace(
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
    warps = compiled.metadata.num_warps
    if unmasked is not None:
        more = counts.total() - _read(unmasked)[1].total()
        report = replace(report, mask_instructions=more / (_masked_elements(launch) / (32 * warps)))
    return replace(report, programs_per_sm=_programs_per_sm(report, warps))


def _read(compiled: Any) -> tuple[dict[str, int], Counter[str]]:
    """Resource usage and instruction counts of a binary."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [compile_tools(), "-sass", "-res-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage, Counter(_MNEMONIC.findall(text))


def _programs_per_sm(report: CodeReport, warps: int) -> int:
    """How many programs registers, shared memory and threads of a multiprocessor allow at the same time."""
    allowed = limits(report.arch)
    of_warp = -(-report.registers * 32 // _REGISTERS_AT_A_TIME) * _REGISTERS_AT_A_TIME
    rooms = [allowed.programs_of_sm, allowed.threads_of_sm // (32 * warps), _REGISTERS_OF_SM // (of_warp * warps)]
    rooms.append(allowed.shared_bytes_of_sm // (report.shared_bytes + _SHARED_OF_SYSTEM))
    if report.tmem_columns:
        rooms.append(allowed.tmem_columns // report.tmem_columns)
    return min(rooms)


_MASKS = ("seed_ptr", "bits_ptr", "mask_ptr")


def without_mask(launch: Launch) -> Launch | None:
    """The same launch without dropout; None for one that has none."""
    masks = [name for name in _MASKS if launch.args.get(name) is not None]
    if not masks:
        return None
    return Launch(launch.kernel, launch.grid, {**launch.args, **dict.fromkeys(masks)}, launch.tile)


def _masked_elements(launch: Launch) -> int:
    """Elements that the mask of one tile covers: of x, of dx, or of what `expand` writes."""
    columns = launch.args["BLOCK_N" if launch.name == "expand" else "BLOCK_K"]
    return launch.args["BLOCK_M"] * columns


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
def compile_tools() -> str:
    """The disassembler that comes with Triton; UnsupportedError where kernels can't be compiled and read."""
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


def _prepare(arch: int, calls: Sequence[CallCase] | None) -> None:
    """Launches hold kernels, which do not travel between processes: every worker builds the same list."""
    _prepared[:] = shipped_launches(arch) if calls is None else launches_of(arch, calls)


def _inspect_prepared(index: int, arch: int, masks: bool) -> CodeReport:
    return inspect_launch(_prepared[index], arch, masks=masks)


def inspect_launches(arch: int, calls: Sequence[CallCase] | None = None, workers: int = 2) -> Iterator[CodeReport]:
    """Reports of the launches of some calls, masks included, or of all `shipped_launches(arch)`; in order, as they
    come.
    """
    count = len(shipped_launches(arch) if calls is None else launches_of(arch, calls))
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare, (arch, calls)) as pool:
        yield from pool.map(partial(_inspect_prepared, arch=arch, masks=calls is not None), range(count))
