"""Starting values: LoRA's factors, and the leading LDU factors of a weight with their hazards."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf
from lowrank_fused import initializers
from lowrank_fused.initializers.ldu import diagonal, ldu

DIAGONALS = ("lu", "uniform", "normal", "constant", "ones", "zeros", "s_uniform", "s_normal")
IN_WS_DTYPE = {"autocast_adapter_dtype": False}
SHAPES = [(12, 12, 12), (12, 12, 1), (20, 9, 9), (9, 20, 9), (33, 17, 5), (8, 40, 3), (1, 6, 1), (6, 1, 1)]


def relative(error: Tensor, to: Tensor) -> float:
    return (error.double().norm() / to.double().norm()).item()


@pytest.mark.parametrize("name", [*initializers.registry(), "pissa_niter_4", True, False], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_factors_have_their_shapes_precision_and_start(name, dtype):
    weight = torch.randn(10, 14).to(dtype)
    start = initializers.get(name)
    a, b = start.function(weight, 4, 0.5)
    assert a.shape == (4, 14) and b.shape == (10, 4)
    assert a.dtype == b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if not start.residual and name not in (False, "random"):
        assert (b @ a).abs().max() < 1e-6
        assert a.abs().max() > 0 or b.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "of_a", "of_b"),
    [
        ("kaiming", lambda k, r: 1 / (3 * k), None),
        ("init_a", lambda k, r: 1 / k, None),
        ("gaussian", lambda k, r: 1 / r**2, None),
        ("init_b", None, lambda k, r: 1 / r),
    ],
)
def test_variances_are_those_of_the_paper(name, of_a, of_b):
    torch.manual_seed(0)
    k, r = 512, 64
    a, b = initializers.get(name).function(torch.empty(768, k), r, 1.0)
    for factor, variance in ((a, of_a), (b, of_b)):
        if variance is None:
            assert not factor.any()
        else:
            assert factor.mean().abs() < 4 * math.sqrt(variance(k, r) / factor.numel())
            # The standard deviation of a variance estimate is at most √(2 / n) of it.
            assert abs(factor.var() / variance(k, r) - 1) < 4 * math.sqrt(2 / factor.numel())
    if name == "kaiming":
        assert a.abs().max() <= k**-0.5


def test_init_a_and_init_b_leave_the_partner_without_a_gradient():
    for name, still, moving in (("init_a", "lora_A", "lora_B"), ("init_b", "lora_B", "lora_A")):
        layer = lf.LowRankLinear.from_linear(nn.Linear(12, 10), rank=4, init_lora_weights=name)
        layer(torch.randn(5, 12)).square().sum().backward()
        assert not getattr(layer, still).grad.any()
        assert getattr(layer, moving).grad.abs().max() > 0


def test_orthogonal_factors_cancel_with_both_there():
    torch.manual_seed(0)
    a, b = initializers.get("orthogonal").function(torch.empty(300, 400, dtype=torch.float64), 32, 1.0)
    assert (b @ a).abs().max() < 1e-12
    for factor in (a, b):
        assert torch.linalg.matrix_rank(factor) == 16
        # Rows of an orthogonal matrix are as long as the 16 normal numbers that they are summed with are many: 1/2.
        assert abs(factor.var() * 200 - 1) < 0.05
    layer = lf.LowRankLinear.from_linear(nn.Linear(12, 10), rank=4, init_lora_weights="orthogonal")
    layer(torch.randn(5, 12)).square().sum().backward()
    assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0
    with pytest.raises(ValueError, match="needs an even rank, got 3"):
        lf.AdapterConfig(r=3, init_lora_weights="orthogonal")


def test_orthogonal_draws_from_the_same_distribution_as_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=64, init_lora_weights="orthogonal", target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(500, 400)), config).base_model.model[0]
    factors = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    for ours, right in zip(
        initializers.get("orthogonal").function(torch.empty(400, 500), 64, 1.0), factors, strict=True
    ):
        assert abs(ours.std() / right.std() - 1) < 0.05
        spectra = torch.linalg.svdvals(ours)[:32], torch.linalg.svdvals(right)[:32]
        torch.testing.assert_close(*spectra, rtol=0.1, atol=0)


def test_nystrom_sketches_the_column_space_of_w():
    torch.manual_seed(0)
    weight = torch.randn(30, 6, dtype=torch.float64) @ torch.randn(6, 50, dtype=torch.float64)
    a, b = initializers.get("nystrom").function(weight, 4, 1.0)
    basis = torch.linalg.qr(weight[:, :6]).Q
    assert not a.any() and torch.linalg.matrix_rank(b) == 4
    torch.testing.assert_close(basis @ (basis.T @ b), b)
    draws = [initializers.get("nystrom").function(weight, 4, 1.0)[1] for _ in range(4000)]
    assert relative(sum(b @ b.T for b in draws) / 4000 - weight @ weight.T, weight @ weight.T) < 0.05
    layer = lf.LowRankLinear.from_linear(nn.Linear(12, 10), rank=4, init_lora_weights="nystrom")
    layer(torch.randn(5, 12)).square().sum().backward()
    assert not layer.lora_B.grad.any() and layer.lora_A.grad.abs().max() > 0


@pytest.mark.parametrize("name", [*initializers.registry(), True, False], ids=str)
def test_peft_loads_an_adapter_of_every_start(name, tmp_path):
    peft = pytest.importorskip("peft")

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(14, 10))

    model = lf.inject(network(), rank=4, alpha=8, init_lora_weights=name, target_modules=["0"])
    lf.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path)
    x = torch.randn(5, 14)
    torch.testing.assert_close(model(x), theirs(x))


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_pissa_takes_the_best_low_rank_part(scale):
    torch.manual_seed(0)
    weight = torch.randn(10, 14, dtype=torch.float64)
    a, b = initializers.get("pissa").function(weight, 4, scale)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(scale * b @ a, u[:, :4] @ s[:4].diag() @ vh[:4], rtol=0, atol=1e-12)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-10, atol=0)


def test_fast_pissa_comes_close_to_pissa():
    torch.manual_seed(0)
    left, right = torch.randn(64, 8), torch.randn(8, 48)
    weight = left @ torch.logspace(1, -2, 8).diag() @ right
    exact, fast = (initializers.get(n).function(weight, 4, 1.0) for n in ("pissa", "pissa_niter_8"))
    assert relative(fast[1] @ fast[0] - exact[1] @ exact[0], weight) < 1e-4


def test_olora_has_orthonormal_columns_and_ws_leading_columns():
    weight = torch.randn(10, 14, dtype=torch.float64)
    a, b = initializers.get("olora").function(weight, 4, 3.0)
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close((b @ a)[:, :4], weight[:, :4])


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_residual_starts_leave_the_layer_as_it_was(name, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(14, 10, dtype=dtype)
    original = linear.weight
    layer = lf.LowRankLinear.from_linear(linear, rank=4, alpha=8, init_lora_weights=name)
    assert linear.weight is original and layer.weight is not original
    factors = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    # The residual is made from the factors as they are stored, so one rounding of it is all that is lost.
    lost = layer.weight.double() + factors - original.double()
    assert lost.abs().max() <= torch.finfo(dtype).eps * layer.weight.abs().max()
    assert layer.original_linear() is linear and linear.weight is original


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_residual_starts_agree_with_peft(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(14, 10))
    layer = lf.LowRankLinear.from_linear(model[0], rank=4, alpha=8, init_lora_weights=name)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=name, target_modules=["0"])
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    torch.testing.assert_close(layer.weight, theirs.base_layer.weight, rtol=0, atol=1e-6)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, product, rtol=0, atol=1e-6)


def test_kaiming_draws_from_the_same_distribution_as_peft():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(64, 8)), peft.LoraConfig(r=256, target_modules=["0"]))
    theirs = theirs.base_model.model[0].lora_A["default"].weight
    ours, _ = initializers.get(True).function(torch.empty(8, 64), 256, 1.0)
    assert theirs.abs().max() <= 64**-0.5 and ours.abs().max() <= 64**-0.5
    assert abs(ours.var() / theirs.var() - 1) < 0.05


@pytest.mark.parametrize("value", ["pisa", "kaiming_niter_4", "pissa_niter_x", "eva", 3, None])
def test_an_unknown_start_is_refused(value):
    with pytest.raises((ValueError, TypeError), match="init_lora_weights"):
        lf.AdapterConfig(init_lora_weights=value)


def test_decompositions_refuse_a_rank_they_do_not_have():
    for method, options in (
        ("lora", {"init_lora_weights": "pissa"}),
        ("lora", {"init_lora_weights": "olora"}),
        ("loldu", {}),
    ):
        with pytest.raises(ValueError, match=r"rank 11 is too large to decompose a weight \[10, 14\]"):
            lf.LowRankLinear.from_linear(nn.Linear(14, 10), method=method, rank=11, **options)


# LDU


@pytest.mark.parametrize(("n", "k", "r"), SHAPES)
def test_ldu_is_the_leading_part_of_the_whole_factorisation(n, k, r):
    torch.manual_seed(0)
    weight = torch.randn(n, k, dtype=torch.float64)
    factors = ldu(weight, r)
    p, lower, upper = torch.linalg.lu(weight)
    torch.testing.assert_close(factors.lower, (p @ lower)[:, :r], rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.diagonal, upper.diagonal()[:r], rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.diagonal[:, None] * factors.upper, upper[:r], rtol=0, atol=1e-12)
    assert torch.equal(factors.upper[:, :r].diagonal(), torch.ones(r, dtype=torch.float64))
    assert factors.pivots.dtype == torch.int32
    if r == min(n, k):
        rebuilt = factors.lower @ factors.diagonal.diag() @ factors.upper
        torch.testing.assert_close(rebuilt, weight, rtol=0, atol=1e-12)


def test_the_residual_vanishes_on_the_leading_columns():
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, dtype=torch.float64)
    layer = lf.LowRankLinear.from_linear(linear, method="loldu", rank=8, form="residual")
    assert layer.weight[:, :8].abs().max() < 1e-14
    full = lf.LowRankLinear.from_linear(linear, method="loldu", rank=24, form="residual")
    assert full.weight.abs().max() < 1e-13
    other = lf.LowRankLinear.from_linear(linear, method="loldu", rank=8, form="residual", init_method="ones")
    assert other.weight[:, :8].abs().max() > 1e-2


@pytest.mark.parametrize("init_method", DIAGONALS)
@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("train_sigma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_eight_starts_are_the_base_layer(init_method, form, train_sigma, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, dtype=dtype)
    options = {"form": form, "init_method": init_method, "train_sigma": train_sigma}
    layer = lf.LowRankLinear.from_linear(linear, method="loldu", rank=8, alpha=12, **options)
    x = torch.randn(9, 40, dtype=dtype)
    if form == "delta":
        assert layer.weight is linear.weight
        assert torch.equal(layer(x), linear(x))
        same = lf.LowRankLinear.from_linear(linear, method="loldu", rank=8, alpha=5, **options, **IN_WS_DTYPE)
        assert same.loldu_z.dtype == dtype and torch.equal(same(x), linear(x))
    else:
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        # The residual cancels the low-rank part: its rounding is relative to the larger of the two.
        size = max(layer.weight.abs().max().item(), linear.weight.abs().max().item(), 1.0)
        assert relative(layer(x) - exact, exact) < 40 * size * torch.finfo(dtype).eps


def test_the_starts_of_the_diagonal_are_the_published_ones():
    torch.manual_seed(0)
    pivot = torch.randn(4096) * 0.3 - 0.8
    z = {name: diagonal(pivot, name) for name in DIAGONALS}
    mean, std = pivot.mean(), pivot.std()
    assert torch.equal(z["lu"], pivot) and z["lu"] is not pivot
    assert torch.equal(z["constant"], mean.expand(4096))
    assert torch.equal(z["ones"], torch.ones(4096)) and torch.equal(z["zeros"], torch.zeros(4096))
    half = mean.abs() / 2
    assert z["uniform"].abs().max() <= half and z["uniform"].max() > 0.95 * half > -0.95 * half > z["uniform"].min()
    assert z["s_uniform"].abs().max() <= 1 and z["s_uniform"].max() > 0.95 > -0.95 > z["s_uniform"].min()
    for name, expected, spread in (("normal", mean, std), ("s_normal", 0.0, 1.0)):
        assert abs(z[name].mean() - expected) < 5 * spread / 64 and abs(z[name].std() / spread - 1) < 0.06
    assert torch.isfinite(diagonal(torch.tensor([2.0]), "normal")).all()
    with pytest.raises(ValueError, match="init_method must be one of lu, uniform"):
        diagonal(pivot, "svd")


def test_the_gradients_of_z_and_sigma_are_those_of_the_paper():
    torch.manual_seed(0)
    linear = nn.Linear(13, 11, dtype=torch.float64)
    layer = lf.LowRankLinear.from_linear(linear, method="loldu", rank=5, alpha=15, train_sigma=True)
    x, dy = torch.randn(7, 13, dtype=torch.float64), torch.randn(7, 11, dtype=torch.float64)
    layer(x).backward(dy)
    inner = torch.diagonal(layer.loldu_L.T @ (dy.T @ x) @ layer.loldu_U.T)
    torch.testing.assert_close(layer.loldu_z.grad, 3.0 * inner)
    torch.testing.assert_close(layer.loldu_sigma.grad, (layer.loldu_z * inner).sum()[None])


def test_delta_and_residual_form_are_the_same_model():
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, dtype=torch.float64)
    options = {"method": "loldu", "rank": 8, "alpha": 12}
    layers = [lf.LowRankLinear.from_linear(linear, **options, form=form) for form in ("delta", "residual")]
    x = torch.randn(9, 40, dtype=torch.float64)
    for _ in range(3):
        outputs = [layer(x) for layer in layers]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-11)
        for layer, y in zip(layers, outputs, strict=True):
            y.square().sum().backward()
            with torch.no_grad():
                layer.loldu_z -= 1e-3 * layer.loldu_z.grad
            layer.loldu_z.grad = None


def test_the_delta_form_is_the_residual_form_in_float64():
    """For one z that has moved: the same y and the same gradient of z."""
    torch.manual_seed(0)
    linear, x, moved = nn.Linear(24, 24).double(), torch.randn(9, 24).double(), torch.randn(8).double()
    found = []
    for form in ("delta", "residual"):
        layer = lf.LowRankLinear.from_linear(copy.deepcopy(linear), method="loldu", rank=8, form=form)
        with torch.no_grad():
            layer.loldu_z.add_(moved)
        y = layer(x)
        found.append((y, torch.autograd.grad(y.square().sum(), layer.loldu_z)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    assert (found[0][0] - linear(x)).abs().max() > 0.1


def test_the_delta_form_loses_nothing_in_bfloat16():
    """After a small step of z the delta form is as exact as bf16 is, the residual form is not."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256) / 16
    x, step = torch.randn(64, 256).bfloat16(), 0.01 * torch.randn(64)
    errors = {}
    for form in ("delta", "residual"):
        linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight)
        layer = lf.LowRankLinear.from_linear(linear, method="loldu", rank=64, form=form)
        with torch.no_grad():
            layer.loldu_z += step
        factors = ldu(linear.weight, 64)
        change = factors.lower.double() @ step.double().diag() @ factors.upper.double()
        exact = F.linear(x.double(), linear.weight.double() + change)
        errors[form] = relative(layer(x).double() - exact, exact)
        rounded = F.linear(x, (linear.weight.double() + change).bfloat16())
        errors["torch"] = relative(rounded.double() - exact, exact)
    assert errors["delta"] < 2 * errors["torch"]
    assert errors["delta"] < 0.5 * errors["residual"]


def test_ldu_in_bfloat16_is_computed_in_float32():
    torch.manual_seed(0)
    weight = (torch.randn(64, 64) / 8).bfloat16()
    factors = ldu(weight, 64)
    assert factors.lower.dtype == factors.upper.dtype == torch.float32
    assert relative(factors.lower @ factors.diagonal.diag() @ factors.upper - weight, weight) < 1e-4


def test_tied_pivots_still_rebuild_the_weight():
    torch.manual_seed(0)
    weight = torch.randint(-2, 3, (32, 24)).double() + torch.eye(32, 24, dtype=torch.float64) / 8
    weight[5, 0] = weight[9, 0] = weight[20, 0] = -7.0
    factors = ldu(weight, 24)
    assert factors.pivots[0] - 1 in (5, 9, 20)
    rebuilt = factors.lower @ factors.diagonal.diag() @ factors.upper
    torch.testing.assert_close(rebuilt, weight, rtol=0, atol=1e-11)
    assert factors.lower.abs().max() <= 1.0


@pytest.mark.parametrize(
    ("weight", "first"),
    [
        (torch.zeros(6, 6), 0),
        (torch.ones(6, 6), 1),
        (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) @ torch.ones(3, 8).tril(), 3),
    ],
    ids=["zero", "rank one", "rank three"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_singular_weight_names_the_pivot_and_the_way_out(weight, first, dtype):
    with pytest.raises(lf.SingularPivotError, match=rf"pivot {first} of the leading 6 .*at most {first}.*exclude"):
        ldu(weight.to(dtype), 6)
    if first:
        assert torch.isfinite(ldu(weight.to(dtype), first).upper).all()


def test_a_pivot_too_small_for_the_dtype_is_refused():
    weight = torch.eye(4)
    weight[0, 0], weight[0, 3], weight[1:, 0] = 1e-6, 1.0, 0.0
    assert torch.isfinite(ldu(weight, 4).upper).all()
    half = weight.half()
    with pytest.raises(lf.SingularPivotError, match="pivot 0"):
        ldu(half, 4)


def test_inject_says_which_layer_is_singular_and_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    nn.init.ones_(model[1].weight)
    before = list(model)
    with pytest.raises(lf.SingularPivotError, match="1: pivot 1 of the leading 4"):
        lf.inject(model, method="loldu", rank=4)
    assert list(model) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "r"), SHAPES)
def test_ldu_on_a_gpu_is_that_of_the_cpu(n, k, r):
    torch.manual_seed(0)
    weight = torch.randn(n, k, dtype=torch.float64)
    for ours, right in zip(ldu(weight.cuda(), r), ldu(weight, r), strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), right, rtol=0, atol=1e-10)
