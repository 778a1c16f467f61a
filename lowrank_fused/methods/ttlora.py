"""TT-LoRA (Anjum et al., 2024, arXiv 2408.01008): the update as a tensor train. Trains the cores.

    ΔW[o₁…o_q, i₁…i_p] = G₁[i₁] ⋯ G_p[i_p] H₁[o₁] ⋯ H_q[o_q],    y = x Wᵀ + alpha · drop(x) ΔWᵀ + bias

in = i₁⋯i_p and out = o₁⋯o_q, row-major; G [left, i, right], H [left, o, right], all bonds r but the outer two, which
are 1. The bond between the blocks is the rank: the input cores contract to A [r, in], the output cores to B [out, r],
once per step. As published, alpha itself is the scale.

Each dimension is split into `order` factors as equal as its prime factors allow, or as `factors={768: [12, 8, 8]}`
says. By default the last core is zero and the layer starts as the base layer. `init_cores="gaussian"` is the published
direct start, all cores normal with variance 1/n, n their middle dimension, which does not start as the base layer; nor
does the tensor train of a random matrix that the published code replaces it by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.terms import Terms

from . import Start, method


@method
class TtLora:
    name = "ttlora"
    formula = "y = x Wᵀ + α · drop(x) (G₁ ⋯ G_p H₁ ⋯ H_q)ᵀ"
    variants = ({"init_cores": "gaussian"}, {"factors": {20: [4, 5], 12: [2, 6]}})

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 8,
        alpha: float = 1.0,
        *,
        order: int = 3,
        factors: Mapping[int | str, Sequence[int]] | None = None,
        init_cores: str = "zero",
    ) -> Start:
        if init_cores not in ("zero", "gaussian"):
            raise ValueError(f"init_cores must be 'zero' or 'gaussian', got {init_cores!r}")
        out_features, in_features = weight.shape
        ins, outs = _split(in_features, order, factors), _split(out_features, order, factors)
        bonds = [1, *[rank] * (len(ins) + len(outs) - 1), 1]
        names = [f"ttlora_in_{i}" for i in range(len(ins))] + [f"ttlora_out_{i}" for i in range(len(outs))]
        cores = {}
        for name, left, n, right in zip(names, bonds[:-1], ins + outs, bonds[1:], strict=True):
            # Entries of A then have variance 1/in, and each output core keeps the size of what it multiplies.
            fan = n if init_cores == "gaussian" else left * n if "_in_" in name else left
            cores[name] = weight.new_empty(left, n, right, dtype=compute_dtype(weight)).normal_(std=fan**-0.5)
        if init_cores == "zero":
            cores[names[-1]].zero_()
        return Start(cores, constants={"scaling": float(alpha), "ttlora_orders": (len(ins), len(outs))})

    @staticmethod
    def differs_at_start(order: int, factors: Any, init_cores: str) -> str | None:
        return "no core starts at zero" if init_cores == "gaussian" else None

    @staticmethod
    def generate(p: Any, weight: Tensor) -> tuple[Tensor, ...]:
        inputs, outputs = _cores(p)
        a = inputs[0]
        for core in inputs[1:]:
            a = torch.einsum("anr,rms->anms", a, core).flatten(1, 2)
        b = outputs[0]
        for core in outputs[1:]:
            b = torch.einsum("anr,rms->anms", b, core).flatten(1, 2)
        return a[0].t().contiguous(), b[:, :, 0].t().contiguous()

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        a, b = p.generated
        return Terms(a, b, p.scaling)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        inputs, outputs = _cores(p)
        train = weight.new_ones(1)
        for core in inputs + outputs:
            train = torch.tensordot(train, core, dims=1)
        delta = train.reshape(weight.shape[1], weight.shape[0]).T
        return F.linear(x, weight + p.scaling * delta, bias)


def _cores(p: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The input cores and the output cores, in order."""
    inputs, outputs = p.ttlora_orders
    return (
        [getattr(p, f"ttlora_in_{i}") for i in range(inputs)],
        [getattr(p, f"ttlora_out_{i}") for i in range(outputs)],
    )


def _split(size: int, order: int, factors: Mapping[int | str, Sequence[int]] | None) -> list[int]:
    """The factors of a dimension; JSON turns the keys of `factors` into strings."""
    given = factors or {}
    chosen = given.get(size, given.get(str(size)))
    if chosen is not None:
        if math.prod(chosen) != size or min(chosen) < 1:
            raise ValueError(f"factors of {size} must multiply to it, got {list(chosen)}")
        return list(chosen)
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be a positive integer, got {order!r}")
    split = [1] * order
    for prime in _primes_of(size):
        split[split.index(min(split))] *= prime
    return sorted(split)


def _primes_of(size: int) -> list[int]:
    """Prime factors with their multiplicity, largest first."""
    found, prime = [], 2
    while prime * prime <= size:
        while size % prime == 0:
            found.append(prime)
            size //= prime
        prime += 1
    return ([size] if size > 1 else []) + found[::-1]
