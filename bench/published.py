"""The methods as their authors' code computes them, operation by operation, over the tensors of one of our layers.

What these cost is what `bench.methods` compares with where PEFT does not have the method; where it has, PEFT's own
layer is what is measured. Formulas and order of operations are the published code's, the code is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PUBLISHED"]

Forward = Callable[[Tensor], Tensor]


def adapter(
    layer: Any, a: Callable[[], Tensor], middle: Callable[[Tensor], Tensor], b: Callable[[], Tensor]
) -> Forward:
    """base(x) + s · (middle(x Aᵀ)) Bᵀ: dropout, three or four products and an addition, as most of them do it."""

    def forward(x: Tensor) -> Tensor:
        low_rank = F.linear(middle(F.linear(F.dropout(x, layer.dropout_p), a())), b())
        return F.linear(x, layer.matrix, layer.bias) + low_rank * layer.scaling

    return forward


def loldu(layer: Any) -> Forward:
    """A parametrisation of the weight: W_res + σ P L diag(z) U, formed in every forward, P a dense permutation."""
    lower, upper, z = layer.loldu_L, layer.loldu_U, layer.loldu_z
    residual = layer.matrix - layer.loldu_sigma * (lower * layer.loldu_z0) @ upper
    permutation = torch.eye(layer.out_features, dtype=lower.dtype)[torch.randperm(layer.out_features)]
    unpermuted = permutation.t() @ lower

    def forward(x: Tensor) -> Tensor:
        delta = (layer.loldu_sigma * permutation) @ unpermuted @ torch.diag(z) @ upper
        return F.linear(x, residual + delta, layer.bias)

    return forward


def collaborative(layer: Any) -> Forward:
    """Every pair by itself: dropout, two products, scale, add."""

    def forward(x: Tensor) -> Tensor:
        result = F.linear(x, layer.matrix, layer.bias)
        for a in layer.cola_A.chunk(layer.cola_num_A):
            for b in layer.cola_B.chunk(layer.cola_num_B, dim=1):
                result = result + F.linear(F.linear(F.dropout(x, layer.dropout_p), a), b) * layer.scaling
        return result

    return forward


def hydralora(layer: Any) -> Forward:
    """A router in float32; then each expert's product on [tokens, out], weighted and added."""

    def forward(x: Tensor) -> Tensor:
        result = F.linear(x, layer.matrix, layer.bias)
        route = torch.softmax(F.linear(x, layer.lora_route), dim=-1, dtype=torch.float32).to(result.dtype)
        s = F.linear(F.dropout(x, layer.dropout_p), layer.lora_A)
        for e, b in enumerate(layer.lora_B.chunk(layer.lora_route.shape[0], dim=1)):
            result = result + route[..., e : e + 1] * F.linear(s, b) * layer.scaling
        return result

    return forward


def lorta(layer: Any) -> Forward:
    """Forms the [out, in] update from the factors, then a dense product with it."""

    def forward(x: Tensor) -> Tensor:
        common = layer.lorta_matrices[layer.lorta_matrix] * layer.lorta_layers[layer.lorta_layer]
        blocks = torch.einsum("nr,hr,r,rk->hnk", layer.lorta_B, layer.lorta_heads, common, layer.lorta_A)
        delta = blocks.reshape(layer.out_features, layer.in_features)
        return F.linear(x, layer.matrix, layer.bias) + F.linear(x, delta) * layer.scaling

    return forward


def ttlora(layer: Any) -> Forward:
    """Multiplies the tensor train out to [in, out], adds it to the weight, one product."""
    inputs, outputs = layer.ttlora_orders
    names = [f"ttlora_in_{i}" for i in range(inputs)] + [f"ttlora_out_{i}" for i in range(outputs)]

    def forward(x: Tensor) -> Tensor:
        train = getattr(layer, names[0])
        for name in names[1:]:
            train = torch.tensordot(train, getattr(layer, name), dims=1)
        delta = train.reshape(layer.in_features, layer.out_features).t()
        return F.linear(x, layer.matrix + layer.scaling * delta, layer.bias)

    return forward


def lora_squared(layer: Any) -> Forward:
    """Multiplies the four factors out to [in, out] in every call, then a dense product with it."""

    def forward(x: Tensor) -> Tensor:
        right = layer.lora2_A1.t() @ layer.lora2_B1.t()
        left = layer.lora2_A2.t() @ layer.lora2_B2.t()
        delta = (right * layer.lora2_E) @ left
        return F.linear(x, layer.matrix, layer.bias) + F.dropout(x, layer.dropout_p) @ delta * layer.scaling

    return forward


def unchanged(s: Tensor) -> Tensor:
    """No core."""
    return s


PUBLISHED: dict[str, Callable[[Any], Forward]] = {
    "loldu": loldu,
    "collaborative": collaborative,
    "hydralora": hydralora,
    "lorta": lorta,
    "ttlora": ttlora,
    "lora_squared": lora_squared,
    "lora_xs": lambda p: adapter(p, lambda: p.lora_A, lambda s: F.linear(s, p.lora_R), lambda: p.lora_B),
    "lamda": lambda p: adapter(p, lambda: p.lamda_A, lambda s: F.linear(s, p.lamda_sigma), lambda: p.lamda_B),
    "dynamic_rank": lambda p: adapter(p, lambda: p.lora_A * p.lora_c[:, None], unchanged, lambda: p.lora_B),
    "beamlora": lambda p: adapter(
        p,
        lambda: p.lora_A,
        lambda s: s * (len(p.lora_gate) * torch.softmax(p.lora_gate / p.temperature, 0)),
        lambda: p.lora_B,
    ),
    "qrlora": lambda p: adapter(p, lambda: p.qrlora_delta.triu(), unchanged, lambda: p.qrlora_Q),
    "raclora": lambda p: adapter(p, lambda: p.lora_A, unchanged, lambda: p.lora_B),
}
