"""One launch of one kernel as a value: run it, record it, or compile it ahead of time for a GPU that is not here.

A launcher allocates its outputs, builds a `Launch` and calls `run()`. Every launch passes through here, so that
counting launches, adding up declared traffic and compiling exactly what would run need no second description:

    with record() as launches:
        shrink(torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta"), a)     # nothing runs on meta
    launches[0].compile(90).asm["ptx"]
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launcher import launcher_of

__all__ = [
    "INTERPRETING",
    "Launch",
    "Tile",
    "arch_of",
    "cdiv",
    "record",
    "shared_bytes",
    "sm_count",
    "targeting",
    "with_adjacent_ranks",
    "zeroed_counters",
]

# Decorators read the same variable when kernels are defined, so it cannot change later.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"

_recorders: ContextVar[tuple[list[Launch], ...]] = ContextVar("recorders", default=())
_assumed_arch: ContextVar[int | None] = ContextVar("assumed_arch", default=None)

_SCALAR_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


# Multiprocessors assumed where the GPU is not here: A100, A10, RTX 4090, H100, B200, RTX 5090.
_SM_COUNTS = {80: 108, 86: 72, 89: 128, 90: 132, 100: 148, 120: 170}

# Shared memory that one program may have, in KiB.
_SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def cdiv(x: int, y: int) -> int:
    """⌈x / y⌉ for non-negative integers."""
    return -(-x // y)


@dataclass(frozen=True)
class Tile:
    """The compile-time side of a launch: block sizes, warps, pipeline stages.

    A kernel reads the fields it has an axis for; `block_r` covers the rank (at least 16, the smallest inner
    dimension of a tensor-core product). Without `max_registers` the assembler decides on them, and may spill a few
    bytes in order to fit another program onto a multiprocessor.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    block_r: int = 16
    num_warps: int = 4
    num_stages: int = 3
    use_tma: bool = False
    max_registers: int | None = None


@dataclass(slots=True)
class Launch:
    """A kernel, its grid and its arguments by name.

    FLOPs, and the tensors that are read and written, are as the algorithm needs them, without re-reads; those that are
    not there are None.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    tile: Tile
    reads: tuple[Tensor | None, ...] = ()
    writes: tuple[Tensor | None, ...] = ()
    flops: int = 0

    @property
    def name(self) -> str:
        """What the kernel is called outside its file."""
        return self.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def bytes_read(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(tensor.nbytes for tensor in self.reads if tensor is not None)

    @property
    def bytes_written(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(tensor.nbytes for tensor in self.writes if tensor is not None)

    def run(self) -> None:
        """Launch on the device of the tensors; on the meta device only record."""
        for log in _recorders.get():
            log.append(self)
        device = _device_of(self.args)
        if device.type == "cuda" and not INTERPRETING:
            launcher = launcher_of(self.kernel)
            if device.index == torch.cuda.current_device():
                launcher(self, device.index)
            else:
                with torch.cuda.device(device):
                    launcher(self, device.index)
        elif device.type != "meta":
            self.kernel[self.grid](**self.args, **self.options)

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides the arguments."""
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        return options if self.tile.max_registers is None else {**options, "maxnreg": self.tile.max_registers}

    def source(self) -> ASTSource:
        """What is compiled: launches with equal `source().hash()` and options share one binary."""
        signature, constants, attributes = {}, {}, {}
        for position, param in enumerate(self.kernel.params):
            value = self.args[param.name]
            fixed = param.is_constexpr or value is None
            kind = "constexpr" if fixed else _signature_of(value, param.do_not_specialize)
            if kind == "constexpr":
                constants[(position,)] = value
            elif not param.do_not_specialize and _is_multiple_of_16(value, kind):
                attributes[(position,)] = [["tt.divisibility", 16]]
            signature[param.name] = kind
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)

    def compile(self, arch: int) -> Any:
        """The compiled kernel for compute capability `arch` (80, 90, 100 …); needs neither GPU nor driver."""
        if INTERPRETING:
            raise RuntimeError("kernels were defined for the interpreter; unset TRITON_INTERPRET to compile them")
        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=self.options)


def _device_of(args: dict[str, Any]) -> torch.device:
    """Where the tensors are, or those that descriptors describe."""
    for value in args.values():
        if isinstance(value, Tensor):
            return value.device
    return next(value.base.device for value in args.values() if hasattr(value, "block_shape"))


def _signature_of(value: Any, do_not_specialize: bool) -> str:
    """Triton's name for the type of an argument, specialised the way its own launcher does it."""
    if isinstance(value, Tensor):
        return "*" + _SCALAR_TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        if value == 1 and not do_not_specialize:
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{_SCALAR_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    raise TypeError(f"no kernel argument type for {type(value).__name__}")


def _is_multiple_of_16(value: Any, kind: str) -> bool:
    """What Triton's launcher asks of an argument, the address of a tensor or an integer, before it specialises."""
    if kind[0] == "*":
        return value.data_ptr() % 16 == 0
    return kind in ("i32", "i64") and value % 16 == 0


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect every launch made inside, in order. Launches still run, except on the meta device."""
    log: list[Launch] = []
    token = _recorders.set((*_recorders.get(), log))
    try:
        yield log
    finally:
        _recorders.reset(token)


@contextlib.contextmanager
def targeting(arch: int) -> Iterator[None]:
    """Choose tiles for this compute capability on tensors that are on no GPU (meta, CPU)."""
    token = _assumed_arch.set(arch)
    try:
        yield
    finally:
        _assumed_arch.reset(token)


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch_of(x: Tensor) -> int:
    """Compute capability of the device x is on: 80, 86, 90 …; 0 where there is none (the interpreter)."""
    if x.device.type == "cuda":
        return _capability(x.device.index)
    return _assumed_arch.get() or 0


def sm_count(x: Tensor) -> int:
    """Multiprocessors of the device x is on, or those that a GPU of the assumed capability usually has."""
    if x.device.type == "cuda":
        return _multiprocessors(x.device.index)
    return _SM_COUNTS.get(arch_of(x), 1)


def shared_bytes(arch: int) -> int:
    """Shared memory that one program may have; the least of the known for a capability that is not."""
    return 1024 * _SHARED_KIB.get(arch, 99)


def with_adjacent_ranks(u: Tensor) -> Tensor:
    """u [M, R] with the elements of a row side by side: itself, be it a slice of a wider matrix, or else a copy."""
    return u if u.stride(1) == 1 or u.shape[1] == 1 else u.contiguous()


_counters: dict[tuple[int, int], Tensor] = {}


def zeroed_counters(like: Tensor, count: int) -> Tensor:
    """int32 zeros for `count` arrival counters on the device of `like`.

    Kernels leave their counters at zero, so one buffer serves all launches of a stream, which follow one another:
    no launch is spent on clearing them. A captured graph has counters of its own, cleared in each replay: it may be
    replayed beside what runs on the stream of its capture, and before any graph that was captured earlier.
    """
    if like.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
    counters = _counters.get(key)
    if counters is None or counters.numel() < count:
        counters = torch.zeros(max(count, 4096), dtype=torch.int32, device=like.device)
        _counters[key] = counters
    return counters
