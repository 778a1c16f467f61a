"""What every method of the registry must hold. Nothing here is edited for a new method."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank_fused as lf
from lowrank_fused import methods
from lowrank_fused.methods import Site, Start
from lowrank_fused.routes import ROUTES
from lowrank_fused.terms import Gate, Terms
from lowrank_fused.testing import assert_as_accurate_as_torch
from lowrank_fused.tools.footprint import kept_by_a_token, small_layer

M, N, K, R = 7, 12, 20, 4


# Toy methods, one of each unusual kind: to be in this list is all that a method needs to gain every test below.


class Shared:
    """One vector for all layers, gathered into A and B (Uni-LoRA's kind)."""

    name, formula = "toy_shared", "y = x Wᵀ + x A(θ)ᵀ B(θ)ᵀ"
    differs_at_start = "neither factor starts at zero"

    @staticmethod
    def init(weight: Tensor, site: Site, rank: int = 2, alpha: float | None = None, *, length: int = 50) -> Start:
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
    keeps = ("x", "s", "gate")
    differs_at_start = "its experts do not start at zero"

    @staticmethod
    def init(weight: Tensor, rank: int = 2, alpha: float | None = None, *, experts: int = 3) -> Start:
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
    keeps = ("x", "s", "y")

    @staticmethod
    def init(weight: Tensor, rank: int = 2, alpha: float | None = None) -> Start:
        n, k = weight.shape
        a, b = torch.randn(rank, k, device=weight.device), torch.zeros(n, rank, device=weight.device)
        return Start(
            {
                "toy_a": a,
                "toy_b": b,
                "toy_rows": weight.to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=1),
            }
        )

    @staticmethod
    def generate(p, weight):
        return (torch.addmm(weight.to(p.toy_b.dtype), p.toy_b, p.toy_a).norm(dim=1),)

    @staticmethod
    def terms(p, weight, x):
        return Terms(p.toy_a, p.toy_b, col=p.toy_rows / p.generated[0])

    @staticmethod
    def reference(x, weight, bias, p):
        v = weight + p.toy_b @ p.toy_a
        return F.linear(x, p.toy_rows[:, None] * v / v.norm(dim=1, keepdim=True), bias)


TOYS = {toy.name: toy for toy in (Shared, Gated, Rescaled)}


def variants() -> list:
    """Each method as it comes, with each of its yes-or-no options turned, and with the values it asks for."""
    found = []
    for name in methods.registry() | TOYS:
        method = TOYS.get(name) or methods.get(name)
        small = getattr(method, "small", {})
        options = {key: p.default for key, p in inspect.signature(method.init).parameters.items()}
        flips = [{key: not value} for key, value in options.items() if isinstance(value, bool)]
        for chosen in ({}, *flips, *getattr(method, "variants", ())):
            label = ",".join(f"{key}={value}" for key, value in chosen.items())
            found.append(pytest.param(name, {**small, **chosen}, id=f"{name}-{label}" if label else name))
    return found


each_method = pytest.mark.parametrize("name", [*methods.registry(), *TOYS])
each_variant = pytest.mark.parametrize(("name", "options"), variants())


@pytest.fixture(autouse=True)
def toys():
    """The toys are methods while a test of this file runs."""
    for toy in TOYS.values():
        methods.method(toy)
    yield
    for name in TOYS:
        del methods._METHODS._things[name]


def make_layer(name: str, dtype: torch.dtype = torch.float64, moved: bool = True, **options) -> lf.LowRankLinear:
    """A layer over a random linear, with its trained values moved away from the start.

    It trains where dropout is asked for, and evaluates otherwise: what a method draws at random in training must not
    tell two calls apart.
    """
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    settings = {**methods.small_options(name), "rank": R, "alpha": 6, **options}
    layer = lf.LowRankLinear.from_linear(linear, method=name, **settings)
    if moved:
        move(layer)
    return layer.train("dropout" in options)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))


@torch.no_grad()
def move(module: nn.Module, by: float = 0.3) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(by * torch.randn_like(parameter))


def trained(layer: lf.LowRankLinear) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in layer.trained_names}


def terms_of(layer: lf.LowRankLinear, x: Tensor) -> Terms:
    return layer.method.terms(layer, layer.matrix, x)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_base_layer(name, options, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    x = torch.randn(M, K, dtype=dtype)
    expected = linear(x)
    layer = lf.LowRankLinear.from_linear(linear, method=name, **{"rank": R, "alpha": 6, **options})
    if methods.differs_at_start(name, options):  # perhaps by less than the rounding of a narrow dtype
        same = torch.equal(layer(x), expected)
        assert not same or dtype != torch.float64, "it starts as the base layer after all: the text is wrong"
    elif layer.residual or terms_of(layer, x).col is not None:  # one more rounding
        removed = linear.weight.to(x.dtype) - layer.weight
        size = F.linear(x.abs(), layer.weight.abs() + removed.abs(), linear.bias.abs())
        assert ((layer(x) - expected).abs() <= 2 * torch.finfo(dtype).eps * size).all()
    else:
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


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


@pytest.mark.triton
@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_as_accurate_as_its_reference_on_every_route(name, dtype, route, device):
    layer = make_layer(name, dtype, autocast_adapter_dtype=False).to(device)
    x, dy = torch.randn(33, K).to(device, dtype), torch.randn(33, N).to(device, dtype)
    precise = copy.deepcopy(layer).double()

    def run(layer: lf.LowRankLinear, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_()
        y = forward(leaf)
        leaves = {"x": leaf, **trained(layer)}
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}

    def on_terms(linear: Callable[..., Tensor], **more) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            t = terms_of(layer, x)
            vectors = {"core": t.core, "out": t.out, "col": t.col, "bias": layer.bias}
            return linear(x, layer.matrix, t.a, t.b, scale=t.scale, **vectors, **more)

        return forward

    def magnitudes(x: Tensor) -> dict[str, Tensor]:
        """y and gradients with every sum free of cancellation: how large their intermediates get."""
        positive = copy.deepcopy(precise)
        for tensor in positive.adapter_tensors().values():
            tensor.data = tensor.data.abs()
        t = terms_of(positive, x)
        core = Gate(t.core.g.abs()) if isinstance(t.core, Gate) else None if t.core is None else t.core.abs()
        vectors = {"out": t.out, "col": t.col, "bias": precise.bias}
        sizes = {key: None if vector is None else vector.abs() for key, vector in vectors.items()}
        leaf = x.abs().requires_grad_()
        y = lf.lowrank_linear_ref(
            leaf, precise.matrix.abs(), t.a.abs(), t.b.abs(), scale=abs(t.scale), core=core, **sizes
        )
        leaves = {"x": leaf, **trained(positive)}
        grads = torch.autograd.grad(y, list(leaves.values()), dy.abs().to(y.dtype))
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}

    ours = run(layer, on_terms(lf.lowrank_linear, route=route), x)
    torchs = run(layer, on_terms(lf.lowrank_linear_ref), x)
    exact = run(precise, lambda x: layer.method.reference(x, precise.matrix, precise.bias, precise), x.double())
    sizes = magnitudes(x.double())
    for key, value in ours.items():
        assert_as_accurate_as_torch(value, torchs[key], exact[key], f"{route} {key}", sizes[key])


@each_variant
def test_merged_weight_reproduces_the_forward_or_is_refused(name, options):
    layer = make_layer(name, **options)
    x = torch.randn(M, K, dtype=torch.float64)
    before, weight = layer(x), layer.weight.clone()
    why_not = getattr(layer.method, "why_not_mergeable", lambda layer: None)(layer)
    if isinstance(terms_of(layer, x[:0]).core, Gate) or why_not:
        with pytest.raises(lf.UnsupportedError, match=re.escape(why_not or "per-token gate")):
            layer.merge()
        assert torch.equal(layer.weight, weight) and torch.equal(layer(x), before)
        return
    layer.merge()
    assert not torch.equal(layer.weight, weight)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


@each_variant
def test_remove_restores_the_model_bit_for_bit(name, options):
    model = make_model()
    model[2].weight.requires_grad_(False)
    children, grads = list(model), [p.requires_grad for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lf.inject(model, method=name, rank=R, **options)
    x = torch.randn(M, K)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
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
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_keeps_for_backward_what_it_declares(name, dropout):
    layer = small_layer(name, 64, 40, 8, dropout, torch.bfloat16)
    terms = terms_of(layer, torch.zeros(0, 64, dtype=torch.bfloat16))
    experts = terms.core.g.shape[-1] if isinstance(terms.core, Gate) else 0
    declared = methods.keeps(name)
    sizes = {"x": 2 * 64, "s": 2 * terms.a.shape[0], "gate": 2 * experts, "y": 2 * 40}
    mask = 64 / 8 if dropout else 0
    assert kept_by_a_token(layer) == sum(sizes[what] for what in declared) + mask
    assert ("gate" in declared) == bool(experts)
    assert ("x" in declared) == (terms.a.requires_grad or bool(experts))


@each_variant
def test_saved_and_loaded_it_computes_the_same(name, options, tmp_path):
    model, twin = make_model(), make_model()
    lf.inject(model, method=name, rank=R, alpha=3, **options)
    move(model, 0.1)
    lf.save_adapter(model, tmp_path)
    random_state = torch.get_rng_state()
    lf.load_adapter(twin, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    x = torch.randn(M, K)
    model.eval(), twin.eval()
    assert torch.equal(model(x), twin(x))
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


@each_variant
def test_agrees_with_peft_where_peft_has_the_method(name, options, tmp_path):
    peft = pytest.importorskip("peft")
    known = methods.peft_format(name, options)
    if known is None:
        pytest.skip("PEFT does not have it")
    model = lf.inject(make_model(), method=name, rank=R, target_modules=["0", "2"], **options)
    move(model, 0.1)
    lf.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path / "ours", is_trainable=True)
    x = torch.randn(M, K)
    torch.testing.assert_close(model(x), theirs(x))
    theirs.save_pretrained(tmp_path / "theirs")
    again = lf.load_adapter(make_model(), tmp_path / "theirs")
    torch.testing.assert_close(again(x), theirs(x))
    assert lf.trainable_parameters(again).trainable == lf.trainable_parameters(model).trainable
    # Gradients under the names of files, which are the same for both: of what trains, and of x.
    of_x = []
    for network in (model, theirs):
        leaf = x.clone().requires_grad_()
        network(leaf).square().sum().backward()
        of_x.append(leaf.grad)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(parameter.grad)
    torch.testing.assert_close(*of_x)
    lf.save_adapter(model, tmp_path / "our gradients")
    theirs.save_pretrained(tmp_path / "their gradients")
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("ours", "our gradients", "their gradients")]
    values, ours, expected = (load_file(file) for file in files)
    assert ours.keys() == expected.keys() == values.keys()
    changed = [key for key in values if not torch.equal(ours[key], values[key])]
    assert changed and all(ours[key].abs().max() > 0 for key in changed)
    for key, grad in ours.items():
        torch.testing.assert_close(grad, expected[key], msg=lambda text, key=key: f"d{key}: {text}")


@each_variant
def test_compiles_to_one_graph(name, options):
    layer = make_layer(name, torch.float32, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second time with trained values that have moved
        x = torch.randn(M, K, requires_grad=True)
        leaves = [x, *trained(layer).values()]
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), leaves))
        move(layer, 0.1)


@each_variant
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(name, options, use_reentrant):
    layer = make_layer(name, torch.float64, dropout=0.3, **options)
    found = []
    for wrap in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x = torch.linspace(-1, 1, M * K, dtype=torch.float64).view(M, K).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(1)
        # Twice through the layer, as in a model that shares it: the mask and whatever is generated must replay.
        y = wrap(wrap(x) @ x.new_ones(N, K) / N)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad.clone() for p in trained(layer).values())])
    torch.testing.assert_close(found[0], found[1])


@each_variant
def test_micro_batches_accumulate(name, options):
    model = lf.inject(make_model().double().eval(), method=name, rank=R, **options)
    move(model, 0.1)
    x = torch.randn(4, M, K, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(run: Callable[[], None]) -> list[Tensor]:
        model.zero_grad()
        run()
        return [p.grad.clone() for p in parameters]

    def each() -> None:
        for batch in x:
            model(batch).square().sum().backward()

    def held() -> None:
        with lf.hold_gradients(model):
            each()

    whole = gradients(lambda: model(x).square().sum().backward())
    torch.testing.assert_close(gradients(each), whole)
    torch.testing.assert_close(gradients(held), whole)


@each_variant
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_computes_the_same_and_is_independent(name, options, again):
    if name in TOYS and again is not copy.deepcopy:
        pytest.skip("pickle finds a class by its module")
    model = lf.inject(make_model().eval(), method=name, rank=R, **options)
    move(model, 0.1)
    x = torch.randn(M, K)
    expected = model(x)
    twin = again(model)
    assert torch.equal(twin(x), expected)
    move(model, 0.1)
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)


@each_method
def test_the_documentation_names_formula_and_paper(name):
    if name in TOYS:
        return
    method = methods.get(name)
    assert method.formula.startswith("y = ")
    assert "arXiv" in sys.modules[method.__module__].__doc__.splitlines()[0]


@each_method
def test_the_readme_lists_it(name):
    if name in TOYS:
        return
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith(f"| [`{name}`]")]
    assert len(rows) == 1 and f"`{methods.get(name).formula.removeprefix('y = ')}`" in rows[0]


@each_method
def test_the_reference_is_a_witness_of_its_own(name):
    source = inspect.getsource(methods.get(name).reference)
    assert "Terms" not in source and "terms(" not in source and "lowrank_linear" not in source
    assert "generate" not in source


@each_method
def test_unknown_options_name_the_nearest(name):
    with pytest.raises(TypeError, match="has no field 'targt_modules'; did you mean 'target_modules'"):
        lf.AdapterConfig(name, targt_modules=["q_proj"])


def test_a_tensor_that_layers_share_is_one_parameter():
    model = lf.inject(make_model(), method="toy_shared", rank=2)
    assert model[0].toy_theta is model[2].toy_theta
    assert lf.trainable_parameters(model).trainable == 50
    x = torch.randn(M, K)
    model(x).square().sum().backward()
    whole, parts = model[0].toy_theta.grad, []
    for trains in (0, 2):
        y = x
        for at, layer in ((0, model[0]), (2, model[2])):
            held = copy.copy(layer)
            held._parameters = {**layer._parameters}
            if at != trains:
                held.toy_theta = nn.Parameter(layer.toy_theta.detach(), requires_grad=False)
            y = Shared.reference(y, layer.weight, layer.bias, held)
            y = y.relu() if at == 0 else y
        parts.append(torch.autograd.grad(y.square().sum(), model[0].toy_theta)[0])
    torch.testing.assert_close(whole, parts[0] + parts[1])


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
