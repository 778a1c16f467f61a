"""Bytes that our routes move beside the frozen products, in closed form: what their launchers are held to.

A bf16 layer has x [M, K] of X bytes, y and dy [M, N] of Y, s, v and ds [M, R] of S each, A and dA of 2RK, B and dB of
2NR, and with dropout a mask of M·⌈K / 8⌉. Every tensor counts once for each launch that reads or writes it. The frozen
products, x Wᵀ and dy W, move X + Y + W each. Beside them move, forward and backward,

    split     X + A + B + 3S + mask             Y + X + 2A + 2B + 4S + 2 mask
    thin      2Y more: v Bᵀ, then added to      2X more: mask ∘ ds A, then added to; a mask and an S less
    single    A + B + S + mask                  as split

Layers that share x are one layer whose A, B, S and Y are the sums of theirs and whose X and mask are those of one, but
dx is added to once more for every further one: (n - 1) X more.

Three limits change that. Where descriptors read B (sm_90, sm_100) it is copied at ranks that are no multiples of 8: 2B
more. Beyond `one_pass_max_rank` ds and dB take a pass over dy each: Y more, and in a group 2S for
rows of s that lie side by side. Beyond `block_of_rank` ranks in all, dA and mask ∘ ds A take a launch each: S + mask
more.

Sums in parts, written and read again by one launch and for the most part out of L2, are counted apart: `partial_sums`.
Beside all else that a step of a Llama-3-8B layer moves (`split`, no dropout), products included, they are at most 0.04
at 8192 tokens and rank 16, 0.12 at 1024 tokens, and 0.22 at 8192 tokens and rank 64; at 1024 tokens and rank 128, 0.83.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowrank_fused.kernels.dy_factors import one_pass_max_rank
from lowrank_fused.kernels.launch import Launch, cdiv
from lowrank_fused.kernels.shrink import block_of_rank
from lowrank_fused.kernels.single_forward import max_rank

from .groups import Members
from .passes import Setting, Tensors

__all__ = ["Extra", "extra_bytes", "partial_sums"]


class Extra(NamedTuple):
    """Bytes beside the frozen products."""

    forward: int
    backward: int


def extra_bytes(route: str, members: Members, setting: Setting) -> Extra:
    """What `route` (split, thin; single for one layer) moves beside the frozen products of layers that share x."""
    count, rank = len(members), setting.rank
    sizes = [Tensors.of(member, setting).sizes for member in members]
    x = sizes[0]["x"]
    y, s, a, b = (sum(of[name] for of in sizes) for name in ("y", "s", "A", "B"))
    mask = setting.tokens * cdiv(members[0].in_features, 8) if setting.dropout else 0
    forward = x + a + b + 3 * s + mask
    if route != "thin" and rank % 8 and setting.arch in (90, 100):
        forward += 2 * b
    if route == "thin":
        forward += 2 * y
    elif route == "single" and rank <= max_rank(torch.bfloat16, torch.bfloat16):
        forward = a + b + s + mask
    backward = y + 2 * b + 2 * s + x + s + a + mask  # ds and dB from dy, dA from x
    if rank > one_pass_max_rank(torch.bfloat16, setting.arch):
        backward += y + (2 * s if count > 1 else 0)
    if route != "thin":
        backward += s + a + mask + (count - 1) * x
    else:
        backward += a + x + count * x
        if rank * count > block_of_rank(rank * count, torch.bfloat16):
            backward += s + mask
    return Extra(forward, backward)


def partial_sums(launch: Launch) -> int:
    """Bytes of the fp32 parts that a launch writes and reads again, from its grid and the sizes it is told.

    Parts of s for each share of the columns of x, of ds for each strip of the columns of dy, of dB, dA and a factor of
    the weight for each chunk of rows; of the gradient of a core for each program.
    """
    name, args, chunks = launch.name, launch.args, launch.grid[1] if len(launch.grid) > 1 else 1
    if name == "shrink":
        shares = launch.grid[2]
        count = shares * args["M"] * args["R"] if shares > 1 else 0
    elif name == "dy_factors":
        strips = launch.grid[0]
        count = args["R"] * (strips * args["M"] + chunks * args["N"])
        count += args["R"] * strips * chunks if args["dcore_parts_ptr"] is not None else 0
    elif name in ("x_factors", "weight_factor"):
        count = chunks * args["R"] * args["K"] if chunks > 1 else 0
    else:
        count = 0
    return 2 * 4 * count
