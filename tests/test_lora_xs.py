"""LoRA-XS: factors are W's singular vectors with all singular values at the input, and stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_fused as lf
from lowrank_fused.initializers.svd import truncated_svd


def adapted(**more) -> lf.LowRankLinear:
    torch.manual_seed(0)
    return lf.LowRankLinear.from_linear(nn.Linear(20, 12), method="lora_xs", **{"rank": 4, "alpha": 8, **more})


def test_the_factors_are_the_best_approximation_with_the_singular_values_in_a():
    layer = adapted()
    u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, (u[:, :4] * s[:4]) @ vh[:4])
    torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, s[:4].square().diag(), rtol=1e-5, atol=1e-5)


def test_the_identity_in_the_middle_adds_that_part_times_the_scale():
    layer, x = adapted(), torch.randn(5, 20)
    with torch.no_grad():
        layer.lora_R.copy_(torch.eye(4))
    expected = nn.functional.linear(x, layer.weight + 2 * layer.lora_B @ layer.lora_A, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_only_the_middle_trains_and_starts_tiny():
    layer = adapted(rank=10)
    assert layer.trained_names == ("lora_R",) and layer.lora_R.shape == (10, 10)
    assert 0.5e-5 < layer.lora_R.std() < 2e-5
    assert adapted(init_std=0.0).lora_R.abs().max() == 0
    with pytest.raises(ValueError, match="init_std must not be negative"):
        adapted(init_std=-1.0)


def test_the_fast_decomposition_finds_the_same_directions():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.7 ** torch.arange(30.0))
    torch.manual_seed(0)
    exact, fast = truncated_svd(weight, 4), truncated_svd(weight, 4, niter=10)
    assert [part.shape for part in fast] == [(40, 4), (4,), (4, 30)]
    products = [u * s @ vh for u, s, vh in (exact, fast)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"rank 31 is too large to decompose a weight \[40, 30\]"):
        truncated_svd(weight, 31)


def test_the_file_holds_the_basis_or_its_hash(tmp_path):
    model = lf.inject(nn.Sequential(nn.Linear(20, 12)), method="lora_xs", rank=4)
    base = nn.Sequential(nn.Linear(20, 12))
    base.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "lora" not in key.partition(".")[2]}
    )
    x = torch.randn(3, 20)
    for frozen in ("save", "hash"):
        lf.save_adapter(model, tmp_path / frozen, frozen=frozen)
        twin = lf.load_adapter(nn.Sequential(nn.Linear(20, 12)), tmp_path / "save") if frozen == "save" else None
        assert twin is None or torch.equal(twin[0].lora_A, model[0].lora_A)
    assert torch.equal(lf.load_adapter(base, tmp_path / "hash")(x), model(x))
    with pytest.raises(lf.CheckpointError, match="not the basis that was trained in"):
        lf.load_adapter(nn.Sequential(nn.Linear(20, 12)), tmp_path / "hash")
