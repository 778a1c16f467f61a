"""Calls too small for a CPU to gain are left to eager: to plain operators here, to PEFT's own forward there."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf
from lowrank_fused import Gate, lowrank_linear, lowrank_linear_ref
from lowrank_fused.grouping import group_of
from lowrank_fused.linear import LowRankLinearFunction
from lowrank_fused.operands import routes_for
from lowrank_fused.peft.layers import TOO_SMALL, state_of
from lowrank_fused.routes import small
from lowrank_fused.tools.twins import move

K, N, R = 12, 20, 4
LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for users; other tests have none."""
    monkeypatch.setattr(small, "LIMIT", LIMIT)


def tensors(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


def passes_the_function(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows with every call of the engine's autograd Function."""
    calls: list[bool] = []
    apply = LowRankLinearFunction.apply
    monkeypatch.setattr(LowRankLinearFunction, "apply", lambda *args: calls.append(True) or apply(*args))
    return calls


CORES: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "none": lambda _: None,
    "diag": lambda _: tensors((R,))[0],
    "dense": lambda _: tensors((R, R))[0],
    "gate": lambda rows: Gate(tensors((*rows, 1))[0]),
}


@pytest.mark.parametrize("extras", [(), ("bias",), ("out", "bias"), ("col", "bias")])
@pytest.mark.parametrize("rows", [(), (7,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("core", CORES)
def test_values_and_gradients(core, rows, extras, monkeypatch):
    calls = passes_the_function(monkeypatch)
    x, weight, a, b, vector = tensors((*rows, K), (N, K), (R, K), (N, R), (N,))
    middle, more = CORES[core](rows), dict.fromkeys(extras, vector)
    leaves = [t.requires_grad_() for t in (x, a, b, vector)]
    inner = middle.g if isinstance(middle, Gate) else middle
    leaves += [inner.requires_grad_()] if inner is not None else []
    results = []
    for function in (lowrank_linear, lowrank_linear_ref):
        y = function(x, weight, a, b, scale=0.7, core=middle, **more)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_dtypes(dtype, monkeypatch):
    calls = passes_the_function(monkeypatch)
    x, weight, a, b = tensors((7, K), (N, K), (R, K), (N, R), dtype=torch.float32)
    expected = lowrank_linear_ref(x.double(), weight.double(), a.double(), b.double())
    a.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = lowrank_linear(x, weight, a, b)
    assert y.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    inside = lowrank_linear(x.to(dtype), weight.to(dtype), a, b)
    assert inside.dtype == dtype and not calls
    for found in (y, inside):
        assert (found.double() - expected).norm() < 1e-2 * expected.norm()


def test_its_mask_is_pytorchs():
    p, (x, weight, a, b) = 0.5, tensors((7, K), (N, K), (R, K), (N, R))
    torch.manual_seed(3)
    y = lowrank_linear(x, weight, a, b, dropout_p=p)
    torch.manual_seed(3)
    assert torch.allclose(y, F.linear(x, weight) + F.dropout(x, p) @ a.t() @ b.t())
    with pytest.raises(ValueError, match="dropout_p must be in"):
        lowrank_linear(x, weight, a, b, dropout_p=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_limit(dropout_p, dtype):
    """Bytes of x and y, m (K + N) elements; eight each with dropout."""
    weight, a, b = tensors((96, 32), (R, 32), (96, R), dtype=dtype)
    m = LIMIT // (128 * (8 if dropout_p else dtype.itemsize))

    def route(*shape: int, device: str = "cpu") -> str:
        forward, backward = routes_for(torch.empty(*shape, 32, dtype=dtype, device=device), (96, 32), a, b, dropout_p)
        assert forward == backward
        return forward

    assert route(m - 1) == route(2, m // 2 - 1) == "eager"
    assert route(m) == route(1, device="meta") == "addmm"
    with small.without_eager():
        assert route(1) == "addmm"
    assert route(1) == "eager"


def test_what_asks_for_more_than_the_formula_takes_a_route(monkeypatch):
    """A route by name, a seed, a mask, fp32 factors that must not be rounded."""
    calls = passes_the_function(monkeypatch)
    x, weight, a, b = tensors((7, K), (N, K), (R, K), (N, R), dtype=torch.float32)
    a.requires_grad_()
    seed, keep = torch.tensor([5]), torch.ones(7, K, dtype=torch.bool)
    for options in ({"route": "addmm"}, {"seed": seed, "dropout_p": 0.1}, {"keep": keep, "dropout_p": 0.1}):
        lowrank_linear(x, weight, a, b, **options)
    lowrank_linear(x.bfloat16(), weight.bfloat16(), a, b, precision="match")
    assert len(calls) == 4


def test_compiled_graphs_serve_any_number_of_tokens():
    x, weight, a, b = tensors((7, K), (N, K), (R, K), (N, R), dtype=torch.float32)
    a.requires_grad_()
    compiled = torch.compile(lambda x: lowrank_linear(x, weight, a, b), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), lowrank_linear(x, weight, a, b), atol=1e-5)


def test_a_limit_that_is_no_number():
    command = [sys.executable, "-c", "import lowrank_fused.routes.small"]
    found = subprocess.run(command, env=os.environ | {small.ENVIRONMENT: "much"}, capture_output=True, text=True)
    assert "LOWRANK_FUSED_SMALL must be a number of bytes, got 'much'" in found.stderr


class Attention(nn.Module):
    """Projections of one x, of which the last two are narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, 8 * N), nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).sum(-1) + (self.k_proj(x) * self.v_proj(x)).sum(-1)


def in_peft(config: str = "LoraConfig", route: str = "auto", **settings: Any) -> tuple[nn.Module, nn.Module]:
    """An adapted model, and the same accelerated."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, config):
        pytest.skip(f"this PEFT has no {config}")
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        targets = ["q_proj", "k_proj", "v_proj"]
        model = peft.get_peft_model(Attention(), getattr(peft, config)(target_modules=targets, **settings))
        move(model)
        pair.append(model.train())
    lf.accelerate(pair[1], route=route)
    return pair[0], pair[1]


def paths(model: nn.Module) -> dict[tuple[str, str], int]:
    return {(row.path, row.reason): row.calls for row in lf.explain(model).rows if row.calls}


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_small_calls_of_accelerated_layers_are_pefts_own(p):
    theirs, ours = in_peft(r=R, lora_dropout=p)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        y = model(torch.ones(5, K))
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert paths(ours) == {("original", TOO_SMALL): 3}


def test_large_calls_and_named_routes_are_fused():
    _, ours = in_peft(r=R)
    ours(torch.ones(LIMIT // (4 * (K + N)) + 1, K))
    assert paths(ours) == {("fused", ""): 3}
    _, named = in_peft(r=R, route="addmm")
    named(torch.ones(5, K))
    assert paths(named) == {("fused", ""): 3}


def test_dropout_lowers_the_limit_while_it_is_on():
    _, ours = in_peft(r=R, lora_dropout=0.1)
    x = torch.ones(2 * LIMIT // (3 * 4 * (K + N)), K)  # two thirds of the limit for k and v, more than all for q
    ours(x)
    assert paths(ours) == {("fused", ""): 3}
    ours.eval()(x)
    assert paths(ours) == {("fused", ""): 4, ("original", TOO_SMALL): 2}


@pytest.mark.parametrize(("config", "settings"), [("LoraConfig", {"use_dora": True}), ("PeanutConfig", {})])
def test_where_peft_goes_through_the_weight_it_counts(config, settings, monkeypatch):
    _, ours = in_peft(config, r=R, **settings)
    monkeypatch.setattr(small, "LIMIT", 4 * K * 8 * N)  # the bytes of q's weight
    ours(torch.ones(1, K))
    assert paths(ours) == {("fused", ""): 1, ("original", TOO_SMALL): 2}


def test_methods_that_gain_later():
    _, ours = in_peft("TinyLoraConfig", r=2)
    layer = ours.base_model.model.k_proj
    factor = type(layer).reader.break_even
    assert factor > 1 and state_of(layer).times_x == pytest.approx((1 + N / K) / factor)
    layer(torch.ones(int(0.9 * factor * LIMIT / (4 * (K + N))), K))
    assert paths(ours) == {("original", TOO_SMALL): 1}


@pytest.mark.parametrize(("config", "settings"), [("VBLoRAConfig", {"vector_length": 4}), ("UniLoraConfig", {})])
def test_a_cpu_evaluates_light_factors_in_every_call(config, settings):
    """Their functions take it less time than remembering them would."""
    _, ours = in_peft(config, route="addmm", r=2, **settings)
    ours(torch.ones(5, K)).sum().backward()
    assert paths(ours) == {("fused", ""): 3}
    assert not any(state_of(layer).generated for layer in ours.base_model.model.children())


SHARING = LIMIT // (4 * (K + 10 * N))  # tokens that are all of the limit for the group, a sixth of it for k


def grouped(native: bool, **settings: Any) -> tuple[nn.Module, Any]:
    """A model whose layers share x from the second step on, and their group."""
    if native:
        model = lf.inject(Attention(), target_modules=["q_proj", "k_proj", "v_proj"], rank=R)
        lf.group(model)
        return model, group_of(model.q_proj)
    model = in_peft(r=R, **settings)[1]
    return model, group_of(model.base_model.model.q_proj)


def step(model: nn.Module, tokens: int) -> None:
    model.zero_grad()
    model(torch.ones(tokens, K)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0).step()


@pytest.mark.parametrize("native", [True, False])
def test_groups_are_for_calls_that_gain(native):
    """What all members have to compute decides, so that no result is left waiting for a member that needs none."""
    model, group = grouped(native)
    for tokens, shared in ((SHARING, 0), (SHARING, 1), (4, 1), (SHARING, 2)):
        step(model, tokens)
        assert (group.shared, group.wasted) == (shared, 0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_native_groups_leave_what_is_no_dense_tensor_to_the_layers():
    model, group = grouped(True)
    for _ in range(2):
        step(model, SHARING)
    x = torch.ones(4, K)
    torch.testing.assert_close(model.q_proj(x.to_sparse()), model.q_proj(x))
    for refused in (x.tolist(), torch.nested.nested_tensor([x])):
        with pytest.raises(TypeError, match="x must be an ordinary tensor"):
            model.q_proj(refused)
    assert (group.shared, group.wasted) == (1, 0)


def test_torch_jit_traces_native_layers_one_by_one():
    model, group = grouped(True)
    for _ in range(2):
        step(model, SHARING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.ones(5, K), check_trace=False)
    x = torch.randn(7, K)
    assert torch.equal(traced(x), model(x))
    assert (group.shared, group.wasted) == (1, 0)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_torch_jit_traces_pefts_own_without_a_warning(p):
    """Sizes are tensors there, so that comparing them warns."""
    model, group = grouped(False, lora_dropout=p)
    for _ in range(2):
        step(model, SHARING)
    x = torch.ones(5, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x, check_trace=False)
    torch.manual_seed(1)
    y = traced(x)
    torch.manual_seed(1)
    assert torch.equal(y, model(x))
    assert (group.shared, group.wasted) == (1, 0)
