"""What every method of the registry must hold. Nothing here is edited for a new method."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf
from lowrank_fused import methods
from lowrank_fused.methods import Site, Start
from lowrank_fused.model_shapes import build, target_modules
from lowrank_fused.terms import Gate, Terms

M, N, K, R = 7, 11, 13, 4


def variants() -> list:
    """Each method as it comes, and with each of its yes-or-no options turned."""
    found = []
    for name in methods.registry():
        found.append(pytest.param(name, {}, id=name))
        for option, default in methods.options(name).items():
            if isinstance(default, bool):
                found.append(pytest.param(name, {option: not default}, id=f"{name}-{option}={not default}"))
    return found


each_method = pytest.mark.parametrize("name", methods.registry())
each_variant = pytest.mark.parametrize(("name", "options"), variants())


def make_layer(name: str, dtype: torch.dtype = torch.float64, moved: bool = True, **options) -> lf.LowRankLinear:
    """A layer over a random linear, with its trained values moved away from the start."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    layer = lf.LowRankLinear.from_linear(linear, method=name, rank=R, alpha=6, **options)
    if moved:
        with torch.no_grad():
            for tensor in layer.trained_names:
                getattr(layer, tensor).add_(0.3 * torch.randn_like(getattr(layer, tensor)))
    return layer


def trained(layer: lf.LowRankLinear) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in layer.trained_names}


@each_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_base_layer(name, dtype):
    reason = getattr(methods.get(name), "differs_at_start", None)
    if reason:
        pytest.skip(f"by design: {reason}")
    layer = make_layer(name, dtype, moved=False)
    x = torch.randn(M, K, dtype=dtype)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


@each_variant
def test_equals_its_reference_with_all_gradients(name, options):
    layer = make_layer(name, **options)
    layer.bias.requires_grad_()
    x, dy = (
        torch.randn(2, M, K, dtype=torch.float64, requires_grad=True),
        torch.randn(2, M, N, dtype=torch.float64),
    )
    leaves = {"x": x, "bias": layer.bias, **trained(layer)}
    ours = layer(x)
    expected = methods.get(name).reference(x, layer.matrix, layer.bias, layer)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(ours, list(leaves.values()), dy)
    for leaf, grad, right in zip(leaves, grads, torch.autograd.grad(expected, list(leaves.values()), dy), strict=True):
        assert right.abs().max() > 0, f"{leaf} has no gradient: this proves nothing"
        torch.testing.assert_close(grad, right, rtol=1e-11, atol=1e-11, msg=lambda text, leaf=leaf: f"d{leaf}: {text}")


@each_variant
def test_merged_weight_reproduces_the_forward(name, options):
    layer = make_layer(name, **options)
    terms = layer.method.terms(layer, layer.matrix, torch.zeros(0, K, dtype=torch.float64))
    if isinstance(terms.core, lf.Gate):
        pytest.skip("weighted by the input, there is no merged weight")
    x = torch.randn(M, K, dtype=torch.float64)
    before, weight = layer(x), layer.weight.clone()
    layer.merge()
    assert not torch.equal(layer.weight, weight)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


@each_variant
def test_remove_restores_the_model_bit_for_bit(name, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K, bias=False))
    model[2].weight.requires_grad_(False)
    children, grads = list(model), [p.requires_grad for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lf.inject(model, method=name, rank=R, **options)
    x = torch.randn(M, K)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    lf.remove(model)
    assert all(child is original for child, original in zip(model, children, strict=True))
    assert [p.requires_grad for p in model.parameters()] == grads
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@each_variant
def test_only_what_is_trained_gets_a_gradient(name, options):
    layer = make_layer(name, **options)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(layer.trained_names)
    layer(torch.randn(M, K, dtype=torch.float64)).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert all(getattr(layer, frozen).grad is None for frozen in layer.frozen_names)
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in trained(layer).values())


@each_method
def test_keeps_the_input_only_if_a_is_trained(name):
    layer = make_layer(name, torch.float32)
    x = torch.randn(1024, K, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    of_tokens = sum(t.numel() for t in saved if t.shape[:1] == (1024,))
    keeps_x = layer.method.terms(layer, layer.matrix, x).a.requires_grad
    assert of_tokens == (1024 * (K + R) if keeps_x else 1024 * R)


@each_variant
def test_saved_and_loaded_it_computes_the_same(name, options, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    twin = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    twin.load_state_dict(model.state_dict())
    lf.inject(model, method=name, rank=R, alpha=3, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    lf.save_adapter(model, tmp_path)
    random_state = torch.get_rng_state()
    lf.load_adapter(twin, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    x = torch.randn(M, K)
    assert torch.equal(model(x), twin(x))
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


@each_method
def test_agrees_with_peft_where_peft_has_the_method(name, tmp_path):
    peft = pytest.importorskip("peft")
    if name.upper() not in peft.PeftType.__members__:
        pytest.skip(f"PEFT has no {name}")
    torch.manual_seed(0)
    model, twin = nn.Sequential(nn.Linear(K, N)), nn.Sequential(nn.Linear(K, N))
    twin.load_state_dict(model.state_dict())
    lf.inject(model, method=name, rank=R, alpha=3, target_modules=["0"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    lf.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    x = torch.randn(M, K)
    torch.testing.assert_close(model(x), theirs(x))
    for network in (model, theirs):
        network(x).square().sum().backward()
    grads = [sorted(p.grad.norm() for p in m.parameters() if p.requires_grad) for m in (model, theirs)]
    assert len(grads[0]) > 0
    torch.testing.assert_close(torch.stack(grads[0]), torch.stack(grads[1]))


@each_method
def test_the_documentation_names_formula_and_paper(name):
    method = methods.get(name)
    assert method.formula.startswith("y = ")
    assert "arXiv" in sys.modules[method.__module__].__doc__.splitlines()[0]


@each_method
def test_the_reference_is_a_witness_of_its_own(name):
    source = inspect.getsource(methods.get(name).reference)
    assert "Terms" not in source and ".terms(" not in source and "lowrank_linear" not in source


@each_method
def test_unknown_options_name_the_nearest(name):
    with pytest.raises(TypeError, match="has no field 'targt_modules'; did you mean 'target_modules'"):
        lf.AdapterConfig(name, targt_modules=["q_proj"])


# Rows of the parameter table: model, targets, method, rank, options -> trained elements.
COUNTS = [
    *[("roberta-base", "qv", "lora", r, {}, n) for r, n in ((4, 147_456), (8, 294_912), (32, 1_179_648))],
    ("roberta-base", "qv", "lora", 64, {}, 2_359_296),
    ("roberta-base", "qv", "loldu", 768, {}, 18_432),
    ("roberta-base", "qv", "loldu", 768, {"train_sigma": True}, 18_456),
    ("vit-b", "qv", "lora", 4, {}, 147_456),
    ("vit-b", "qv", "loldu", 64, {}, 1_536),
    ("roberta-large", "qv", "lora", 8, {}, 786_432),
    ("roberta-large", "qv", "loldu", 256, {}, 12_288),
    ("vit-l", "qv", "lora", 64, {}, 6_291_456),
    ("llama2-7b", "qv", "lora", 4, {}, 2_097_152),
    ("llama2-7b", "qv", "loldu", 256, {}, 16_384),
    ("llama2-7b", "qv", "loldu", 1024, {}, 65_536),
    ("llama2-7b", "q_proj,k_proj,v_proj,up_proj,down_proj", "lora", 32, {}, 56_098_816),
    ("llama2-7b", "q_proj,k_proj,v_proj,up_proj,down_proj", "loldu", 256, {}, 40_960),
    ("llama2-7b", "all", "lora", 4, {}, 9_994_240),
    ("llama2-7b", "all", "loldu", 256, {}, 57_344),
    ("llama2-13b", "all", "lora", 4, {}, 15_646_720),
    ("llama2-13b", "all", "lora", 64, {}, 250_347_520),
    ("llama2-13b", "all", "loldu", 256, {}, 71_680),
    ("llama-3.1-8b", "all", "lora", 8, {}, 20_971_520),
    ("llama-3.1-8b", "all", "loldu", 256, {}, 57_344),
    ("llama-3-8b", "q_proj,k_proj,v_proj,up_proj,down_proj", "lora", 32, {}, 56_623_104),
    ("llama-3.2-3b", "qv", "lora", 32, {}, 9_175_040),
    ("llama-3.2-3b", "qv", "loldu", 256, {}, 14_336),
    ("gemma-7b", "all", "lora", 64, {}, 200_015_872),
    ("gemma-7b", "all", "loldu", 256, {}, 50_176),
]


@pytest.mark.parametrize(("model", "targets", "name", "rank", "options", "expected"), COUNTS)
def test_parameter_counts_of_real_models(model, targets, name, rank, options, expected):
    network = build(model)
    lf.inject(network, method=name, rank=rank, target_modules=target_modules(network, targets), **options)
    report = lf.trainable_parameters(network)
    assert report.trainable == expected
    assert report.trainable == sum(p.numel() for p in network.parameters() if p.requires_grad)


# Toy methods of the kinds that are still to come: the contract has to carry them too.


class Shared:
    """One vector for all layers, gathered into A and B (Uni-LoRA's kind)."""

    name, formula = "toy_shared", "y = x Wᵀ + x A(θ)ᵀ B(θ)ᵀ"

    @staticmethod
    def init(weight: Tensor, site: Site, rank: int = 2, alpha: float = 2.0, *, length: int = 50) -> Start:
        total = sum(rank * (n + k) for n, k in site.shapes)
        if "theta" not in site.shared:
            site.shared["theta"] = nn.Parameter(0.1 * torch.randn(length, device=weight.device))
        offset = sum(rank * (n + k) for n, k in site.shapes[: site.index])
        places = torch.arange(total, device=weight.device) % length
        n, k = weight.shape
        a, b = places[offset : offset + rank * k], places[offset + rank * k : offset + rank * (n + k)]
        frozen = {"toy_ia": a.reshape(rank, k), "toy_ib": b.reshape(n, rank)}
        return Start({"toy_theta": site.shared["theta"]}, frozen)

    @staticmethod
    def terms(p, weight, x):
        return Terms(p.toy_theta[p.toy_ia], p.toy_theta[p.toy_ib])

    @staticmethod
    def reference(x, weight, bias, p):
        return F.linear(x, weight + p.toy_theta[p.toy_ib] @ p.toy_theta[p.toy_ia], bias)


class Gated:
    """Experts weighted per token by a router on x (HydraLoRA's kind)."""

    name, formula = "toy_gate", "y = x Wᵀ + Σ_e softmax(x Gᵀ)_e x Aᵀ B_eᵀ"

    @staticmethod
    def init(weight: Tensor, rank: int = 2, alpha: float = 2.0, *, experts: int = 3) -> Start:
        n, k = weight.shape
        draw = {"toy_a": (rank, k), "toy_b": (n, experts * rank), "toy_router": (experts, k)}
        return Start({key: 0.1 * torch.randn(shape, device=weight.device) for key, shape in draw.items()})

    @staticmethod
    def terms(p, weight, x):
        return Terms(p.toy_a, p.toy_b, core=Gate(F.linear(x, p.toy_router.to(x.dtype)).softmax(-1)))

    @staticmethod
    def reference(x, weight, bias, p):
        gates, rank = F.linear(x, p.toy_router).softmax(-1), p.toy_a.shape[0]
        experts = [x @ p.toy_a.T @ p.toy_b[:, e * rank : (e + 1) * rank].T for e in range(len(p.toy_router))]
        return F.linear(x, weight, bias) + sum(gates[..., e, None] * y for e, y in enumerate(experts))


class Rescaled:
    """A trained length for each row of the adapted weight (DoRA's kind): terms reads W."""

    name, formula = "toy_rows", "y = x (m ∘ V / ‖V‖)ᵀ, V = W + B A"

    @staticmethod
    def init(weight: Tensor, rank: int = 2, alpha: float = 2.0) -> Start:
        n, k = weight.shape
        a, b = torch.randn(rank, k, device=weight.device), torch.zeros(n, rank, device=weight.device)
        return Start({"toy_a": a, "toy_b": b, "toy_rows": weight.norm(dim=1)})

    @staticmethod
    def terms(p, weight, x):
        norm = torch.addmm(weight, p.toy_b, p.toy_a).norm(dim=1)
        return Terms(p.toy_a, p.toy_b, col=p.toy_rows / norm)

    @staticmethod
    def reference(x, weight, bias, p):
        v = weight + p.toy_b @ p.toy_a
        return F.linear(x, p.toy_rows[:, None] * v / v.norm(dim=1, keepdim=True), bias)


@pytest.fixture(params=[Shared, Gated, Rescaled], ids=lambda cls: cls.name)
def toy(request):
    methods.registry()
    methods.method(request.param)
    yield request.param
    del methods._METHODS._things[request.param.name]


def test_the_contract_carries_other_kinds_of_methods(toy):
    layer = make_layer(toy.name)
    layer.bias.requires_grad_()
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.bias, *trained(layer).values()]
    ours, expected = layer(x), toy.reference(x, layer.matrix, layer.bias, layer)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for grad, right in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-10)
    if toy is Gated:
        with pytest.raises(lf.UnsupportedError, match="per-token gate"):
            layer.merge()
    else:
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("toy", [Shared], indirect=True, ids=["toy_shared"])
def test_a_tensor_that_layers_share_is_one_parameter(toy, tmp_path):
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    twin = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    twin.load_state_dict(model.state_dict())
    lf.inject(model, method="toy_shared", rank=2)
    assert model[0].toy_theta is model[1].toy_theta
    assert lf.trainable_parameters(model).trainable == 50
    x = torch.randn(M, K)
    model(x).sum().backward()
    theta = model[0].toy_theta
    whole, parts = theta.grad, []
    for frozen in (0, 1):
        p = [SimpleNamespace(toy_theta=theta.detach(), toy_ia=m.toy_ia, toy_ib=m.toy_ib) for m in model]
        p[1 - frozen].toy_theta = theta
        y = x
        for layer, values in zip(model, p, strict=True):
            y = toy.reference(y, layer.weight, layer.bias, values)
        parts.append(torch.autograd.grad(y.sum(), theta)[0])
    torch.testing.assert_close(whole, parts[0] + parts[1])
    lf.save_adapter(model, tmp_path)
    lf.load_adapter(twin, tmp_path)
    assert twin[0].toy_theta is twin[1].toy_theta
    assert torch.equal(twin(x), model(x))


def test_a_second_definition_of_a_name_raises():
    class Again(methods.get("lora")):
        pass

    with pytest.raises(ValueError, match="method 'lora' is defined twice"):
        methods.method(Again)


def test_an_incomplete_method_is_refused():
    class Half:
        name, formula = "half", "y = x Wᵀ"

    with pytest.raises(TypeError, match="lacks init, terms, reference"):
        methods.method(Half)
    assert "half" not in methods.registry()


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'lorra'; did you mean 'lora'"):
        lf.AdapterConfig("lorra")
