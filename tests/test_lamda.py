"""LaMDA: its spectral start, and columns of B that freeze one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf
from lowrank_fused.training.lamda import ColumnFreezer

K, N, R = 24, 16, 5


def model_of(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return lf.inject(nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)), method="lamda", rank=R, **options)


def test_the_spectral_start_is_the_principal_part():
    layer = model_of(alpha=8)[0]
    original = layer.original_linear().weight
    u, s, vh = torch.linalg.svd(original, full_matrices=False)
    product = layer.scaling * layer.lamda_B @ layer.lamda_sigma @ layer.lamda_A
    torch.testing.assert_close(product, u[:, :R] @ s[:R].diag() @ vh[:R])
    torch.testing.assert_close(layer.lamda_sigma, (s[:R] / (8 / R)).diag())


def test_columns_stand_still_one_after_the_other():
    model = model_of(init_lamda="random")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    freezer = ColumnFreezer(model, total_steps=50, fraction=0.3)  # 15 steps for 5 columns
    b, moved = model[0].lamda_B, []
    for step in range(1, 21):
        before, sigma = b.detach().clone(), model[0].lamda_sigma.detach().clone()
        model(torch.randn(6, K)).square().sum().backward()
        optimizer.step()
        freezer.step()
        optimizer.zero_grad()
        moved.append((b != before).any(0).tolist())
        assert not torch.equal(sigma, model[0].lamda_sigma)
        assert b.requires_grad == (step < 15)
    for step, columns in enumerate(moved):  # after n steps n // 3 columns are frozen
        assert columns == [column >= step // 3 for column in range(R)], step


def test_a_frozen_b_costs_no_gradient():
    model = model_of()
    freezer = ColumnFreezer(model, total_steps=10, fraction=0.1)
    model(torch.randn(6, K)).sum().backward()
    freezer.step()
    assert model[0].lamda_B.grad is None
    model(torch.randn(6, K)).sum().backward()
    assert model[0].lamda_B.grad is None and model[0].lamda_sigma.grad.abs().max() > 0


def test_the_published_pace_needs_whole_steps_only():
    freezer = ColumnFreezer(model_of(), total_steps=100)
    paces = []
    for freezer.steps in (0, 5, 6, 29, 30, 100):
        paces.append(freezer.columns(10))
    assert paces == [0, 1, 2, 9, 10, 10]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="init_lamda must be 'spectral' or 'random'"):
        lf.AdapterConfig("lamda", init_lamda="zero")
    with pytest.raises(ValueError, match="total_steps must be at least 1"):
        ColumnFreezer(model_of(), total_steps=0)
    with pytest.raises(ValueError, match="not of method 'lamda'"):
        ColumnFreezer(lf.inject(nn.Sequential(nn.Linear(K, N)), method="lora"), total_steps=10)
