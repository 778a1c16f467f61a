"""What tells the launches of one kernel apart, a choice among them that leaves nothing out, and their twins."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import ASTSource

from lowrank_fused.kernels.launch import Launch

__all__ = ["binary_of", "covering", "dtype_of", "flags_of", "is_masked", "without_low_rank", "without_mask"]

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_MASKS = ("seed_ptr", "bits_ptr", "mask_ptr")
# Further pieces of a factor, which only groups have, and where they begin.
_PIECES = ("a2", "a3", "b2", "b3")
_STARTS = ("r2", "r3")


def binary_of(launch: Launch) -> tuple[Hashable, ...]:
    """Equal for launches that share one binary."""
    return (launch.source().hash(), *launch.options.values())


def dtype_of(launch: Launch) -> str:
    """The dtype of the first operand, which all products of a launch share."""
    operands = (getattr(value, "base", value) for value in launch.args.values())
    return next(_DTYPES[t.dtype] for t in operands if isinstance(t, Tensor) and t.dtype in _DTYPES)


def flags_of(launch: Launch) -> list[str]:
    """What tells launches of one kernel and tile apart: optional operands, other dtypes, switches, odd sizes."""
    main, flags = dtype_of(launch), []
    for param in launch.kernel.params:
        value = launch.args[param.name]
        name = param.name.removesuffix("_ptr")
        if name in _STARTS:
            continue
        if name in _PIECES:
            flags += [] if value is None else [f"with {name}"]
        elif value is None:
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
    return flags


def covering(launches: Sequence[Launch]) -> list[Launch]:
    """Few of these launches in which each of the following occurs that occurs in any, in the given order.

    For every kernel: each tile, also with a dropout mask, with each layout of the weight and with factors in pieces;
    each dtype; each flag of `flags_of`.
    Each step takes the launch with most of what is still missing.
    """
    kinds = [_kinds_of(launch) for launch in launches]
    missing = set().union(*kinds)
    chosen = []
    while missing:
        best = max(range(len(kinds)), key=lambda index: len(kinds[index] & missing))
        missing -= kinds[best]
        chosen.append(best)
    return [launches[index] for index in sorted(chosen)]


def _kinds_of(launch: Launch) -> set[tuple[Any, ...]]:
    flags = flags_of(launch)
    kinds: set[tuple[Any, ...]] = {(launch.name, flag) for flag in flags}
    kinds |= {(launch.name, launch.tile, flag) for flag in flags if flag.startswith(("w_along", "with "))}
    kinds |= {(launch.name, dtype_of(launch)), (launch.name, launch.tile)}
    return kinds | {(launch.name, launch.tile, "masked")} if is_masked(launch) else kinds


def is_masked(launch: Launch) -> bool:
    """Whether it draws or applies a dropout mask."""
    return any(launch.args.get(name) is not None for name in _MASKS)


def without_mask(launch: Launch) -> Launch | None:
    """The same launch without dropout; None for one that has none."""
    if not is_masked(launch):
        return None
    args = {name: None if name in _MASKS else value for name, value in launch.args.items()}
    return Launch(launch.kernel, launch.grid, args, launch.tile)


def without_low_rank(launch: Launch) -> Launch | None:
    """The product of a forward launch alone: rank 0, known to the compiler; None for another kernel."""
    if not launch.name.startswith("lowrank_forward"):
        return None
    # What is left of the low-rank term in the arguments is the same at any rank, so that ranks share one binary.
    rank = {"R": 0, "stride_vm": 16, "RANK_MULTIPLE": 16, "IN_ONE_STEP": False, "BLOCK_R": 16}
    args = {name: rank.get(name, value) for name, value in launch.args.items()}
    return _RankZero(launch.kernel, launch.grid, args, launch.tile)


class _RankZero(Launch):
    """A launch whose R is the constant 0: loops over the rank are not compiled."""

    def source(self) -> ASTSource:
        source = super().source()
        position = (next(param.num for param in self.kernel.params if param.name == "R"),)
        return ASTSource(
            fn=self.kernel,
            signature={**source.signature, "R": "constexpr"},
            constexprs={**source.constants, position: 0},
            attrs={key: value for key, value in source.attrs.items() if key != position},
        )
