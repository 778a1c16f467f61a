"""VB-LoRA (Li et al., 2024, arXiv 2405.15179): factors mixed from one bank of vectors. Trains bank and logits.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias,    s = alpha / r, which is 1 unless an alpha is given

Every stretch of `vector_length` = v elements along a row of A [r, in] and a column of B [out, r] is a sum of `topk`
vectors of the bank [num_vectors, v], weighted by a softmax over the largest logits of that stretch
(`vblora_logits_A` [r, in / v, num_vectors], `vblora_logits_B` [out / v, r, num_vectors]). The bank belongs to all
layers. It starts uniform in ±`init_vector_bank_bound`, the logits at N(0, `init_logits_std`²): a layer starts a
little beside the base layer. A and B depend on trained tensors only, so they are mixed once per step.

Paper, published code and PEFT agree; none has an alpha. What the paper counts is what it stores, the bank and for
every stretch topk indices and topk − 1 weights; all logits train. PEFT's files of that kind
(`save_only_topk_weights`) load: the logits that they lack become −∞, so that the choice of vectors is fixed from
then on while their weights and the bank still train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fused.initializers import compute_dtype
from lowrank_fused.peft_format import SHARED, PeftFormat
from lowrank_fused.terms import Terms

from . import Site, Start, method


def with_all_logits(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits in the place of the indices and weights that PEFT's save_only_topk_weights writes."""
    full = dict(tensors)
    for key in [key for key in tensors if key.endswith("_topk_indices")]:
        name = key.removesuffix("_topk_indices")
        indices, weights = full.pop(key).long(), full.pop(f"{name}_topk_weights")
        rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
        every = weights.new_full((*indices.shape[:-1], config["num_vectors"]), -torch.inf)
        full[name] = every.scatter_(-1, indices, torch.cat([weights, rest], -1).log())
    return full


def mixed(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """[..., num_vectors] -> [..., v], the chosen vectors weighted."""
    values, indices = logits.topk(topk, dim=-1)
    return (values.softmax(-1)[..., None] * bank[indices]).sum(-2)


@method
class VbLora:
    name = "vblora"
    formula = "y = x Wᵀ + s · drop(x) A(bank, logits)ᵀ B(bank, logits)ᵀ"
    differs_at_start = "neither factor starts at zero"
    small = {"num_vectors": 16, "vector_length": 4}
    variants = ({"topk": 3},)
    peft = PeftFormat(
        "VBLORA",
        fields={"lora_dropout": "vblora_dropout", "lora_alpha": None, "rank_pattern": None, "alpha_pattern": None},
        written={"bias": {"lora_only": "vblora_only"}},
        read={"bias": {"vblora_only": "lora_only"}},
        ignored=("save_only_topk_weights",),
        keys={"vblora_vector_bank": f"{SHARED}vblora_vector_bank"},
        unpack=with_all_logits,
    )

    @staticmethod
    def init(
        weight: Tensor,
        site: Site,
        rank: int = 4,
        alpha: float | None = None,
        *,
        num_vectors: int = 256,
        vector_length: int = 256,
        topk: int = 2,
        init_vector_bank_bound: float = 0.02,
        init_logits_std: float = 0.1,
    ) -> Start:
        out_features, in_features = weight.shape
        if not 1 <= topk <= num_vectors:
            raise ValueError(f"topk must be from 1 to num_vectors = {num_vectors}, got {topk!r}")
        if vector_length < 1 or in_features % vector_length or out_features % vector_length:
            raise ValueError(
                f"vector_length must divide in_features = {in_features} and out_features = {out_features}, "
                f"got {vector_length!r}"
            )
        dtype = compute_dtype(weight)
        if "vblora_vector_bank" not in site.shared:
            bank = weight.new_empty(num_vectors, vector_length, dtype=dtype)
            bank.uniform_(-init_vector_bank_bound, init_vector_bank_bound)
            site.shared["vblora_vector_bank"] = nn.Parameter(bank)
        logits_a = weight.new_empty(rank, in_features // vector_length, num_vectors, dtype=dtype)
        logits_b = weight.new_empty(out_features // vector_length, rank, num_vectors, dtype=dtype)
        return Start(
            {
                "vblora_vector_bank": site.shared["vblora_vector_bank"],
                "vblora_logits_A": logits_a.normal_(std=init_logits_std),
                "vblora_logits_B": logits_b.normal_(std=init_logits_std),
            },
            constants={"vblora_topk": topk, "vblora_scale": 1.0 if alpha is None else alpha / rank},
        )

    @staticmethod
    def generate(p: Any, weight: Tensor) -> tuple[Tensor, ...]:
        a = mixed(p.vblora_logits_A, p.vblora_vector_bank, p.vblora_topk)
        b = mixed(p.vblora_logits_B, p.vblora_vector_bank, p.vblora_topk)
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        a, b = p.generated
        return Terms(a, b, p.vblora_scale)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        def stretches(logits: Tensor) -> Tensor:
            least = logits.sort(descending=True).values[..., p.vblora_topk - 1, None]
            return logits.masked_fill(logits < least, -torch.inf).softmax(-1) @ p.vblora_vector_bank

        a = torch.stack([torch.cat([*row]) for row in stretches(p.vblora_logits_A)])
        b = torch.cat([block.T for block in stretches(p.vblora_logits_B)])
        return F.linear(x, weight + p.vblora_scale * b @ a, bias)
