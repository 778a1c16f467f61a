"""What the compiler makes of the launches that the kernel routes issue, read from the binaries, without a GPU.

A `Request` says which launches; `compile_all` compiles them, `reports_of` counts what decides their speed, and
`violations` says what is wrong with one. The command is `lowrank-fused inspect`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context

from lowrank_fused.kernels.launch import Launch, Tile, shared_bytes

from .pipeline import Pipeline, read_pipeline
from .sass import compile_tools, count_instructions, resources
from .shipped import CallCase, launches_of, shipped_launches
from .variants import binary_of, covering, dtype_of, flags_of, without_low_rank, without_mask

__all__ = [
    "ARCHS",
    "Binary",
    "CodeReport",
    "Limits",
    "Request",
    "compile_all",
    "compile_launch",
    "limits",
    "reports_of",
    "violations",
]

ARCHS = (80, 86, 89, 90, 100, 120)

# A kernel that the compiler gave up on has some 16 instructions. The smallest real one has several hundred with a
# product, 70 without.
_INSTRUCTION_FLOOR, _FLOOR_WITHOUT_PRODUCT = 150, 40
# Products of 16-bit operands by mma.sync, wgmma, tcgen05; the last that a binary has is the one that it is built on.
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
# What the low-rank term may add to the registers of a forward product on sm_90 that reads v and B through descriptors;
# to shared memory it adds nothing.
_LOW_RANK_REGISTERS, _FREE_LOW_RANK = 4, "no v"
# The big operands that the main loop of a kernel loads, by their blocks.
_MAIN_LOOP = {
    "shrink": ["MK"],
    "expand": ["RN"],
    "lowrank_forward": ["MK", "NK"],
    "grad_input": ["MN", "NK"],
    "dy_factors": ["MN"],
    "x_factors": ["MK"],
    "weight_factor": ["NK"],
}


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
    `tma_loads` and `async_copies` are instructions that load asynchronously. `bytes_in_flight` is the most that these
    have on the way at a time, `stages_in_flight` how many steps ahead the big operands of the main loop are loaded
    (None without such a loop, see `Pipeline`). `programs_per_sm` is how many programs a multiprocessor has room for,
    `mask_instructions` what drawing or applying a dropout mask costs a thread an element, `low_rank_registers` and
    `low_rank_shared_bytes` what the low-rank term adds to a forward product, and `failure` what the compiler said.
    """

    kernel: str
    arch: int
    tile: Tile
    dtype: str
    flags: list[str]
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
    bytes_in_flight: int = 0
    stages_in_flight: int | None = None
    instructions: int = 0
    global_scratch_bytes: int = 0
    programs_per_sm: int = 0
    mask_instructions: float | None = None
    low_rank_registers: int | None = None
    low_rank_shared_bytes: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class Request:
    """Which launches are inspected for one target.

    `calls`: what some layers issue. Without, one launch for every tile of every kernel that a chooser can return, and
    for every kind of operand (see `variants.covering`); with `every_variant` all that `shipped_launches` lists, where
    each kind of operand meets several tiles. No two of those compile to the same code.

    With `masks` a launch with dropout is also compiled without; forward products are always compiled without their
    low-rank term too on sm_90, whose binaries have to compare, and for `calls`.
    """

    arch: int
    calls: tuple[CallCase, ...] = ()
    every_variant: bool = False
    masks: bool = True

    def launches(self) -> list[Launch]:
        """The launches that are reported, in a fixed order."""
        return list(_reported(self))

    def unmasked(self, launch: Launch) -> Launch | None:
        """The twin that tells what the mask of a launch costs."""
        return without_mask(launch) if self.masks else None

    def plain(self, launch: Launch) -> Launch | None:
        """The twin that tells what the low-rank term of a forward product costs."""
        # Elsewhere and unaligned, loops over single elements hold the product's registers, not its blocks.
        compared = self.calls or (self.arch == 90 and launch.tile.use_tma)
        return without_low_rank(launch) if compared else None

    def count(self) -> int:
        """How many binaries are compiled."""
        return len(_work(self))


@lru_cache(maxsize=1)
def _reported(request: Request) -> list[Launch]:
    """What `Request.launches` lists; finding all that ships takes seconds."""
    if request.calls:
        return launches_of(request.arch, request.calls)
    shipped = shipped_launches(request.arch)
    return shipped if request.every_variant else covering(shipped)


@lru_cache(maxsize=1)
def _work(request: Request) -> list[Launch]:
    """All that is compiled, once: reported launches and their twins.

    Launches hold kernels, which do not travel between processes; every worker builds the same list.
    """
    launches = request.launches()
    twins = (twin(launch) for twin in (request.unmasked, request.plain) for launch in launches)
    unique = {binary_of(launch): launch for launch in (*launches, *(twin for twin in twins if twin is not None))}
    return list(unique.values())


@dataclass(frozen=True)
class Binary:
    """What is kept of a compiled launch: its code, what the compiler said about it, or why there is none."""

    cubin: bytes = b""
    resources: dict[str, int] | None = None
    pipeline: Pipeline = Pipeline()
    products: int = 0
    warps: int = 0
    shared_bytes: int = 0
    tmem_columns: int = 0
    global_scratch_bytes: int = 0
    failure: str = ""


def compile_launch(launch: Launch, arch: int) -> Binary:
    """Compile a launch for `arch`. A compiler's failure is reported, not raised."""
    compile_tools()
    try:
        compiled = launch.compile(arch)
    except Exception as error:  # whatever a compiler pass throws belongs into the table
        return Binary(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    metadata, asm = compiled.metadata, compiled.asm
    return Binary(
        asm["cubin"],
        resources(asm["cubin"]),
        read_pipeline(asm["ttgir"], launch.tile.num_stages),
        asm["ttir"].count("tt.dot "),
        metadata.num_warps,
        metadata.shared,
        getattr(metadata, "tmem_size", None) or 0,
        metadata.global_scratch_size,
    )


def _compile_numbered(index: int, request: Request) -> Binary:
    return compile_launch(_work(request)[index], request.arch)


def compile_all(request: Request, workers: int = 2) -> Iterator[Binary]:
    """The binaries of a request, as they come, for `reports_of`; one worker is this process."""
    compile_one, numbers = partial(_compile_numbered, request=request), range(request.count())
    if workers == 1:
        yield from map(compile_one, numbers)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(compile_one, numbers)


def reports_of(request: Request, binaries: Sequence[Binary]) -> list[CodeReport]:
    """One report for each launch of the request, in order."""
    counts = count_instructions([binary.cubin for binary in binaries], request.arch)
    keys = [binary_of(launch) for launch in _work(request)]
    known = {key: (binary, count) for key, binary, count in zip(keys, binaries, counts, strict=True)}
    reports = []
    for launch in request.launches():
        binary, count = known[binary_of(launch)]
        report = _report(launch, request.arch, binary, count)
        unmasked, plain = request.unmasked(launch), request.plain(launch)
        if unmasked is not None and not report.failure:
            more = count.total() - known[binary_of(unmasked)][1].total()
            report = replace(report, mask_instructions=more / (_masked_elements(launch) / (32 * binary.warps)))
        if plain is not None and not report.failure:
            report = _compare(report, known[binary_of(plain)][0])
        reports.append(report)
    return reports


def _report(launch: Launch, arch: int, binary: Binary, counts: Counter[str]) -> CodeReport:
    report = CodeReport(launch.name, arch, launch.tile, dtype_of(launch), flags_of(launch), failure=binary.failure)
    usage = binary.resources
    if usage is None:
        return report
    tensor_core = next((name for name in reversed(_TENSOR_CORE) if counts[name]), "")
    report = replace(
        report,
        products=binary.products,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        local_accesses=counts["STL"] + counts["LDL"],
        shared_bytes=binary.shared_bytes,
        tmem_columns=binary.tmem_columns,
        tensor_core=tensor_core,
        tensor_core_count=counts[tensor_core],
        tma_loads=counts["UTMALDG"],
        async_copies=counts["LDGSTS"],
        bytes_in_flight=binary.pipeline.bytes_in_flight,
        stages_in_flight=_stages_in_flight(launch, binary.pipeline),
        instructions=counts.total(),
        global_scratch_bytes=binary.global_scratch_bytes,
    )
    return replace(report, programs_per_sm=_programs_per_sm(report, binary.warps))


def _stages_in_flight(launch: Launch, pipeline: Pipeline) -> int | None:
    """How many steps ahead the main loop loads the operand that it loads latest; None without such a loop.

    Rows that are not aligned are read one element at a time, which no asynchronous load can.
    """
    operands = _MAIN_LOOP.get(launch.name.removesuffix("_tma"))
    if operands is None or any(launch.args[axis] % 16 for axis in {*"".join(operands)} - {"M"}):
        return None
    blocks = [tuple(sorted(launch.args[f"BLOCK_{axis}"] for axis in axes)) for axes in operands]
    return min(pipeline.depths.get(block, 0) for block in blocks)


def _compare(report: CodeReport, plain: Binary) -> CodeReport:
    """The report with what its low-rank term costs beside the plain product."""
    if plain.resources is None:
        return replace(report, failure=f"without its low-rank term: {plain.failure}")
    return replace(
        report,
        low_rank_registers=report.registers - plain.resources["REG"],
        low_rank_shared_bytes=report.shared_bytes - plain.shared_bytes,
    )


def _programs_per_sm(report: CodeReport, warps: int) -> int:
    """How many programs registers, shared memory and threads of a multiprocessor allow at the same time."""
    allowed = limits(report.arch)
    of_warp = -(-report.registers * 32 // _REGISTERS_AT_A_TIME) * _REGISTERS_AT_A_TIME
    rooms = [allowed.programs_of_sm, allowed.threads_of_sm // (32 * warps), _REGISTERS_OF_SM // (of_warp * warps)]
    rooms.append(allowed.shared_bytes_of_sm // (report.shared_bytes + _SHARED_OF_SYSTEM))
    if report.tmem_columns:
        rooms.append(allowed.tmem_columns // report.tmem_columns)
    return min(rooms)


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
    if report.stages_in_flight is not None and report.stages_in_flight < report.tile.num_stages - 1:
        found.append(f"not pipelined: loads {report.stages_in_flight} steps ahead of {report.tile.num_stages - 1}")
    if report.arch == 90 and _FREE_LOW_RANK in report.flags:
        if (report.low_rank_registers or 0) > _LOW_RANK_REGISTERS:
            found.append(f"low-rank term: {report.low_rank_registers} registers more than without")
        if (report.low_rank_shared_bytes or 0) > 0:
            found.append(f"low-rank term: {report.low_rank_shared_bytes} bytes of shared memory more than without")
    return found
