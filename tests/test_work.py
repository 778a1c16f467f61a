"""Work, counted on the library route: what a method costs beyond the frozen layer, and beyond plain LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf
from bench.methods import MethodCase, Pair
from bench.published import PUBLISHED
from bench.work import Work, count_work

TOKENS, SIZE = 2048, 1024


def leaves(layer: lf.LowRankLinear, x: torch.Tensor) -> list[torch.Tensor]:
    return [x, *(getattr(layer, name) for name in layer.trained_names)]


def work(method: str, rank: int, published: bool = False, **options) -> Work:
    torch.manual_seed(0)
    layer = lf.LowRankLinear.from_linear(nn.Linear(SIZE, SIZE, bias=False), method=method, rank=rank, **options)
    x = torch.randn(TOKENS, SIZE, requires_grad=True)
    forward = PUBLISHED[method](layer) if published else layer
    return count_work(forward, x, leaves(layer, x), torch.randn(TOKENS, SIZE))


@pytest.fixture(scope="module")
def frozen() -> Work:
    x = torch.randn(TOKENS, SIZE, requires_grad=True)
    linear = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    return count_work(linear, x, [x], torch.randn(TOKENS, SIZE))


def relative(found: Work, frozen: Work) -> tuple[float, float]:
    return found.forward_flops / frozen.forward_flops, found.backward_flops / frozen.backward_flops


def test_the_counter_sees_what_arithmetic_says(frozen):
    assert frozen == Work(1, 1, 2 * TOKENS * SIZE * SIZE, 2 * TOKENS * SIZE * SIZE)
    found = work("lora", 16)
    skinny = 2 * TOKENS * 16 * SIZE
    assert found.forward_flops == frozen.forward_flops + 2 * skinny
    assert found.backward_flops == frozen.backward_flops + 4 * skinny


@pytest.mark.parametrize(
    ("method", "options", "pulled_back"),
    [
        ("unilora", {"theta_d_length": 4096}, 1),
        ("collaborative", {}, 1),
        ("collaborative", {"num_A": 4, "num_B": 10}, 1),
    ],
    ids=str,
)
def test_gathered_and_summed_factors_cost_what_lora_costs(method, options, pulled_back):
    """What is computed once per step (the gather, the sums) aside, which count_work computes beforehand."""
    plain, found = work("lora", 8), work(method, 8, **options)
    assert found.forward_operators == plain.forward_operators
    assert found.backward_operators == plain.backward_operators + pulled_back
    assert (found.forward_flops, found.backward_flops) == (plain.forward_flops, plain.backward_flops)


def test_neat_forms_no_update(frozen):
    """Skinny products alone; and the one with W that makes the factor (once per step) or trains it (in backward)."""
    forward, backward = relative(work("peanut", 32), frozen)
    skinny, with_w = 32 / SIZE, 32 / TOKENS
    assert (forward, backward) == pytest.approx((1 + 2 * skinny, 1 + 4 * skinny + with_w))
    assert forward + with_w <= 1.10 and backward <= 1.20


def test_pefts_layer_forms_the_update(frozen):
    pytest.importorskip("peft")
    assert relative(Pair.of(MethodCase("peanut", 32), SIZE, TOKENS).work("theirs"), frozen) == pytest.approx(
        (2.03, 3.05), abs=0.01
    )


def test_loldu_forms_no_dense_gradient(frozen):
    assert relative(work("loldu", 64), frozen)[1] <= 1.13


@pytest.mark.parametrize(("rank", "forward", "backward"), [(64, 1.06, 2.03), (256, 1.28, 2.16), (1024, 2.50, 3.00)])
def test_published_loldu_costs_what_is_said_of_it(rank, forward, backward, frozen):
    found = relative(work("loldu", rank, published=True), frozen)
    assert found == pytest.approx((forward, backward), abs=0.01)
    assert sum(relative(work("loldu", rank), frozen)) < sum(found)


@pytest.mark.parametrize("rank", [64, 256, 1024])
def test_loldu_takes_the_cheaper_of_two_products_and_a_formed_weight(rank, frozen):
    """Two skinny products each way, or the weight formed each way beside the product that the gradient of z needs."""
    two_products = 1 + 2 * rank / SIZE
    formed = 1 + rank / SIZE + rank / TOKENS
    assert relative(work("loldu", rank), frozen) == pytest.approx((min(two_products, formed),) * 2)


@pytest.mark.parametrize("strategy", ["full", "random", "random_reversed", "heuristic", "heuristic_code"])
def test_collaborative_pairs_cost_no_launch_each(strategy):
    assert work("collaborative", 8, num_A=4, num_B=10, strategy=strategy).forward_operators <= 10


def test_published_pairs_cost_what_is_said_of_them(frozen):
    found = work("collaborative", 8, published=True, num_A=4, num_B=10)
    assert found.forward_operators == 161
    assert relative(found, frozen) == pytest.approx((1.625, 2.25))
