"""DoRA with dynamic rank: importance of terms, the penalty, and pruning to a budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf
from lowrank_fused.training.dynamic_rank import RankPruner, importance, variance_penalty

K, N, R = 24, 16, 5


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)).double()
    return lf.inject(model, method="dynamic_rank", rank=R)


def test_importance_is_the_share_of_a_term_in_the_update():
    layer = model_of()[0]
    assert torch.equal(importance(layer), torch.zeros(R, dtype=torch.float64))
    with torch.no_grad():
        layer.lora_c.normal_()
    terms = [layer.lora_c[k] * torch.outer(layer.lora_B[:, k], layer.lora_A[k]) for k in range(R)]
    expected = torch.stack([term.norm() / sum(terms).norm() for term in terms])
    torch.testing.assert_close(importance(layer), expected)


def test_the_penalty_is_the_mean_variance_of_rows_and_columns():
    model = model_of()
    rows = [row for layer in model for row in (*layer.lora_A, *layer.lora_B.t())]
    penalty = variance_penalty(model)
    torch.testing.assert_close(penalty, sum(row.var() for row in rows) / (4 * R))
    penalty.backward()
    assert model[1].lora_B.grad.abs().max() > 0 and model[0].lora_c.grad is None


def test_prunes_the_least_important_terms_to_the_budget_and_holds_them():
    model = model_of()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    pruner = RankPruner(model, total_steps=100, target_rank=2, start=0.1, end=0.5, interval=5)
    counts = []
    for _ in range(100):
        model(torch.randn(6, K, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        counts.append(sum(int((layer.lora_c == 0).sum()) for layer in model))
    assert counts[9] == 0 and counts[49:] == [6] * 51
    assert sum(pruner.ranks.values()) == 4
    for path, kept in pruner.kept.items():
        assert torch.equal(model[int(path)].lora_c != 0, kept)


def test_the_pruned_share_grows_with_the_cube_of_progress():
    pruner = RankPruner(model_of(), total_steps=100, target_rank=1, start=0.1, end=0.5)
    found = []
    for pruner.steps in (0, 10, 30, 40, 50, 100):
        found.append(pruner.pruned())
    assert found == [0, 0, 1, 3, 8, 8]


def test_what_is_pruned_is_what_weighs_least():
    model = model_of()
    with torch.no_grad():
        for layer in model:
            layer.lora_A.fill_(1.0), layer.lora_B.fill_(1.0)
            layer.lora_c.copy_(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]))
    pruner = RankPruner(model, total_steps=1, target_rank=3, start=0.0, end=1.0, interval=1)
    pruner.step()
    for layer in model:
        assert layer.lora_c.tolist() == [5.0, 0.0, 4.0, 0.0, 3.0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="target_rank 6 is not above 0"):
        RankPruner(model_of(), total_steps=10, target_rank=6)
    with pytest.raises(ValueError, match="expected 0 <= start < end <= 1"):
        RankPruner(model_of(), total_steps=10, target_rank=2, start=0.5, end=0.5)
    with pytest.raises(ValueError, match="not of method 'dynamic_rank'"):
        variance_penalty(lf.inject(nn.Sequential(nn.Linear(K, N)), method="lora"))
