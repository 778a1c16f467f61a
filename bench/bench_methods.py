"""pytest-benchmark cases of every method: one layer by our engine, and by the method's formula in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fused as lf
from bench.recording import record
from lowrank_fused import methods
from lowrank_fused.benchmark import Case, Row, Step
from lowrank_fused.routes.small import without_eager
from lowrank_fused.tools.doctor import best_device

DEVICE = best_device()
ON_GPU = DEVICE.type == "cuda"
SIZE, TOKENS = (4096, 4096) if ON_GPU else (128, 64)
GATE_SIZE, GATE_TOKENS, AGREEMENT = 128, 64, 1e-4  # the gate is fp32 arithmetic, also where 16 bits are timed
# As long as it would be in a whole model, where every element of the vector serves several of the factors'.
SHORT_VECTOR = {"unilora": {"theta_d_length": 4096}}
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def layer_of(name: str, size: int, dtype: torch.dtype) -> lf.LowRankLinear:
    """A layer of this method whose trained tensors have moved away from their start."""
    with torch.random.fork_rng(devices=[DEVICE] if ON_GPU else []):
        torch.manual_seed(0)
        linear = nn.Linear(size, size, bias=False, device=DEVICE, dtype=dtype)
        # Default ranks and options are made for sizes of real models.
        settings = SHORT_VECTOR.get(name, {}) if size == 4096 else {"rank": 8, **methods.small_options(name)}
        layer = lf.LowRankLinear.from_linear(linear, method=name, autocast_adapter_dtype=False, **settings)
        with torch.no_grad():
            for tensor in layer.trained_names:
                parameter = getattr(layer, tensor)
                parameter.add_(0.02 * torch.randn_like(parameter))
    return layer


def forwards(layer: lf.LowRankLinear) -> dict[str, Callable[[Tensor], Tensor]]:
    """The engine's way to compute the layer, and the formula's."""
    reference = methods.get(layer.method.name).reference
    return {"auto": layer, "formula": lambda x: reference(x, layer.matrix, layer.bias, layer)}


def values(layer: lf.LowRankLinear, name: str, tokens: int) -> dict[str, Tensor]:
    """y, dx and the gradient of everything that trains."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (tokens, layer.in_features)
    x, dy = (torch.randn(shape, generator=generator, device=DEVICE, dtype=layer.matrix.dtype) for _ in range(2))
    x.requires_grad_()
    leaves = {"x": x, **{tensor: getattr(layer, tensor) for tensor in layer.trained_names}}
    y = forwards(layer)[name](x)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("way", ["auto", "formula"])
@pytest.mark.parametrize("name", methods.registry())
def test_method(benchmark: Any, name: str, way: str) -> None:
    """Ours must compute the formula, gradients and all; then the time of either."""
    small = layer_of(name, GATE_SIZE, torch.float32).eval()
    with without_eager():
        expected, found = (values(small, each, GATE_TOKENS) for each in ("formula", way))
    for what, got in found.items():
        difference = ((got - expected[what]).abs().max() / expected[what].abs().max()).item()
        assert difference <= AGREEMENT, f"{name}: {what} differs from the formula by {difference:.1e}"
    layer = layer_of(name, SIZE, DTYPE).eval()
    leaves = [getattr(layer, tensor) for tensor in layer.trained_names]
    x = torch.randn(TOKENS, SIZE, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(TOKENS, SIZE, device=DEVICE, dtype=DTYPE)
    forward = forwards(layer)[way]

    def run() -> Any:
        with torch.no_grad():
            torch._foreach_mul_(leaves, 1.0)  # as after an optimiser step: no factor from the step before may serve
        return torch.autograd.grad(forward(x), [x, *leaves], dy)

    case = Case(SIZE, SIZE, TOKENS, methods.resolve(name, None if ON_GPU else 8)[0], 0.0, DTYPE, DEVICE, label=name)
    record(benchmark, Row.of(case, way, "both"), case.title(), Step(lambda _: run()), DEVICE)
