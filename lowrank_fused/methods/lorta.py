"""LoRTA (Hounie et al., 2024, arXiv 2410.04060): one CP tensor over layers, matrices and heads. Trains its factors.

    ΔW[layer l, matrix m, head h] = s · B diag(C_heads[h] ∘ C_matrices[m] ∘ C_layers[l]) A,    s = alpha / r

A [r, in], B [out / H, r], C_heads [H, r], C_matrices [M, r], C_layers [L, r]; the H blocks of ΔW are stacked to
[out, in]. For the engine, C_heads goes onto copies of B and the two other factors are a diagonal core.

The paper's tensor spans square projections (q, k, v, o) of one size. Here layers of one shape and rank form one tensor,
so that other shapes (grouped keys, MLPs) have tensors of their own. A layer's place in it is read from its path: the
first number is the layer, the rest the kind of matrix. B starts at zero, A and C uniform in ±1/√r as in the published
code, which starts as the base layer; the published code forms every ΔW before the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.terms import Terms

from . import Site, Start, method


@method
class Lorta:
    name = "lorta"
    formula = "y = x Wᵀ + s · ((drop(x) Aᵀ) ∘ C_m ∘ C_l) (C_h ⊙ B)ᵀ"
    small = {"heads": 4}

    @staticmethod
    def init(weight: Tensor, site: Site, rank: int = 8, alpha: float | None = None, *, heads: int = 32) -> Start:
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or weight.shape[0] % heads:
            raise ValueError(f"heads must be an integer that divides out_features = {weight.shape[0]}, got {heads!r}")
        places = _places_of_alike(site)
        layers, matrices = (list(dict.fromkeys(found)) for found in zip(*places.values(), strict=True))
        key = f"lorta_{tuple(weight.shape)}_{rank}"
        if key not in site.shared:
            site.shared[key] = _tensor(weight, rank, heads, len(matrices), len(layers))
        layer, matrix = places[site.index]
        constants = {
            "scaling": 1.0 if alpha is None else alpha / rank,
            "lorta_layer": layers.index(layer),
            "lorta_matrix": matrices.index(matrix),
        }
        return Start(dict(site.shared[key]), constants=constants)

    @staticmethod
    def generate(p: Any, weight: Tensor) -> tuple[Tensor, ...]:
        b = (p.lorta_heads[:, None, :] * p.lorta_B).flatten(0, 1)  # [out, r]
        return b, p.lorta_matrices[p.lorta_matrix] * p.lorta_layers[p.lorta_layer]

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        b, core = p.generated
        return Terms(p.lorta_A, b, p.scaling, core)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        common = p.lorta_matrices[p.lorta_matrix].diag() @ p.lorta_layers[p.lorta_layer].diag()
        blocks = [p.lorta_B @ head.diag() @ common @ p.lorta_A for head in p.lorta_heads]
        return F.linear(x, weight + p.scaling * torch.cat(blocks), bias)


def _places_of_alike(site: Site) -> dict[int, tuple[str, str]]:
    """Index -> (layer, kind of matrix) for the layers of this one's shape and rank."""
    kind = (site.shapes[site.index], site.ranks[site.index])
    alike = [i for i, found in enumerate(zip(site.shapes, site.ranks, strict=True)) if found == kind]
    return {i: _place(site.paths[i]) for i in alike}


def _place(path: str) -> tuple[str, str]:
    """("3", "model.layers.self_attn.q_proj") for model.layers.3.self_attn.q_proj; ("", path) without a number."""
    parts = path.split(".")
    layer = next((part for part in parts if part.isdigit()), None)
    if layer is None:
        return "", path
    parts.remove(layer)
    return layer, ".".join(parts)


def _tensor(weight: Tensor, rank: int, heads: int, matrices: int, layers: int) -> dict[str, nn.Parameter]:
    """The factors of one CP tensor at their starting values."""
    shapes = {
        "lorta_A": (rank, weight.shape[1]),
        "lorta_heads": (heads, rank),
        "lorta_matrices": (matrices, rank),
        "lorta_layers": (layers, rank),
    }
    bound, dtype = rank**-0.5, compute_dtype(weight)
    drawn = {name: weight.new_empty(shape, dtype=dtype).uniform_(-bound, bound) for name, shape in shapes.items()}
    b = weight.new_zeros(weight.shape[0] // heads, rank, dtype=dtype)
    return {name: nn.Parameter(value) for name, value in {**drawn, "lorta_B": b}.items()}
