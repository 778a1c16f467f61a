"""The low-rank term beside somebody else's product, factors that are not rounded, and masks that are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_fused import LaunchError, lowrank_add, lowrank_linear, ops
from lowrank_fused.routes import ROUTES
from lowrank_fused.terms import Gate
from lowrank_fused.testing import Operands, assert_as_accurate_as_torch

KERNEL = [pytest.param(r, marks=pytest.mark.triton) if r in ("thin", "split", "single") else r for r in ROUTES]
CORES = ["none", "diag", "dense", "gate"]


def leaves(o: Operands) -> dict[str, Tensor]:
    named = {"x": o.x, "a": o.a, "b": o.b, "core": o.core, "out": o.out}
    return {name: t for name, t in named.items() if t is not None}


def keep_like(x: Tensor, p: float) -> Tensor:
    return torch.rand(x.shape, device=x.device) >= p


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("route", KERNEL)
def test_adding_to_the_product_is_the_layer(route, core, p, device):
    torch.manual_seed(0)
    o = Operands.random(13, 20, 24, 3, core=core, vectors=("out",), device=str(device)).to(torch.float32)
    settings = dict(scale=0.7, core=Gate(o.core) if o.is_gate else o.core, out=o.out, dropout_p=p)
    seed = torch.tensor([7], device=device)
    whole = lowrank_linear(o.x, o.weight, o.a, o.b, **settings, seed=seed, route="reference")
    expected = torch.autograd.grad(whole, list(leaves(o).values()), o.dy)
    for inplace in (False, True):
        y = lowrank_add(F.linear(o.x, o.weight), o.x, o.a, o.b, **settings, seed=seed, route=route, inplace=inplace)
        torch.testing.assert_close(y, whole)
        for name, grad, known in zip(
            leaves(o), torch.autograd.grad(y, list(leaves(o).values()), o.dy), expected, strict=True
        ):
            torch.testing.assert_close(grad, known, msg=lambda m, name=name: f"{name}: {m}")


def test_in_place_means_the_same_tensor_and_nothing_else_does():
    o = Operands.random(5, 6, 7, 2).to(torch.float32)
    y = F.linear(o.x, o.weight)
    before = y.detach().clone()
    assert lowrank_add(y, o.x, o.a, o.b) is not y and torch.equal(y, before)
    assert lowrank_add(y, o.x, o.a, o.b, inplace=True) is y and not torch.equal(y, before)
    with torch.no_grad():
        y = F.linear(o.x, o.weight)
        assert lowrank_add(y, o.x, o.a, o.b, inplace=True) is y


def test_a_product_of_another_dtype_is_added_in_its_own():
    o = Operands.random(5, 6, 7, 2).to(torch.float32)
    y = lowrank_add(F.linear(o.x, o.weight).double(), o.x, o.a, o.b)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), lowrank_linear(o.x, o.weight, o.a, o.b))
    term = lowrank_add(torch.zeros(5, 6), o.x, o.a, o.b)
    for inplace in (False, True):
        y = F.linear(o.x, o.weight).bfloat16()
        expected = (y + term).bfloat16()
        assert torch.equal(lowrank_add(y, o.x, o.a, o.b, inplace=inplace), expected), "rounded more than once"


@pytest.mark.parametrize("route", KERNEL)
@pytest.mark.parametrize("k", [24, 21])
def test_a_given_mask_drops_what_it_says(route, k, device):
    torch.manual_seed(0)
    o = Operands.random(33, 20, k, 3, device=str(device)).to(torch.float32)
    p, keep = 0.3, keep_like(o.x, 0.3)
    dropped = o.x * keep / (1 - p)
    expected = F.linear(o.x, o.weight) + F.linear(F.linear(dropped, o.a), o.b)
    y = lowrank_linear(o.x, o.weight, o.a, o.b, dropout_p=p, keep=keep, route=route)
    torch.testing.assert_close(y, expected)
    wanted = [o.x, o.a, o.b]
    grads = zip("xab", torch.autograd.grad(y, wanted, o.dy), torch.autograd.grad(expected, wanted, o.dy), strict=True)
    for name, ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


def test_a_mask_of_the_wrong_kind_is_refused():
    o = Operands.random(4, 5, 6, 2)
    for keep in (torch.ones(4, 6), torch.ones(4, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="keep must be boolean in x's shape"):
            lowrank_linear(o.x, o.weight, o.a, o.b, dropout_p=0.5, keep=keep)


def wide_adapter(o: Operands, keep: Tensor | None, p: float) -> Tensor:
    """What PEFT computes with fp32 factors beside a 16-bit layer, in PyTorch."""
    x = o.x.float()
    x = x if keep is None else x * keep / (1 - p)
    s = F.linear(x, o.a)
    s = s if o.core is None else s * o.core
    return (F.linear(o.x, o.weight, o.bias) + F.linear(s, o.b) * o.scale).to(o.x.dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("core", ["none", "diag"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_factors_are_not_rounded_where_precision_must_match(dtype, core, p):
    """Beside float64: as close as PyTorch with fp32 factors, which rounded ones are not."""
    torch.manual_seed(0)
    o = Operands.random(700, 48, 64, 4, core=core, vectors=("bias",)).to(torch.float32)
    with torch.no_grad():
        o.x, o.weight, o.bias, o.dy = (t.to(dtype) for t in (o.x, o.weight, o.bias, o.dy))
    keep = keep_like(o.x, p) if p else None
    adapter = {"a": o.a, "b": o.b} | ({} if o.core is None else {"core": o.core})
    o.x.requires_grad_()
    wanted = [o.x, *adapter.values()]

    def run(precision):
        y = lowrank_linear(
            o.x, o.weight, o.a, o.b, core=o.core, bias=o.bias, scale=o.scale, dropout_p=p, keep=keep,
            precision=precision,
        )  # fmt: skip
        return [y, *torch.autograd.grad(y, wanted, o.dy)]

    theirs = wide_adapter(o, keep, p)
    theirs = [theirs, *torch.autograd.grad(theirs, wanted, o.dy)]

    def in_float64(view):
        """The exact results; with `abs` as the view, how large sums are without cancellation."""
        leaf = {name: view(t.detach().double()).requires_grad_() for name, t in {"x": o.x, **adapter}.items()}
        w, bias, dy = (view(t.detach().double()) for t in (o.weight, o.bias, o.dy))
        x = leaf["x"] if keep is None else leaf["x"] * keep / (1 - p)
        s = F.linear(x, leaf["a"])
        s = s * leaf["core"] if "core" in leaf else s
        y = F.linear(leaf["x"], w, bias) + F.linear(s, leaf["b"]) * o.scale
        return [y, *torch.autograd.grad(y, list(leaf.values()), dy)]

    exact, sizes = in_float64(lambda t: t), in_float64(torch.abs)
    names = ["y", "x", *adapter]
    for name, ours, known, right, size in zip(names, run("match"), theirs, exact, sizes, strict=True):
        assert_as_accurate_as_torch(ours, known, right, name, size)
    with pytest.raises(AssertionError, match="ours max"):
        assert_as_accurate_as_torch(run("fast")[2], theirs[2], exact[2], "a", sizes[2])


def test_matching_precision_keeps_x_in_its_own_dtype():
    o = Operands.random(64, 16, 32, 4).to(torch.float32)
    x, weight = o.x.detach().bfloat16(), o.weight.bfloat16()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lowrank_linear(x, weight, o.a, o.b, precision="match", dropout_p=0.1)
    sizes = {(t.dtype, tuple(t.shape)) for t in saved}
    assert (torch.bfloat16, (64, 32)) in sizes and (torch.float32, (64, 4)) in sizes and (torch.uint8, (64, 4)) in sizes
    assert (torch.float32, (64, 32)) not in sizes


def test_a_scale_may_be_a_tensor():
    o = Operands.random(5, 6, 7, 2).to(torch.float32)
    scale = torch.tensor(0.3)
    torch.testing.assert_close(
        lowrank_linear(o.x, o.weight, o.a, o.b, scale=scale), lowrank_linear(o.x, o.weight, o.a, o.b, scale=0.3)
    )
    y = torch.zeros(5, 6)
    torch.testing.assert_close(lowrank_add(y, o.x, o.a, o.b, scale=scale), lowrank_add(y, o.x, o.a, o.b, scale=0.3))


def test_bad_operands_are_refused():
    o = Operands.random(5, 6, 7, 2)
    with pytest.raises(TypeError, match="x must be an ordinary tensor, not a list"):
        lowrank_add(torch.zeros(5, 6), o.x.tolist(), o.a, o.b)
    with pytest.raises(ValueError, match="y must have a row for each of x's"):
        lowrank_add(torch.zeros(4, 6), o.x, o.a, o.b)
    with pytest.raises(ValueError, match=r"b must be \[out_features, rank\] = \[9, rank\]"):
        lowrank_add(torch.zeros(5, 9), o.x, o.a, o.b)
    with pytest.raises(ValueError, match="precision must be 'fast' or 'match'"):
        lowrank_linear(o.x, o.weight, o.a, o.b, precision="exact")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_failing_kernel_is_reported_with_the_name_of_the_layer(direction, monkeypatch):
    o = Operands.random(5, 6, 7, 2).to(torch.float32)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    y = lowrank_linear(o.x, o.weight, o.a, o.b, label="layers.3.q_proj") if direction == "backward" else None
    monkeypatch.setattr(ops, direction, fail)
    with pytest.raises(LaunchError, match=r"layers\.3\.q_proj: .*LOWRANK_FUSED_ROUTE=addmm.*restore") as info:
        y.sum().backward() if y is not None else lowrank_linear(o.x, o.weight, o.a, o.b, label="layers.3.q_proj")
    assert "illegal memory access" in str(info.value)
    monkeypatch.setattr(ops, direction, lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    if direction == "forward":
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            lowrank_linear(o.x, o.weight, o.a, o.b, label="layers.3.q_proj")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph(inplace, p):
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    seed = torch.tensor([3])

    def function(x, a, b):
        return lowrank_add(F.linear(x, o.weight), x, a, b, dropout_p=p, seed=seed, inplace=inplace)

    wanted = [o.x, o.a, o.b]
    expected = torch.autograd.grad(function(*wanted), wanted, o.dy)
    found = torch.autograd.grad(torch.compile(function, fullgraph=True)(*wanted), wanted, o.dy)
    for ours, known in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, known)


def test_opcheck():
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    x, a, b = (t.detach() for t in (o.x, o.a, o.b))
    settings = dict(scale=0.5, core_kind="none", dropout_p=0.3, wants=[True, True, True, False, False], route="addmm")
    torch.library.opcheck(ops.add_op, (torch.randn(6, 10), x, a, b, None, torch.tensor([1])), settings)
    bits = torch.full((6, 2), 77, dtype=torch.uint8)
    torch.library.opcheck(ops.add_op, (torch.randn(6, 10), x, a, b, None, bits), settings)
    torch.library.opcheck(ops.forward_op, (x, o.weight, a, b, None, None, bits), settings)
    torch.library.opcheck(ops.backward_op, (o.dy, x, None, a, b, None, torch.randn(6, 3), bits), settings)
    torch.library.opcheck(
        ops.add_op, (torch.randn(6, 10), x, a, b, None, torch.tensor([1])), {**settings, "route": "precise"}
    )


# In place


class Squash(torch.autograd.Function):
    """A product whose backward looks at the result."""

    @staticmethod
    def forward(ctx, t):
        y = torch.tanh(t)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * (1 - y * y)


class Reshaped(torch.autograd.Function):
    """A product that is a view made in a Function, which autograd lets nobody write into: bitsandbytes' are."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return F.linear(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[0], None


PRODUCTS = {
    "result": lambda x, weight: F.linear(x, weight),
    "view": lambda x, weight: F.linear(x.flatten(0, 1), weight).view(*x.shape[:-1], -1),
    "view of a Function": lambda x, weight: Reshaped.apply(x, weight),
    "slice": lambda x, weight: F.linear(x, torch.cat([weight, weight]))[..., : len(weight)],
    "cut rows": lambda x, weight: F.linear(torch.cat([x, x]), weight)[: len(x)],
}


def by_hand(o: Operands, x: Tensor, y: Tensor) -> Tensor:
    return y + F.linear(F.linear(x, o.a), o.b)


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_in_place_on_products_of_any_making(product, y_dtype):
    """Twice, since a layer may hold several adapters, and with x on the way to more than y."""
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    leaf = o.x.detach().view(2, 3, 14).requires_grad_()
    dy = o.dy.view(2, 3, 10).to(y_dtype)
    results = []
    for add in (lambda y, x: lowrank_add(y, x, o.a, o.b, inplace=True), lambda y, x: by_hand(o, x, y)):
        x = leaf * 1
        y = add(add(PRODUCTS[product](x.to(y_dtype), o.weight.to(y_dtype)), x), x)
        loss = (y * dy).sum() + x.square().sum()
        results.append((y, *torch.autograd.grad(loss, [leaf, o.a, o.b])))
    for ours, known in zip(*results, strict=True):
        torch.testing.assert_close(ours, known)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("product", ["result", "view", "view of a Function"])
def test_in_place_takes_over_the_memory(product, trains):
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    x = o.x.detach().view(2, 3, 14).requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        y = PRODUCTS[product](x, o.weight)
        assert lowrank_add(y, x, o.a, o.b, inplace=True).data_ptr() == y.data_ptr()
        y = PRODUCTS[product](x, o.weight).double()
        assert lowrank_add(y, x, o.a, o.b, inplace=True).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("shaped", [lambda y: y, lambda y: y.view(2, 3, 10)], ids=["result", "view"])
def test_a_product_whose_backward_looks_at_it_is_never_silently_wrong(shaped, frozen):
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    weight = o.weight.clone().requires_grad_()
    x = o.x.detach()
    a, b = (t.detach().requires_grad_(not frozen) for t in (o.a, o.b))
    for inplace in (False, True):
        y = shaped(Squash.apply(F.linear(x, weight)))
        found = lowrank_add(y, x.view(*y.shape[:-1], -1), a, b, inplace=inplace)
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                found.sum().backward()
        else:
            (found.view_as(o.dy) * o.dy).sum().backward()
            (expected,) = torch.autograd.grad(Squash.apply(F.linear(x, weight)), weight, o.dy)
            torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gradient_that_y_alone_wants_passes(inplace):
    """Frozen factors beside a layer that trains, its input being data."""
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    weight = o.weight.clone().requires_grad_()
    x, a, b = (t.detach() for t in (o.x, o.a, o.b))
    y = lowrank_add(F.linear(x, weight), x, a, b, inplace=inplace)
    torch.testing.assert_close(y, by_hand(o, x, F.linear(x, weight)))
    (found,) = torch.autograd.grad(y, weight, o.dy)
    torch.testing.assert_close(found, o.dy.t() @ x)


def test_a_leaf_is_left_alone():
    o = Operands.random(5, 6, 7, 2).to(torch.float32)
    y = torch.zeros(5, 6, requires_grad=True)
    for leaf in (y, torch.zeros(6, 6)[:5].requires_grad_()):
        with pytest.raises(ValueError, match="y is a leaf that requires a gradient.*inplace=False"):
            lowrank_add(leaf, o.x, o.a, o.b, inplace=True)
        assert not leaf.any()
    with torch.no_grad():
        assert lowrank_add(y, o.x, o.a, o.b, inplace=True) is y and y.any()


def test_in_inference_mode_and_after_it():
    o = Operands.random(5, 6, 7, 2).to(torch.float32)
    with torch.inference_mode():
        y = F.linear(o.x, o.weight)
        expected = by_hand(o, o.x, y)
        made_here = y.clone()
        torch.testing.assert_close(lowrank_add(y, o.x, o.a, o.b, inplace=True), expected)
    found = lowrank_add(made_here, o.x, o.a, o.b)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert o.x.grad is not None


def test_a_product_that_somebody_saved_is_protected():
    """Without gradients too: what was kept of y counts the writes to it."""
    o = Operands.random(5, 6, 7, 2).to(torch.float32)
    weight = o.weight.clone().requires_grad_()
    y = F.linear(o.x, weight)
    squared = y * y
    with torch.no_grad():
        lowrank_add(y, o.x, o.a, o.b, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_place_within_a_checkpoint_and_backward_twice(reentrant):
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    seed = torch.tensor([3])

    def function(x):
        return lowrank_add(F.linear(x, o.weight), x, o.a, o.b, dropout_p=0.3, seed=seed, inplace=True)

    wanted = [o.x, o.a, o.b]
    y = function(o.x * 1)
    first = torch.autograd.grad(y, wanted, o.dy, retain_graph=True)
    again = torch.autograd.grad(y, wanted, o.dy)
    for leaf in wanted:
        leaf.grad = None
    checkpoint(function, o.x * 1, use_reentrant=reentrant).backward(o.dy)
    for a, b, leaf in zip(first, again, wanted, strict=True):
        assert torch.equal(a, b) and torch.equal(a, leaf.grad)


def test_hooks_on_a_product_see_its_gradient():
    o = Operands.random(5, 6, 7, 2).to(torch.float32)
    seen = []
    y = F.linear(o.x, o.weight)
    y.register_hook(seen.append)
    lowrank_add(y, o.x, o.a, o.b, inplace=True).backward(o.dy)
    assert torch.equal(seen[0], o.dy)


@pytest.mark.parametrize("wants", ["all", "y", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiles_beside_products_of_another_dtype_and_without_gradients(dtype, wants):
    o = Operands.random(6, 10, 14, 3).to(torch.float32)
    weight = o.weight.clone().requires_grad_(wants == "y")
    x, a, b = (t.detach().requires_grad_(wants == "all") for t in (o.x, o.a, o.b))

    def function(x, a, b, weight):
        return lowrank_add(F.linear(x, weight).to(dtype), x, a, b, inplace=True)

    expected = function(x, a, b, weight)
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(x, a, b, weight)
    torch.testing.assert_close(found, expected)
    leaves = [t for t in (x, a, b, weight) if t.requires_grad]
    if leaves:
        dy = o.dy.to(dtype)
        for ours, known in zip(
            torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
        ):
            torch.testing.assert_close(ours, known)
