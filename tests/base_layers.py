"""Base layers that multiply by themselves, quantised or of any other class: PEFT models of one such layer, accelerated
and not, and how the results of the two are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf
from lowrank_fused.testing import assert_as_accurate_as_torch

peft = pytest.importorskip("peft")

K, N, R = 64, 96, 4
NEW = tuple(int(part) for part in peft.__version__.split(".")[:2]) >= (0, 19)


def plain(bias: bool) -> nn.Linear:
    """The same numbers in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(K, N, bias=bias).requires_grad_(False)


class Net(nn.Module):
    """One layer, and a parameter that floats, which PEFT looks for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer
        self.other = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(
        **{"r": R, "lora_alpha": 6, "target_modules": ["fc"], "init_lora_weights": False, **settings}
    )


def adapted(base: nn.Module, dtype: torch.dtype = torch.float32, adapters: int = 1, **settings: Any) -> nn.Module:
    """A PEFT model of one layer over `base`; the second adapter has another rank and scale."""
    net = Net(base)
    kind = type(base).__name__
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "Linear4bit", kind == "Linear8bitLt"
    torch.manual_seed(1)
    model = peft.get_peft_model(net, lora(**settings))
    if adapters == 2:
        model.add_adapter("second", lora(**{"r": 2, "lora_alpha": 7, **settings}))
        model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            if name.endswith("bias"):
                parameter.data.normal_()
    return model


def twins(make: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The same model twice, the first accelerated."""
    ours, theirs = make(), make()
    lf.accelerate(ours, **{"dropout": "torch", **settings})
    return ours, theirs


def layer_of(model: nn.Module) -> Any:
    found = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    return found[0]


def paths(model: nn.Module) -> dict[tuple[str, str], int | None]:
    return {(row.path, row.reason): row.calls for row in lf.explain(model).rows}


def run(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, dy: Tensor, amp: Any = None) -> dict:
    """y, dx and every gradient of a parameter; x enters by a product, so that no leaf does."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    with amp() if amp else nullcontext():
        y = function(leaf * 1)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach().clone(), "x": leaf.grad, **grads}


def in_float64(model: nn.Module, x: Tensor, dy: Tensor, alone: dict, view: Callable = lambda t: t) -> dict[str, Tensor]:
    """What the layer's result is when the adapters are exact, beside the base layer's own rounded product `alone`.

    With `abs` as the view: how large intermediates are.
    """
    layer = layer_of(model)
    leaf = view(x.double()).requires_grad_()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    leaves = {name: view(p.detach().double()).requires_grad_() for name, p in trained}
    y = view(alone["y"].double())
    torch.manual_seed(5)
    for adapter in layer.active_adapters:
        dropout = layer.lora_dropout[adapter]
        on = isinstance(dropout, nn.Dropout) and dropout.training
        keep = F.dropout(torch.ones_like(x), dropout.p) != 0 if on else 1.0
        of = {n.rpartition("lora_")[2]: t for n, t in leaves.items() if f".{adapter}." in n}
        s = F.linear(leaf * keep / (1 - dropout.p if on else 1), of[f"A.{adapter}.weight"])
        y = y + F.linear(s, of[f"B.{adapter}.weight"], of.get(f"B.{adapter}.bias")) * layer.scaling[adapter]
    dx, *grads = torch.autograd.grad(y, [leaf, *leaves.values()], view(dy.double()))
    return {"y": y.detach(), "x": view(alone["x"].double()) + dx, **dict(zip(leaves, grads, strict=True))}


def judge(ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor, amp: Any = None) -> None:
    """Everything that comes out of both models, by the rule of `lowrank_fused.testing`."""
    layer_of(theirs)._disable_adapters = True
    alone = run(theirs, theirs, x, dy, amp)
    layer_of(theirs)._disable_adapters = False
    found, known = run(ours, ours, x, dy, amp), run(theirs, theirs, x, dy, amp)
    exact, size = in_float64(theirs, x, dy, alone), in_float64(theirs, x, dy, alone, torch.abs)
    assert found.keys() == known.keys() == exact.keys() and len(found) >= 4
    for name, value in found.items():
        assert_as_accurate_as_torch(value, known[name], exact[name], name, size[name])


def operands(dtype: torch.dtype, *leading: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(leading))
    return tuple(torch.randn(*leading, size, generator=generator).to(dtype) for size in (K, N))  # type: ignore[return-value]


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def autocast_as_on_a_gpu() -> Iterator[None]:
    """PEFT's quantised layers ask for autocast on CUDA, wherever x is, and then leave the cast of x to it."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@dataclass(frozen=True)
class Mode:
    x: torch.dtype
    adapter: torch.dtype
    amp: Callable[[], AbstractContextManager] | None = None


MODES = {
    "fp32": Mode(torch.float32, torch.float32),
    "bf16": Mode(torch.bfloat16, torch.bfloat16),
    "fp32-beside-bf16": Mode(torch.bfloat16, torch.float32),
    "fp32-beside-fp16": Mode(torch.float16, torch.float32),
    "autocast": Mode(torch.float32, torch.float32, autocast),
    "autocast-gpu": Mode(torch.float32, torch.float32, autocast_as_on_a_gpu),
    "autocast-gpu-bf16": Mode(torch.bfloat16, torch.float32, autocast_as_on_a_gpu),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two": {"adapters": 2},
    "two-dropped": {"adapters": 2, "lora_dropout": 0.1},
    "lora-bias": {"lora_bias": True},
}
