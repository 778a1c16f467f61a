"""LowRankLinear: what it shares, how it behaves in and around a module tree, how it merges."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lowrank_fused as lf
from lowrank_fused import methods
from lowrank_fused.merging import merged_weight
from lowrank_fused.terms import Gate, Terms

M, N, K, R = 7, 11, 13, 4
EACH = [
    ("lora", {}),
    ("lora", {"init_lora_weights": "pissa"}),
    ("loldu", {}),
    ("loldu", {"form": "residual"}),
]
each_kind = pytest.mark.parametrize(("method", "options"), EACH, ids=["lora", "pissa", "loldu", "loldu-residual"])


def conv1d(k: int, n: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(n, k)


def moved(layer: lf.LowRankLinear) -> lf.LowRankLinear:
    with torch.no_grad():
        for name in layer.trained_names:
            getattr(layer, name).add_(0.3 * torch.randn_like(getattr(layer, name)))
    return layer


def make(method: str = "lora", *, dtype: torch.dtype = torch.float32, bias: bool = True, **options):
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    return linear, moved(lf.LowRankLinear.from_linear(linear, method=method, rank=R, **options))


def test_shares_the_linears_parameters_under_the_same_names():
    linear, layer = make()
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (K, N)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert layer.lora_A.shape == (R, K) and layer.lora_B.shape == (N, R)
    assert not layer.weight.requires_grad and not layer.bias.requires_grad and layer.lora_A.requires_grad
    assert layer.original_linear() is linear and linear.weight.requires_grad and linear.bias.requires_grad
    assert "rank=4" in repr(layer) and "method='lora'" in repr(layer)


@each_kind
def test_conv1d_is_the_linear_with_the_transposed_weight(method, options):
    torch.manual_seed(0)
    conv = conv1d(K, N)
    linear = nn.Linear(K, N)
    linear.load_state_dict({"weight": conv.weight.t().contiguous(), "bias": conv.bias})
    layers = [lf.LowRankLinear.from_linear(m, method=method, rank=R, **options) for m in (conv, linear)]
    assert layers[0].weight.shape == (K, N)
    if not layers[0].residual:
        assert layers[0].weight is conv.weight and layers[0].matrix.data_ptr() == conv.weight.data_ptr()
    moved(layers[0])
    for name in layers[0].trained_names:
        layers[1].get_parameter(name).data.copy_(layers[0].get_parameter(name))
    x = torch.randn(2, 3, K)
    torch.testing.assert_close(layers[0](x), layers[1](x))
    before = conv.weight.clone()
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(layers[0].weight, layers[1].weight.t())
    torch.testing.assert_close(layers[0](x), layers[1](x))
    assert layers[0].original_linear() is conv and torch.equal(conv.weight, before)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merging_rounds_once_and_unmerging_restores_every_bit(method, options, dtype):
    linear, layer = make(method, dtype=dtype, **options)
    weight = layer.weight.clone()
    empty = torch.empty(0, K, dtype=dtype)
    terms = layer.method.terms(layer, layer.weight, empty)
    core = torch.ones(R) if terms.core is None else terms.core
    exact = weight.double() + terms.scale * terms.b.double() @ core.double().diag() @ terms.a.double()
    layer.merge()
    assert layer.merged and layer.weight.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((layer.weight.double() - exact).abs() <= ulp).all()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and not layer.merged
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_merged_weight_is_the_formula_for_every_core():
    torch.manual_seed(0)
    g = {"dtype": torch.float64}
    weight, a, b, x = (
        torch.randn(N, K, **g),
        torch.randn(R, K, **g),
        torch.randn(N, R, **g),
        torch.randn(M, K, **g),
    )
    out, col = torch.randn(N, **g), torch.randn(N, **g)
    for core in (None, torch.randn(R, **g), torch.randn(R, R, **g)):
        whole = merged_weight(weight, Terms(a, b, 0.7, core, out, col))
        y = lf.lowrank_linear(x, weight, a, b, scale=0.7, core=core, out=out, col=col)
        torch.testing.assert_close(x @ whole.T, y, rtol=1e-12, atol=1e-12)
    with pytest.raises(lf.UnsupportedError, match="per-token gate"):
        merged_weight(weight, Terms(a, b, core=Gate(torch.randn(M, 1))))


def test_a_merge_that_overflows_changes_nothing():
    _, layer = make(dtype=torch.float16)
    layer.lora_B.data.fill_(3e4)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="merged weight would not be finite in torch.float16"):
        layer.merge()
    assert torch.equal(layer.weight, before) and not layer.merged


@each_kind
def test_disabled_it_is_the_original_layer(method, options):
    linear, layer = make(method, **options)
    x = torch.randn(M, K)
    layer.enabled = False
    if layer.residual:
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(layer(x), linear(x))
    layer.enabled = True
    assert (layer(x) - linear(x)).abs().max() > 0.01


@each_kind
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_stand_alone(method, options, way):
    _, layer = make(method, dropout=0.5, **options)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(M, K)
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    before = layer(x)
    moved(twin)
    twin.merge()
    assert torch.equal(layer(x), before) and not torch.equal(twin(x), before)
    original = twin.original_linear()
    assert torch.equal(original.weight, layer.original_linear().weight)


@each_kind
def test_state_dict_round_trip(method, options):
    _, layer = make(method, **options)
    _, other = make(method, **options)
    moved(other)
    other.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(M, K)
    assert torch.equal(other(x), layer(x))


def test_dropout_acts_in_training_only_and_on_the_low_rank_path_only():
    linear, layer = make("lora", dropout=0.5)
    x = torch.randn(64, K)
    assert layer.training and not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    layer.lora_B.data.zero_()
    torch.testing.assert_close(layer(x), linear(x))
    moved(layer).eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "loldu"])
def test_trained_tensors_are_float32_beside_a_16_bit_weight(method, dtype):
    _, layer = make(method, dtype=dtype)
    assert all(getattr(layer, name).dtype == torch.float32 for name in layer.trained_names)
    x = torch.randn(M, K, dtype=dtype)
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert all(getattr(layer, name).grad.dtype == torch.float32 for name in layer.trained_names)
    _, same = make(method, dtype=dtype, autocast_adapter_dtype=False)
    assert all(getattr(same, name).dtype == dtype for name in same.trained_names)
    assert same(x).dtype == dtype


def test_hooks_of_the_linear_keep_firing_and_can_be_removed():
    torch.manual_seed(0)
    linear, seen = nn.Linear(K, N), []
    handles = [
        linear.register_forward_hook(lambda module, args, y: seen.append("after")),
        linear.register_forward_pre_hook(lambda module, args: seen.append("before")),
        linear.register_full_backward_hook(lambda module, gx, gy: seen.append("backward")),
    ]
    layer = lf.LowRankLinear.from_linear(linear, rank=R)
    layer(torch.randn(M, K, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    layer(torch.randn(M, K))
    assert len(seen) == 3


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_is_open_to_those_that_ask_every_attribute(method):
    """As torch.jit does: of a property that has no value here, too."""
    _, layer = make(method)
    assert all(hasattr(layer, name) or name == "generated" for name in dir(layer))
    assert hasattr(layer, "generated") == (method == "dora")
    x = torch.randn(M, K)
    assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x), layer(x))


def test_moves_and_casts_with_the_model():
    model = nn.Sequential(make("loldu")[1], make("lora", init_lora_weights="olora")[1]).to(torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    model[0](torch.randn(M, K, dtype=torch.bfloat16))
    restored = model[1].original_linear()
    assert restored.weight.dtype == torch.bfloat16


def test_what_ddp_would_send_around_in_every_step_is_small():
    _, layer = make("loldu")
    assert all(buffer.numel() <= R for buffer in layer.buffers())


def quantised() -> nn.Module:
    class Linear4bit(nn.Linear):
        pass

    return Linear4bit(K, N)


def hooked() -> nn.Module:
    linear = nn.Linear(K, N)
    linear.forward = linear.forward
    return linear


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(3, 3, 1), "neither an nn.Linear nor a transformers Conv1D"),
        (nn.Embedding(4, 4), "neither an nn.Linear nor a transformers Conv1D"),
        (nn.Bilinear(3, 3, 3), "neither"),
        (nn.LazyLinear(3), "neither|subclass"),
        (quantised(), "Linear4bit is a subclass of nn.Linear"),
        (parametrizations.weight_norm(nn.Linear(K, N)), "parametrised"),
        (hooked(), "its forward was replaced"),
        (nn.utils.spectral_norm(nn.Linear(K, N)), "its weight is a Tensor, not a plain Parameter"),
        (nn.Linear(K, N).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (make()[1], "LowRankLinear is neither"),
    ],
)
def test_what_cannot_carry_an_adapter_says_why(module, reason):
    flags = [p.requires_grad for p in module.parameters()]
    with pytest.raises(lf.UnsupportedError, match=reason):
        lf.LowRankLinear.from_linear(module, rank=2)
    assert [p.requires_grad for p in module.parameters()] == flags


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be a positive integer, got 0"),
        ({"rank": 2.0}, ValueError, "rank must be a positive integer, got 2.0"),
        ({"rank": True}, ValueError, "rank must be a positive integer"),
        ({"alpha": -1}, ValueError, "alpha must be a positive number"),
        ({"alpha": float("inf")}, ValueError, "alpha must be a positive number"),
        ({"dropout": 1.0}, ValueError, "lora_dropout must be at least 0 and below 1"),
        ({"dropout": -0.1}, ValueError, "lora_dropout must be at least 0"),
        ({"rnk": 4}, TypeError, "no field 'rnk'; did you mean 'rank'"),
        ({"method": "lorra"}, ValueError, "did you mean 'lora'"),
        ({"method": "loldu", "form": "deltas"}, ValueError, "form must be 'delta' or 'residual'"),
        ({"rank": 4, "r": 8}, TypeError, "got r and its alias rank"),
    ],
)
def test_bad_values_are_named_and_the_linear_stays_as_it_was(settings, error, message):
    linear = nn.Linear(K, N)
    with pytest.raises(error, match=message):
        lf.LowRankLinear.from_linear(linear, **settings)
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_a_config_and_its_fields_do_not_mix():
    with pytest.raises(TypeError, match="got both: rank"):
        lf.LowRankLinear.from_linear(nn.Linear(K, N), lf.AdapterConfig(), rank=4)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale_is_alpha_over_rank_or_its_root(rslora, scale):
    layer = lf.LowRankLinear.from_linear(nn.Linear(K, N), rank=4, alpha=8, use_rslora=rslora)
    assert layer.scaling == scale
    assert lf.LowRankLinear.from_linear(nn.Linear(K, N)).scaling == 1.0
    assert lf.LowRankLinear.from_linear(nn.Linear(K, N), method="loldu", rank=3).loldu_sigma == 1.0


def test_a_name_that_the_layer_uses_is_refused():
    @methods.method
    class Clashing:
        name, formula = "clashing", "y = x Wᵀ"
        terms = reference = staticmethod(F.linear)

        @staticmethod
        def init(weight, rank=2, alpha=2.0):
            return methods.Start({"bias": weight.new_zeros(rank)})

    try:
        linear = nn.Linear(K, N)
        with pytest.raises(ValueError, match="calls something 'bias'"):
            lf.LowRankLinear.from_linear(linear, method="clashing")
        assert linear.weight.requires_grad
    finally:
        del methods._METHODS._things["clashing"]
