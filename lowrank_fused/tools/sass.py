"""Machine code: instructions and resources of compiled kernels, read with the tools that come with Triton."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from lowrank_fused.kernels.launch import INTERPRETING

from ..errors import UnsupportedError

__all__ = ["compile_tools", "count_instructions", "resources"]

_INSTRUCTION_BYTES = 16
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)


@cache
def compile_tools() -> Path:
    """The folder of disassemblers in Triton; UnsupportedError where kernels can't be compiled and read."""
    import triton

    if INTERPRETING:
        raise UnsupportedError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if not (folder / tool).is_file()]
    if missing:
        raise UnsupportedError(f"reading binaries needs {' and '.join(missing)}, which this build of Triton lacks")
    return folder


def count_instructions(cubins: Sequence[bytes], arch: int) -> list[Counter[str]]:
    """How often each mnemonic, without its modifiers, occurs in each of these binaries for `arch`.

    The disassembler takes half a second to start and milliseconds a kernel, so it gets all of their code at once.
    """
    codes = [b"".join(_code_of(cubin)) for cubin in cubins]
    owners = [index for index, code in enumerate(codes) for _ in range(len(code) // _INSTRUCTION_BYTES)]
    name = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    text = _run("nvdisasm", ["--binary", name], b"".join(codes))
    counts: list[Counter[str]] = [Counter() for _ in cubins]
    for address, mnemonic in _INSTRUCTION.findall(text):
        counts[owners[int(address, 16) // _INSTRUCTION_BYTES]][mnemonic] += 1
    return counts


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread (REG) and bytes of stack and local memory (STACK, LOCAL) of a binary."""
    text = _run("cuobjdump", ["-res-usage"], cubin)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _run(tool: str, options: list[str], content: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [str(compile_tools() / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code_of(cubin: bytes) -> Iterator[bytes]:
    """The sections of an ELF file (64 bits, little-endian) that hold code: those named .text.<function>."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # name, type, flags, address, offset, bytes of each section
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    strings = sections[names][4]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", strings + name):
            yield cubin[offset : offset + length]
