"""PEFT's LoRA beside linear layers of a class that is not torch's, and beside those that somebody else changed."""

from __future__ import annotations

import pytest
import torch
from base_layers import FEATURES, K, N, Net, adapted, judge, layer_of, lora, operands, paths, run, twins
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed")


class Recording(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Squashing(nn.Linear):
    """The backward of sigmoid looks at its result."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Handing(nn.Linear):
    """Gives back what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class Slicing(nn.Linear):
    """Part of a larger product, which isn't contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.weight, self.weight]))[..., : self.out_features]


class Outer(nn.Linear):
    """Leaves the work to a layer within, on which somebody may have put a hook."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.inner = nn.Linear(k, n)
        self.inner.register_forward_hook(lambda module, args, output: setattr(self, "last", output))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Rounding(nn.Linear):
    """Returns another dtype than it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16())


class Keyword(nn.Linear):
    """Takes more than x."""

    def forward(self, x: Tensor, *, factor: float | None = 1.0) -> Tensor:
        return super().forward(x) * (3.0 if factor is None else factor)


def foreign(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls(K, K if cls is Handing else N)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("cls", [Recording, Squashing, Handing, Slicing, Outer, Keyword], ids=lambda c: c.__name__)
def test_a_linear_layer_of_another_class_keeps_what_it_returned(cls, feature):
    ours, theirs = twins(lambda: adapted(foreign(cls), **FEATURES[feature]))
    x, dy = operands(torch.float32, 9)
    dy = dy[:, :K] if cls is Handing else dy
    judge(ours, theirs, x, dy)
    assert paths(ours) == {("tail", ""): 1}
    if hasattr(layer_of(ours).base_layer, "last"):
        assert torch.equal(layer_of(ours).base_layer.last, layer_of(theirs).base_layer.last)


def test_adapters_of_several_dtypes():
    """None is computed in less than its own."""

    def make() -> nn.Module:
        model = adapted(foreign(Recording), adapters=2)
        model.add_adapter("third", lora(r=3))
        model.base_model.set_adapter(["default", "second", "third"])
        for name, parameter in model.named_parameters():
            if "second" not in name:
                parameter.data = parameter.data.bfloat16()
        return model

    ours, theirs = twins(make)
    judge(ours, theirs, *operands(torch.bfloat16, 60))
    assert paths(ours) == {("tail", ""): 1}


def test_a_base_layer_that_returns_another_dtype():
    ours, theirs = twins(lambda: adapted(foreign(Rounding)))
    judge(ours, theirs, *operands(torch.float32, 40))
    assert paths(ours) == {("tail", ""): 1}


@pytest.mark.parametrize("given", [None, 2.0])
def test_arguments_of_the_base_layer_reach_it(given):
    ours, theirs = twins(lambda: adapted(foreign(Keyword)))
    x, dy = operands(torch.float32, 5)
    found, known = (run(lambda t, m=m: layer_of(m)(t, factor=given), m, x, dy) for m in (ours, theirs))
    for name, value in found.items():
        torch.testing.assert_close(value, known[name])


@pytest.mark.parametrize("trained", ["both", "base alone"])
def test_a_base_weight_that_trains(trained):
    def make() -> nn.Module:
        model = adapted(foreign(nn.Linear))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("base_layer" in name or ("lora_" in name and trained == "both"))
        return model

    ours, theirs = twins(make)
    x, dy = operands(torch.float32, 2, 5)
    results = []
    for model in (ours, theirs):
        y = model(x)  # no gradient for x: with frozen adapters only y itself wants one
        y.backward(dy)
        results.append({"y": y} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    found, known = results
    assert found.keys() == known.keys() and len(found) == (5 if trained == "both" else 3)
    for name, value in found.items():
        torch.testing.assert_close(value, known[name], msg=lambda m, name=name: f"{name}: {m}")
    assert paths(ours) == {("tail", ""): 1}


def test_lora_on_top_of_another_tuners_layer():
    """The inner layer hands on its own base layer's result, which a hook there has seen."""
    seen: list[Tensor] = []

    def make() -> nn.Module:
        torch.manual_seed(1)
        net = Net(foreign(nn.Linear))
        model = peft.get_peft_model(net, peft.LoHaConfig(r=2, target_modules=["fc"]), mixed=True)
        model.add_adapter("lora", lora())
        model.set_adapter(["default", "lora"])
        for module in model.modules():
            if type(module) is nn.Linear and module.out_features == N and module.in_features == K:
                module.register_forward_hook(lambda module, args, output: seen.append(output))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        return model

    ours, theirs = twins(make)
    assert type(layer_of(ours).base_layer).__name__.endswith("Linear") and layer_of(ours).base_layer.base_layer
    x, dy = operands(torch.float32, 6)
    for active in (["default", "lora"], ["lora"]):
        for model in (ours, theirs):
            model.set_adapter(active)
        found, known = (run(m, m, x, dy) for m in (ours, theirs))
        for name, value in found.items():
            torch.testing.assert_close(value, known[name], msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(*seen[-2:])
    assert paths(ours)["tail", ""] == 2


@pytest.mark.parametrize("where", ["base layer", "everywhere"])
@pytest.mark.parametrize("order", ["offload first", "accelerate first"])
def test_weights_that_are_offloaded(where, order):
    hooks = pytest.importorskip("accelerate.hooks")

    def offload(model: nn.Module) -> None:
        layer = layer_of(model).base_layer if where == "base layer" else model
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        hooks.attach_align_device_hook(layer, execution_device="cpu", offload=True, weights_map=state)

    ours, theirs = adapted(foreign(nn.Linear)), adapted(foreign(nn.Linear))
    for act in (offload, lf.accelerate) if order == "offload first" else (lf.accelerate, offload):
        act(ours)
    assert layer_of(ours).base_layer.weight.is_meta
    x = operands(torch.float32, 2, 3)[0]
    torch.testing.assert_close(ours(x), theirs(x))
    taken = paths(ours)
    assert len(taken) == 1 and list(taken)[0][0] == ("tail" if where == "base layer" else "original"), taken
