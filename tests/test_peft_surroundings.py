"""Accelerated layers among what users put around and into them: copies, replicas, hooks, transforms, changes."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import lowrank_fused as lf
from lowrank_fused.peft.layers import STATE, Accelerated
from lowrank_fused.peft.readers import unilora, vblora
from lowrank_fused.routes import small
from lowrank_fused.tools.tiny_models import logits, tiny_model
from lowrank_fused.tools.twins import Twins, move

peft = pytest.importorskip("peft")

FUSED = {"fused"}
TARGETS = ["q_proj", "v_proj", "down_proj"]
# Method -> PEFT's config class and its settings beside targets.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 12, "vector_length": 16}),
    "unilora": ("UniLoraConfig", {"r": 4, "theta_d_length": 300}),
    "peanut": ("PeanutConfig", {"r": 4}),
    "miss": ("MissConfig", {"r": 4}),
}


def wearing(method: str = "lora", targets: list[str] = TARGETS, **settings: Any) -> nn.Module:
    """A tiny model with a trained adapter."""
    name, own = METHODS[method]
    if not hasattr(peft, name):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    config = getattr(peft, name)(target_modules=targets, **{**own, **settings})
    model = peft.get_peft_model(tiny_model("llama"), config)
    move(model)
    return model


def peft_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles(method, tmp_path):
    twins = Twins(wearing(method))
    assert twins.check() == FUSED
    with torch.no_grad():
        before = logits(twins.ours.eval())
    torch.save(twins.ours, tmp_path / "model.pt")
    buffer = io.BytesIO(pickle.dumps(twins.ours))
    for other in (
        copy.deepcopy(twins.ours),
        pickle.load(buffer),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert {row.path for row in lf.explain(other).rows} <= {"fused"}
        with torch.no_grad():
            assert torch.equal(logits(other), before)
            next(p for p in other.parameters() if p.requires_grad).add_(1.0)
            assert not torch.equal(logits(other), before)
        lf.restore(other)
        same_classes = [type(a) is type(b) for a, b in zip(other.modules(), twins.peft.modules(), strict=True)]
        assert all(same_classes)
    with torch.no_grad():
        assert torch.equal(logits(twins.ours), before)


def test_a_pickle_is_read_where_nothing_was_accelerated(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=4, target_modules=["0"]))
    move(model)
    lf.accelerate(model)
    torch.save((model, model(torch.ones(2, 8))), tmp_path / "model.pt")
    code = f"""
import torch
model, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert torch.equal(model(torch.ones(2, 8)), y)
import lowrank_fused as lf
print(lf.explain(model).rows[-1].path, lf.accelerate(model).of_path("fused"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["fused", "1"], done.stderr


@pytest.mark.parametrize("method", ["lora", "dora", "vblora"])
def test_replicas_of_data_parallel(method):
    """What nn.DataParallel makes: modules whose parameters are attributes, called from a thread each."""
    twins = Twins(wearing(method))
    twins.each(lambda model: model.train())
    layer, its = (peft_layers(model)[0] for model in (twins.ours, twins.peft))
    x = torch.randn(3, layer.in_features, requires_grad=True)
    replica = replicated(layer)
    assert isinstance(replica, Accelerated) and replica.base_layer is not layer.base_layer
    torch.manual_seed(3)
    y = replica(x)
    torch.manual_seed(3)
    expected = its(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    trained = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.sum(), trained)
    expected_grads = torch.autograd.grad(expected.sum(), [p for p in its.parameters() if p.requires_grad])
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)
    mine, copied = layer.__dict__[STATE], replica.__dict__[STATE]
    assert mine.calls is copied.calls and mine.generated is not copied.generated
    assert mine.calls["fused", ""] == 1


def replicated(module: nn.Module) -> nn.Module:
    """One replica on the same device, as torch.nn.parallel.replicate makes them: what it holds are no Parameters."""
    made = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for original, replica in made.items():
        for name, child in original._modules.items():
            replica._modules[name] = None if child is None else made[child]
        for name, parameter in original._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter) if parameter.requires_grad else parameter.detach())
    return made[module]


# Where a hook sits -> the path that the layer then takes.
PLACES: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "the layer": (lambda layer: layer, "fused"),
    "base_layer": (lambda layer: layer.base_layer, "tail"),
    "lora_A": (lambda layer: layer.lora_A["default"], "original: a hook on Linear of the adapter"),
    "lora_B": (lambda layer: layer.lora_B["default"], "original: a hook on Linear of the adapter"),
    "lora_dropout": (lambda layer: layer.lora_dropout["default"], "original: a hook on Dropout of the adapter"),
}


def nudge(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    return output * 1.5


def nudge_before(module: nn.Module, arguments: tuple) -> tuple:
    return (arguments[0] * 1.5,)


def nudge_back(module: nn.Module, grads: tuple, outer: tuple) -> tuple:
    return tuple(None if grad is None else grad * 1.5 for grad in grads)


def nudge_back_before(module: nn.Module, outer: tuple) -> tuple:
    return (outer[0] * 1.5,)


HOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda module, seen: module.register_forward_hook(seen(nudge)),
    "forward_pre": lambda module, seen: module.register_forward_pre_hook(seen(nudge_before)),
    "full_backward": lambda module, seen: module.register_full_backward_hook(seen(nudge_back)),
    "full_backward_pre": lambda module, seen: module.register_full_backward_pre_hook(seen(nudge_back_before)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_hooks_fire_as_often_as_in_peft_and_change_what_they_change(place, hook):
    module_of, path = PLACES[place]
    twins = Twins(wearing())
    counts, handles = [], []
    for model in (twins.ours, twins.peft):
        fired: list[int] = []
        counts.append(fired)

        def seen(function, fired=fired):
            def observed(*arguments):
                fired.append(1)
                return function(*arguments)

            return observed

        handles.append(HOOKS[hook](module_of(peft_layers(model)[3]), seen))
    assert twins.check() == {"fused", path}
    assert len(counts[0]) == len(counts[1]) > 0
    for handle in handles:
        handle.remove()
    assert twins.check() == FUSED


def test_hooks_on_all_modules_see_every_one():
    twins = Twins(wearing(lora_dropout=0.0))
    seen: list[list[str]] = [[], []]
    for model, names in zip((twins.ours.eval(), twins.peft.eval()), seen, strict=True):
        add = nn.modules.module.register_module_forward_hook
        handle = add(lambda module, *_, names=names: names.append(module._get_name()))
        logits(model)
        handle.remove()
    assert seen[0] == seen[1] and seen[0].count("Linear") > 6
    assert twins.check() == FUSED


def replace_base_forward(layer: Any) -> None:
    own = layer.base_layer.forward
    layer.base_layer.forward = lambda x: own(x) * 2


def replace_a_forward(layer: Any) -> None:
    own = layer.lora_A["default"].forward
    layer.lora_A["default"].forward = lambda x: own(x) * 2


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized(of: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda layer: parametrize.register_parametrization(of(layer), "weight", Doubled())


def replace_a(layer: Any) -> None:
    layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"], nn.Tanh())
    layer.lora_A["default"].weight = layer.lora_A["default"][0].weight


class Squashed(nn.Linear):
    """Keeps what it returned, and needs it in its backward."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.sigmoid(super().forward(x))
        return self.kept


def squash(layer: Any) -> None:
    layer.base_layer.__class__ = Squashed


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "base_layer.forward replaced": (replace_base_forward, "tail"),
    "lora_A.forward replaced": (replace_a_forward, "original: a hook on Linear of the adapter"),
    "base weight parametrized": (parametrized(lambda layer: layer.base_layer), "tail"),
    "lora_A parametrized": (
        parametrized(lambda layer: layer.lora_A["default"]),
        "original: the adapter holds a ParametrizedLinear",
    ),
    "another module as lora_A": (replace_a, "original: the adapter holds a Sequential"),
    "a base class of the user's": (squash, "tail"),
    "base weight trained": (lambda layer: layer.base_layer.requires_grad_(True), "tail"),
    "adapter frozen": (lambda layer: layer.requires_grad_(False), "fused"),
    "B frozen": (lambda layer: layer.lora_B.requires_grad_(False), "fused"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_layers_that_users_have_changed(what):
    change, path = CHANGES[what]
    twins = Twins(wearing(lora_dropout=0.0))
    twins.each(lambda model: change(peft_layers(model)[0]))
    assert twins.check() == {"fused", path}


def test_a_base_result_that_somebody_keeps_is_not_written_to():
    model = peft.get_peft_model(nn.Sequential(Squashed(8, 8)), peft.LoraConfig(r=4, target_modules=["0"]))
    move(model)
    twins = Twins(model, run=lambda model: model(torch.ones(2, 8)))
    assert twins.check() == {"tail"}
    twins.each(lambda model: model.eval())
    with torch.no_grad():
        twins.run(twins.ours), twins.run(twins.peft)
    kept = [model.base_model.model[0].base_layer.kept for model in (twins.ours, twins.peft)]
    assert torch.equal(*kept)


SHAPES = [(32,), (5, 32), (2, 5, 32), (2, 3, 5, 32), (0, 32), (1, 0, 32), (5, 31)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_inputs_of_any_shape(shape, method):
    twins = Twins(wearing(method))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fits = shape[-1] == 32
    ours, theirs = twins.do(lambda m: peft_layers(m)[0](x), raises=None if fits else RuntimeError)
    if fits:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        rows = len(shape) > 1
        assert twins.calls() == {"fused" if rows else "original: input is no matrix, or one of another width": 1}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_inputs_of_a_dtype_that_does_not_fit(dtype):
    twins = Twins(wearing())
    twins.do(lambda model: peft_layers(model)[0](torch.ones(3, 32).to(dtype)), raises=RuntimeError)


def test_layers_in_complex_numbers():
    twins = Twins(wearing(lora_dropout=0.0))
    twins.each(lambda model: peft_layers(model)[0].to(torch.complex64))
    ours, theirs = twins.do(lambda model: peft_layers(model)[0](dense((3, 32)) * (1 + 2j)))
    assert torch.equal(ours, theirs)
    assert twins.calls() == {"original: input is torch.complex64": 1}


def dense(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ODD: dict[str, Callable[[], Any]] = {
    "sparse": lambda: dense((3, 32)).to_sparse(),
    "compressed": lambda: dense((3, 32)).to_sparse_csr(),
    "mkldnn": lambda: dense((3, 32)).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([dense((3, 32)), dense((2, 32))]),
    "jagged": lambda: torch.nested.nested_tensor([dense((3, 32)), dense((2, 32))], layout=torch.jagged),
    "NumPy": lambda: dense((3, 32)).numpy(),
    "list": lambda: dense((32,)).tolist(),
    "None": lambda: None,
}


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_inputs_that_are_no_dense_tensors(kind, p, limit, monkeypatch):
    """PEFT's result where there is one, PEFT's error where there is none."""
    twins = Twins(wearing(lora_dropout=p))
    monkeypatch.setattr(small, "LIMIT", limit)
    x = ODD[kind]()

    def call(model: nn.Module) -> Tensor:
        y = peft_layers(model)[0](x)
        return y.to_padded_tensor(0.0) if y.is_nested else y.to_dense() if y.is_mkldnn else y

    if twins.attempt(call):
        ours, theirs = twins.do(call)
        assert torch.equal(ours, theirs)
    assert not any(path.startswith("fused") for path in twins.calls())


SURROUNDINGS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "no_grad": (lambda layer, x: torch.no_grad()(layer)(x), "fused"),
    "inference_mode": (lambda layer, x: torch.inference_mode()(layer)(x).clone(), "fused"),
    "an input made in inference_mode": (lambda layer, x: of_inference(layer, x), "fused"),
    "autocast": (lambda layer, x: torch.autocast("cpu", torch.bfloat16)(layer)(x), "fused"),
    "torch.func.grad": (lambda layer, x: functional_grad(layer, x), "original: a transform of torch.func"),
    "torch.func.vmap": (lambda layer, x: torch.func.vmap(layer)(x), "original: a transform of torch.func"),
    "torch.func.functional_call": (lambda layer, x: functional_call(layer, x), "fused"),
    "forward-mode derivatives": (lambda layer, x: forward_mode(layer, x), "original: forward-mode derivatives"),
    "torch.jit.trace": (
        lambda layer, x: torch.jit.trace(layer, x[:1], check_trace=False)(x),
        "original: torch.jit traces it",
    ),
}


def of_inference(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        inner = x.detach().clone()
    with torch.no_grad():
        return layer(inner)


def functional_call(layer: nn.Module, x: Tensor) -> Tensor:
    doubled = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    return torch.func.functional_call(layer, doubled, (x,))


def functional_grad(layer: nn.Module, x: Tensor) -> Tensor:
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(trained)
    return torch.cat([grad.flatten() for grad in grads.values()])


def forward_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize(
    ("message", "module", "told"),
    [
        ("`torch.jit.script` is deprecated. Please switch to `torch.compile`.", "torch.jit._script", False),
        ("`torch.jit.script` is deprecated. Please switch to `torch.compile`.", "lowrank_fused.linear", True),
        ("`torch.jit.trace` is deprecated.", "torch.jit._script", True),
    ],
)
def test_of_what_is_warned_of_once_only_torchs_own_script_is_no_difference(message, module, told):
    twins = Twins(wearing(lora_dropout=0.0))
    once = iter([FutureWarning(message)])

    def warned_of_once(model: nn.Module) -> None:
        for warning in once:
            warnings.warn_explicit(warning, FutureWarning, "file.py", 1, module)

    with pytest.raises(AssertionError, match=message) if told else contextlib.nullcontext():
        twins.do(warned_of_once)


@pytest.mark.parametrize("where", SURROUNDINGS)
def test_what_a_call_may_be_made_from(where):
    call, path = SURROUNDINGS[where]
    twins = Twins(wearing(lora_dropout=0.0))
    x = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = twins.do(lambda model: call(peft_layers(model)[0], x))
    tolerance = {"rtol": 0.02, "atol": 0.02} if where == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert ours.dtype == theirs.dtype
    assert set(twins.calls()) == {path}


@pytest.mark.parametrize("method", ["dora", "peanut", "unilora", "vblora", "miss"])
def test_weights_that_are_exchanged_behind_autograd_s_back(method):
    """Averaged weights for an evaluation, say: written through `.data`, and back."""
    twins = Twins(wearing(method))
    assert twins.check() == FUSED

    def exchange(model):
        model.eval()
        with torch.no_grad():
            first = logits(model)
        kept = [p.data.clone() for p in model.parameters()]
        for p in model.parameters():
            p.data.mul_(1.1)
        with torch.no_grad():
            second = logits(model)
        for p, value in zip(model.parameters(), kept, strict=True):
            p.data.copy_(value)
        assert (second - first).abs().max() > 0.01
        return second

    ours, theirs = twins.do(exchange)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert twins.check() == FUSED


def test_second_derivatives_are_peft_s_alone():
    """They raise, and the way around works: a Hessian-vector product with route="off"."""
    twins = Twins(wearing())
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))

    def product(model: Any) -> Tensor:
        layer = peft_layers(model.eval())[0]
        weight = layer.lora_A["default"].weight
        (grad,) = torch.autograd.grad(layer(x).square().sum(), weight, create_graph=True)
        grad.square().sum().backward()
        return weight.grad

    with pytest.raises(RuntimeError, match="once_differentiable"):
        product(twins.ours)
    lf.accelerate(twins.ours, route="off")
    ours, theirs = twins.do(product)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["dora", "peanut", "unilora", "vblora"])
def test_what_is_remembered_goes_with_the_weights_it_was_made_of(method, monkeypatch):
    """Else moving a model to another device, or deleting an adapter, would not free the memory."""
    for reader in (unilora, vblora):  # as on a GPU
        monkeypatch.setattr(reader, "where_launches_cost", lambda remembered, _: remembered)
    twins = Twins(wearing(method))
    remembered = [layer.__dict__[STATE].generated for layer in peft_layers(twins.ours)]
    assert twins.check() == FUSED and all(list(one) == ["default"] for one in remembered)
    twins.each(lambda model: model.double())
    assert not any(remembered)
    assert twins.check() == FUSED and all(remembered)
    twins.each(lambda model: model.delete_adapter("default"))
    assert not any(remembered)
