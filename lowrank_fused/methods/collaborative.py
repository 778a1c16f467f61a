"""CoLA (Zhou et al., 2025, arXiv 2505.15471): M matrices A and N matrices B that work in pairs. Trains all of them.

    y = x W₀ᵀ + s · Σ_{(i,j) ∈ E} drop(x) A_iᵀ B_jᵀ + bias,    s = alpha / r

A_i [r, in] are stacked in cola_A [M·r, in], B_j [out, r] in cola_B [out, N·r]. `strategy` names the pairs E:

    full              every A with every B: (Σ A_i, Σ B_j) is one pair of rank r
    random            each A with one B, drawn anew in every training call for all of its tokens
    random_reversed   each B with one A, likewise
    heuristic         the paper's: A_i with B_i, and all that are left with the last A       (M <= N)
    heuristic_code    the published code's: ⌊N/M⌋ neighbours each, then one more for the first A's

Whatever the pairs, summing the B's of each A (or the A's of each B, if these are fewer) leaves a plain low-rank term of
rank at most min(M, N)·r, and r for full. A random pairing comes from torch's generator of the layer's device, which
checkpointing replays; outside training it is `cola_pairs`, drawn with the layer and saved with it. (The published code
draws from Python's generator, in evaluation too: a recompute then pairs differently.)

The start is the paper's extended PiSSA: with scale · B* A* the principal part of W, A_i = A*/M, B_j = B*/N and
W₀ = W − s B* A*. Only the full strategy then starts as the base layer: the others keep |E| / (M N) of the principal
part. `energy_consistent=True` starts from A*/√|E| and B*/√|E| instead, which adds up to W for every strategy.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fused import initializers
from lowrank_fused.factors.stacked import sum_blocks
from lowrank_fused.terms import Terms

from . import Start, method

STRATEGIES = ("full", "random", "random_reversed", "heuristic", "heuristic_code")


@method
class Collaborative:
    name = "collaborative"
    formula = "y = x W₀ᵀ + s · Σ_(i,j) drop(x) A_iᵀ B_jᵀ"
    variants = (
        {"num_A": 1},
        {"strategy": "random"},
        {"strategy": "random", "num_A": 3, "num_B": 2, "energy_consistent": True},
        {"strategy": "random_reversed", "num_A": 2, "num_B": 5},
        {"strategy": "heuristic"},
        {"strategy": "heuristic", "num_B": 4, "energy_consistent": True},
        {"strategy": "heuristic_code", "num_A": 3, "num_B": 8},
    )

    @staticmethod
    def init(
        weight: Tensor,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        num_A: int = 2,
        num_B: int = 3,
        strategy: str = "full",
        energy_consistent: bool = False,
        init_lora_weights: str = "pissa",
    ) -> Start:
        _check(num_A, num_B, strategy)
        scale = alpha / rank
        start = initializers.get(init_lora_weights)
        if not start.residual:
            known = "pissa, pissa_niter_<n> or olora"
            raise ValueError(f"init_lora_weights must take its values out of W: {known}; got {init_lora_weights!r}")
        a, b = start.function(weight, rank, scale)
        share = _pair_count(num_A, num_B, strategy) / (num_A * num_B)
        into = [math.sqrt(share * num_A * num_B)] * 2 if energy_consistent else [num_A, num_B]
        constants = {
            "scaling": scale,
            "cola_strategy": strategy,
            "cola_num_A": num_A,
            "cola_num_B": num_B,
            "cola_taken": share if energy_consistent else 1.0,
        }
        # repeat copies: an in-place optimiser must not meet the same memory M times.
        trained = {"cola_A": (a / into[0]).repeat(num_A, 1), "cola_B": (b / into[1]).repeat(1, num_B)}
        return Start(trained, _frozen_pairs(num_A, num_B, strategy, weight.device), constants, residual=True)

    @staticmethod
    def differs_at_start(num_A: int, num_B: int, strategy: str, energy_consistent: bool, **_: Any) -> str | None:
        pairs, whole = _pair_count(num_A, num_B, strategy), num_A * num_B
        if energy_consistent or pairs == whole:
            return None
        return f"{strategy} uses {pairs} of {whole} pairs, and so keeps {pairs}/{whole} of W's principal part"

    @staticmethod
    def why_not_mergeable(p: Any) -> str | None:
        if p.cola_strategy.startswith("random"):
            return (
                f"strategy {p.cola_strategy!r} pairs factors anew in every training call: no one weight stands for it"
            )
        return None

    @staticmethod
    def generate(p: Any, weight: Tensor) -> tuple[Tensor, ...]:
        if p.cola_strategy == "full":
            return sum_blocks(p.cola_A, p.cola_B, p.cola_num_A, p.cola_num_B)
        return () if p.cola_strategy.startswith("random") else _paired(p, p.cola_pairs)

    @staticmethod
    def terms(p: Any, weight: Tensor, x: Tensor) -> Terms:
        if not p.cola_strategy.startswith("random"):
            a, b = p.generated
        elif p.training:
            choices = p.cola_num_B if p.cola_strategy == "random" else p.cola_num_A
            a, b = _paired(p, torch.randint_like(p.cola_pairs, choices))
        else:
            a, b = _paired(p, p.cola_pairs)
        return Terms(a, b, p.scaling)

    @staticmethod
    def taken_out(p: Any, weight: Tensor, x: Tensor) -> Terms:
        # At the start all A_i are equal, and all B_j: (Σ A_i, Σ B_j) is M N times any of their pairs.
        return Terms(*sum_blocks(p.cola_A, p.cola_B, p.cola_num_A, p.cola_num_B), p.scaling * p.cola_taken)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, p: Any) -> Tensor:
        m, n = p.cola_num_A, p.cola_num_B
        each, left = divmod(n, m)
        pairs = {
            "full": lambda: itertools.product(range(m), range(n)),
            "random": lambda: enumerate(p.cola_pairs.tolist()),
            "random_reversed": lambda: ((i, j) for j, i in enumerate(p.cola_pairs.tolist())),
            "heuristic": lambda: [(i, i) for i in range(m - 1)] + [(m - 1, j) for j in range(m - 1, n)],
            "heuristic_code": lambda: (
                [(i, i * each + k) for i in range(m) for k in range(each)] + [(i, m * each + i) for i in range(left)]
            ),
        }
        a, b = p.cola_A.chunk(m), p.cola_B.chunk(n, dim=1)
        delta = sum(b[j] @ a[i] for i, j in pairs[p.cola_strategy]())
        return F.linear(x, weight + p.scaling * delta, bias)


def _check(num_a: int, num_b: int, strategy: str) -> None:
    for name, number in (("num_A", num_a), ("num_B", num_b)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy.startswith("heuristic") and num_a > num_b:
        raise ValueError(
            f"strategy {strategy!r} needs num_A <= num_B, or some A would have no B; got {num_a} and {num_b}"
        )


def _pair_count(num_a: int, num_b: int, strategy: str) -> int:
    return {"full": num_a * num_b, "random": num_a}.get(strategy, num_b)


def _frozen_pairs(num_a: int, num_b: int, strategy: str, device: torch.device) -> dict[str, Tensor]:
    """`cola_pairs`, int64: for random [M] the B of each A, otherwise [N] the A of each B."""
    if strategy == "full":
        return {}
    if strategy.startswith("random"):
        choices, size = (num_b, num_a) if strategy == "random" else (num_a, num_b)
        return {"cola_pairs": torch.randint(choices, (size,), device=device)}
    each = num_b // num_a
    dealt = [j // each if j < each * num_a else j - each * num_a for j in range(num_b)]
    owners = dealt if strategy == "heuristic_code" else [min(j, num_a - 1) for j in range(num_b)]
    return {"cola_pairs": torch.tensor(owners, device=device)}


def _paired(p: Any, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank min(M, N)·r whose product is Σ_(i,j) B_j A_i.

    A product with the incidence [M, N] does it, in forward and backward: no atomics, and nothing as large as x.
    """
    a, b = p.cola_A, p.cola_B
    m, n = p.cola_num_A, p.cola_num_B
    by_a = p.cola_strategy == "random"
    chosen = pairs[:, None] == torch.arange(n if by_a else m, device=pairs.device)
    incidence = (chosen if by_a else chosen.t()).to(b.dtype)
    with contextlib.nullcontext() if b.is_meta else torch.autocast(b.device.type, enabled=False):
        if m <= n:
            b = torch.bmm(incidence.expand(len(b), m, n), b.unflatten(1, (n, -1))).flatten(1)
        else:
            a = (incidence.t() @ a.view(m, -1)).view(-1, a.shape[1])
    return a, b
