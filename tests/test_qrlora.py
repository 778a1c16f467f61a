"""QR-LoRA: its factors, its mask, and the equality of its two forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf

K, N, R = 24, 16, 5


def layer_of(**options) -> lf.LowRankLinear:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=torch.float64)
    return lf.LowRankLinear.from_linear(linear, method="qrlora", rank=R, alpha=8, **options)


def test_the_factors_are_those_of_the_principal_part():
    layer = layer_of(form="residual")
    original = layer.original_linear().weight
    u, s, vh = torch.linalg.svd(original, full_matrices=False)
    principal = u[:, :R] @ s[:R].diag() @ vh[:R]
    torch.testing.assert_close(layer.scaling * layer.qrlora_Q @ layer.qrlora_R, principal)
    torch.testing.assert_close(layer.qrlora_Q.t() @ layer.qrlora_Q, torch.eye(R, dtype=torch.float64))
    below = torch.ones(R, K).tril(-1).bool()
    assert torch.equal(layer.qrlora_R[below], torch.zeros(int(below.sum()), dtype=torch.float64))


def test_both_forms_compute_the_same():
    delta, residual = layer_of(), layer_of(form="residual")
    with torch.no_grad():
        delta.qrlora_delta.normal_()
        residual.qrlora_delta.copy_(delta.qrlora_delta)
    x = torch.randn(6, K, dtype=torch.float64)
    torch.testing.assert_close(delta(x), residual(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_entries_below_the_diagonal_get_no_gradient_and_stay_zero(form):
    layer = layer_of(form=form, delta_scale=0.01)
    optimizer = torch.optim.AdamW([layer.qrlora_delta], lr=0.1, weight_decay=0.1)
    before = layer.qrlora_delta.detach().clone()
    masked = torch.ones(R, K).tril(-1).bool()
    for _ in range(3):
        layer(torch.randn(6, K, dtype=torch.float64)).square().sum().backward()
        assert (layer.qrlora_delta.grad[masked] == 0).all() and (layer.qrlora_delta.grad[~masked] != 0).all()
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.qrlora_delta[masked] == 0).all()
    assert (layer.qrlora_delta != before)[~masked].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "dense"}, "form must be 'delta' or 'residual'"),
        ({"delta_scale": -1.0}, "delta_scale must not be negative"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        lf.AdapterConfig("qrlora", **options)
