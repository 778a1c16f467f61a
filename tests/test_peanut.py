"""NEAT: its two orientations and its depth, what is computed when, and that nothing of W's size is ever formed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lowrank_fused as lf
from lowrank_fused.factors import activations
from lowrank_fused.layers import LowRankLinear
from lowrank_fused.tools.flops import FORMULAS
from lowrank_fused.tools.model_shapes import build

M, N, K, R = 5, 12, 20, 4
ORIENTATIONS = pytest.mark.parametrize("orientation", ["T", "N"])


def make_layer(linear: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options) -> LowRankLinear:
    """A layer whose B has moved away from zero."""
    torch.manual_seed(0)
    linear = linear or nn.Linear(K, N, dtype=dtype)
    layer = LowRankLinear.from_linear(linear, method="peanut", **{"rank": R, **options})
    with torch.no_grad():
        layer.peanut_B.normal_(std=0.3)
    return layer


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))


def conv1d() -> nn.Module:
    torch.manual_seed(0)
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)


class Calls(TorchDispatchMode):
    """Operators by name, and the largest result of any."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        results = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        views = func.overloadpacket.__name__ in ("t", "detach", "alias", "view", "transpose")
        self.largest = max([self.largest, *(t.numel() for t in results)]) if not views else self.largest
        return out


def test_depth_is_the_published_network_of_six_layers():
    """Two pairs: six matrices, each decoder adding what came into the encoder that mirrors it."""
    layer = make_layer(depth=2, act_fn="gelu", scaling=0.7)
    w, x = layer.weight, torch.randn(M, K, dtype=torch.float64)
    e0, e1, d0, d1 = (
        getattr(layer, f"peanut_{name}").T for name in ("encoders_0", "encoders_1", "decoders_0", "decoders_1")
    )
    h0 = F.gelu(w.T @ layer.peanut_A.T)
    h1 = F.gelu(h0 @ e0)
    h2 = F.gelu(h1 @ e1)
    up = F.gelu(h2 @ d0) + h1
    up = F.gelu(up @ d1) + h0
    delta = (up @ layer.peanut_B.T).T
    expected = x @ (w + 0.7 * delta).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@ORIENTATIONS
def test_without_activation_it_is_a_product_with_the_weight(orientation):
    layer = make_layer(orientation=orientation, act_fn="linear", alpha=6)
    w, a, b = layer.weight, layer.peanut_A, layer.peanut_B
    delta = b @ a @ w if orientation == "T" else w @ a.T @ b
    x = torch.randn(M, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (w + 1.5 * delta).T + layer.bias, rtol=1e-12, atol=1e-12)


@ORIENTATIONS
def test_at_the_start_only_b_has_a_gradient(orientation):
    layer = LowRankLinear.from_linear(nn.Linear(K, N), method="peanut", rank=R, depth=1, orientation=orientation)
    layer(torch.randn(M, K)).square().sum().backward()
    for name in layer.trained_names:
        grad = getattr(layer, name).grad
        assert (grad.abs().max() > 0) == (name == "peanut_B"), name


@ORIENTATIONS
@pytest.mark.parametrize("depth", [0, 2])
def test_nothing_of_the_size_of_the_weight_is_formed(orientation, depth):
    """Forward and backward of a layer in which [out, in] is larger than everything else."""
    layer = make_layer(nn.Linear(96, 64), orientation=orientation, depth=depth)
    x = torch.randn(M, 96, requires_grad=True)
    with Calls() as calls:
        layer(x).square().sum().backward()
    assert calls.names.count("weight_factor") == calls.names.count("weight_factor_grad") == 1
    assert calls.largest <= max(M, R) * 96 < 64 * 96


def test_generated_once_per_step_and_pulled_back_once():
    model = lf.inject(nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, K)), method="peanut", rank=R)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batches = torch.randn(3, M, K)
    for step in range(1, 4):
        with Calls() as calls, lf.hold_gradients(model):
            for batch in batches:
                for use_reentrant in (False, True):
                    leaf = batch.clone().requires_grad_()
                    checkpoint(model, leaf, use_reentrant=use_reentrant).square().sum().backward()
        assert calls.names.count("weight_factor") == calls.names.count("weight_factor_grad") == 2
        assert [layer.caches()[0].evaluations for layer in (model[0], model[2])] == [step, step]
        optimizer.step()
        optimizer.zero_grad()
    with Calls() as calls:
        model(batches[0]).sum().backward()
        model(batches[1]).sum().backward()
    assert calls.names.count("weight_factor") == 2 and calls.names.count("weight_factor_grad") == 4


def test_products_of_a_step_are_counted():
    """A layer of 1024 x 1024 at rank 32 with 2048 tokens; the published order costs 2.03 and 3.05 frozen layers."""
    layer = make_layer(nn.Linear(1024, 1024), dtype=torch.float32, rank=32)
    x = torch.randn(2048, 1024, requires_grad=True)
    frozen = 2 * 2048 * 1024 * 1024
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as forward:
        y = layer(x)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as backward:
        y.backward(torch.ones_like(y))
    assert frozen < forward.get_total_flops() <= 1.10 * frozen
    assert frozen < backward.get_total_flops() <= 1.20 * frozen
    with FlopCounterMode(display=False) as materialised:
        layer.method.reference(x, layer.weight, layer.bias, layer)
    assert materialised.get_total_flops() >= 1.03 * frozen


def test_counts_of_the_authors_small_setting_and_of_depth():
    """RoBERTa-base "S": rank 1 on queries and values of the last eight layers."""
    small = r".*\.layer\.([4-9]|1[01])\.attention\.self\.(query|value)"
    model = lf.inject(build("roberta-base"), method="peanut", rank=1, target_modules=small)
    assert lf.trainable_parameters(model).trainable == 24_576
    for depth, more in ((1, 2), (3, 6)):
        layer = LowRankLinear.from_linear(nn.Linear(K, N), method="peanut", rank=R, depth=depth)
        assert sum(getattr(layer, name).numel() for name in layer.trained_names) == 2 * R * N + more * R * R


@ORIENTATIONS
@pytest.mark.parametrize("make", [lambda: nn.Linear(K, N).bfloat16(), conv1d], ids=["bf16", "conv1d"])
def test_merge_takes_the_weight_as_it_was_and_unmerge_restores_it(make, orientation):
    layer = make_layer(make(), orientation=orientation, depth=1)
    x = torch.randn(M, K, dtype=layer.weight.dtype)
    before, weight = layer(x), layer.weight.clone()
    (h,) = (t.detach().double() for t in layer.generated)
    b = layer.peanut_B.detach().double()
    update = b @ h if orientation == "T" else h.t() @ b
    expected = (layer.matrix.detach().double() + update).to(weight.dtype)
    layer.merge()
    merged = layer.weight.clone()
    torch.testing.assert_close(layer.matrix.detach(), expected, rtol=torch.finfo(weight.dtype).eps, atol=1e-6)
    layer.merge()
    assert torch.equal(layer.weight, merged), "a second merge must change nothing"
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        one.unmerge()
        assert torch.equal(one.weight, weight) and torch.equal(one(x), before)
        one.enabled = False
        one.merge()
        assert torch.equal(one.weight, merged), "whether it is disabled is no matter to a merge"
        one.unmerge()
        one.enabled = True
        assert torch.equal(one(x), before)


def test_a_merged_layer_that_is_trained_on_merges_anew():
    layer = make_layer()
    original = layer.weight.clone()
    layer.merge()
    first = layer.weight.clone()
    layer.unmerge()
    with torch.no_grad():
        layer.peanut_A.add_(1.0)
    layer.merge()
    update = layer.peanut_B @ torch.relu(layer.peanut_A @ original)
    torch.testing.assert_close(layer.weight.detach(), (original + update).detach())
    assert not torch.equal(layer.weight, first)


@ORIENTATIONS
def test_dropout_is_the_ordinary_one_on_the_low_rank_input(orientation):
    layer = make_layer(dtype=torch.float32, orientation=orientation, dropout=0.5)
    x = torch.randn(M, K)
    torch.manual_seed(3)
    y = layer(x)
    terms = layer.method.terms(layer, layer.matrix, x)
    torch.manual_seed(3)
    same = lf.lowrank_linear(x, layer.matrix, terms.a, terms.b, scale=1.0, bias=layer.bias, dropout_p=0.5)
    assert torch.equal(y, same) and not torch.equal(y, layer.eval()(x))


def test_compiled_under_autocast_it_generates_in_full_precision():
    layer = make_layer(dtype=torch.float32, depth=1, act_fn="gelu")
    x = torch.randn(M, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("act_fn", ["relu", "gelu", "swish"])
def test_adapters_of_peft_load_and_ours_load_in_peft(tmp_path, depth, act_fn):
    peft = pytest.importorskip("peft")
    config = peft.PeanutConfig(r=3, depth=depth, act_fn=act_fn, scaling=1.7, target_modules=["0", "2"])
    theirs = peft.get_peft_model(make_model(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "peanut" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lf.load_adapter(make_model(), tmp_path / "theirs")
    x = torch.randn(M, K)
    torch.testing.assert_close(ours(x), theirs(x))
    lf.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make_model(), tmp_path / "ours")
    torch.testing.assert_close(back(x), theirs(x))
    ours.zero_grad()
    for model in (ours, theirs):
        model(x).square().sum().backward()
    key = "peanut_encoders_1" if depth else "peanut_A"
    their_layer = theirs.base_model.model[2]
    their_grad = (their_layer.peanut_encoders.default[1] if depth else their_layer.peanut_A.default).weight.grad
    torch.testing.assert_close(getattr(ours[2], key).grad, their_grad)
    merged = theirs.merge_and_unload()
    lf.merge(ours)
    torch.testing.assert_close(ours[0].weight, merged[0].weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"act_fn": "sin"},
        {"orientation": "N"},
        {"alpha": 9},
        {"rank_pattern": {"2": 3}},
        {"bias": "all"},
    ],
    ids=str,
)
def test_what_peft_lacks_is_written_in_our_format_and_comes_back(tmp_path, settings):
    model = lf.inject(make_model(), method="peanut", **{"rank": R, **settings})
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.peanut_B.normal_()
            layer.bias.add_(float("bias" in settings))
    lf.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOWRANK_FUSED_PEANUT"
    x = torch.randn(M, K)
    again = lf.load_adapter(make_model(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert (again[0].scaling, again[2].rank) == (model[0].scaling, model[2].rank)


def test_what_peft_has_is_written_with_its_names_alone(tmp_path):
    peft = pytest.importorskip("peft")
    lf.save_adapter(lf.inject(make_model(), method="peanut", rank=R, scaling=0.5), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    known = peft.PeanutConfig().to_dict().keys()
    assert written["peft_type"] == "PEANUT" and written["scaling"] == 0.5
    assert written.keys() <= known


def test_an_activation_of_your_own(monkeypatch):
    monkeypatch.setattr(activations, "_ACTIVATIONS", dict(activations._ACTIVATIONS))
    activations.add_activation("cube", lambda z: z**3)
    layer, x = make_layer(act_fn="cube"), torch.randn(M, K, dtype=torch.float64)
    expected = layer.method.reference(x, layer.weight, layer.bias, layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orientation": "t"}, "orientation must be 'T' .* or 'N' .* got 't'"),
        ({"depth": -1}, "number of encoder and decoder pairs, 0 or more, got -1"),
        ({"depth": True}, "got True"),
        ({"act_fn": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, message):
    model = make_model()
    children = list(model)
    with pytest.raises(ValueError, match=message):
        lf.inject(model, method="peanut", rank=R, **options)
    assert all(child is original for child, original in zip(model, children, strict=True))
