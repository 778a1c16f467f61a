"""RAC-LoRA: the chain of merges and new frozen factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf
from lowrank_fused.training.raclora import redraw

K, N, R = 24, 16, 3


def model_of(side: str = "B") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).double()
    return lf.inject(model, method="raclora", rank=R, side=side)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(torch.randn(6, K, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_link_ends_in_the_weight_and_the_next_begins_anew(side):
    model = model_of(side)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    train(model, optimizer)
    x = torch.randn(6, K, dtype=torch.float64)
    before, weight = model(x), model[0].weight.clone()
    other = "lora_A" if side == "B" else "lora_B"
    frozen = getattr(model[0], other).clone()
    assert len(optimizer.state) == 2
    redraw(model, optimizer)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert not model[0].merged and not torch.equal(model[0].weight, weight)
    assert all((p == 0).all() for p in trained) and not optimizer.state
    assert (getattr(model[0], other) != frozen).all()
    train(model, optimizer)
    assert not torch.allclose(model(x), before)


def test_the_chain_leaves_the_rank_of_a_link_behind():
    model = model_of()
    start = model[0].weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        train(model, optimizer, 1)
        redraw(model, optimizer)
    assert torch.linalg.matrix_rank(model[0].weight - start, rtol=1e-9) == 4 * R


def test_one_layer_that_cannot_merge_leaves_all_as_they_were():
    model = model_of()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    train(model, optimizer)
    model[2].tied_to = "an embedding"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lf.UnsupportedError, match="tied"):
        redraw(model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(optimizer.state) == 2 and not model[0].merged


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="side must be 'A' or 'B'"):
        lf.AdapterConfig("raclora", side="C")
    with pytest.raises(ValueError, match="not of method 'raclora'"):
        redraw(lf.inject(nn.Sequential(nn.Linear(K, N)), method="lora"))
