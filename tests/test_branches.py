"""Linears that share one x: against separate layers, every route, dtype, subset of gradients."""

from __future__ import annotations

import pytest
import torch

import lowrank_fused as lf
from lowrank_fused.branches import Branch, lowrank_group
from lowrank_fused.dropout import draw_keep
from lowrank_fused.linear import lowrank_linear_ref
from lowrank_fused.routes import GROUP_ROUTES, choose, choose_for_group
from lowrank_fused.target import Target

SIZES = ((24, 3), (8, 5), (16, 3))  # out_features and rank of each
K, SCALE = 40, 0.7


ROUTES = [pytest.param(r, marks=pytest.mark.triton) if r in ("thin", "split") else r for r in GROUP_ROUTES]


def branches(device: torch.device, dtype: torch.dtype, factors: torch.dtype | None = None) -> list[Branch]:
    torch.manual_seed(1)

    def leaf(*shape: int, of: torch.dtype = factors or dtype) -> torch.Tensor:
        return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(device, of).requires_grad_()

    weights = [torch.randn(n, K, dtype=torch.float64).div(K**0.5).to(device, dtype) for n, _ in SIZES]
    pairs = zip(weights, SIZES, strict=True)
    return [Branch(w, leaf(r, K), leaf(n, r), leaf(n, of=dtype)) for w, (n, r) in pairs]


def leaves(x: torch.Tensor, group: list[Branch]) -> list[torch.Tensor]:
    found = [x, *(t for b in group for t in (b.a, b.b, b.bias) if t is not None)]
    return [t for t in found if t.requires_grad]


def grown(group: list[Branch]) -> list[Branch]:
    """The same values in float64."""

    def wide(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return [Branch(wide(b.weight), wide(b.a), wide(b.b), wide(b.bias)) for b in group]


def run(forward, x, group, dys, **settings):
    ys = forward(x, group, **settings)
    return [*ys, *torch.autograd.grad(ys, leaves(x, group), dys, allow_unused=True)]


def separately(x, group, dropout_p=0.0, keep=None, scale=SCALE):
    return [
        lowrank_linear_ref(x, b.weight, b.a, b.b, scale=scale, bias=b.bias, dropout_p=dropout_p, keep=keep)
        for b in group
    ]


def inputs(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(2)
    x = torch.randn(*shape, K, dtype=torch.float64).to(device, dtype).requires_grad_()
    return x, [torch.randn(*shape, n, dtype=torch.float64).to(device, dtype) for n, _ in SIZES]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(37,), (3, 5, 2), (0,)], ids=str)
def test_float64_equals_separate_layers(shape, p, device):
    x, dys = inputs(device, torch.float64, *shape)
    group = branches(device, torch.float64)
    seed = torch.tensor([5], device=device)
    m = x.numel() // K
    keep = draw_keep(seed, m, K, p)[:, :K].view(x.shape) if p else None
    ours = run(lowrank_group, x, group, dys, scale=SCALE, dropout_p=p, seed=seed)
    expected = run(separately, x, group, dys, dropout_p=p, keep=keep)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
    ids=["fp32", "fp16", "bf16", "bf16 beside fp32"],
)
def test_every_route_is_as_accurate_as_separate_layers_in_pytorch(route, p, dtype, factors, device):
    x, dys = inputs(device, dtype, 50)
    group, seed = branches(device, dtype, factors), torch.tensor([5], device=device)
    keep = draw_keep(seed, 50, K, p)[:, :K] if p else None
    ours = run(lowrank_group, x, group, dys, scale=SCALE, dropout_p=p, seed=seed, route=route)
    torchs = run(separately, x, group, dys, dropout_p=p, keep=keep)
    wide, exact_x = grown(group), x.detach().double().requires_grad_()
    exact = run(separately, exact_x, wide, [dy.double() for dy in dys], dropout_p=p, keep=keep)
    for found, plain, wanted in zip(ours, torchs, exact, strict=True):
        assert found.dtype == plain.dtype
        size = wanted.abs().max()
        floor = 4 * torch.finfo(dtype).eps * size
        assert (found.double() - wanted).abs().max() <= 2 * (plain.double() - wanted).abs().max() + floor


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("frozen", "p"),
    [
        *((frozen, 0.0) for frozen in ("x", "a", "b", "bias", "x a", "x b bias", "a b bias")),
        *((frozen, 0.3) for frozen in ("a", "first a", "first b", "first bias")),
    ],
)
def test_only_what_is_asked_for_is_computed_and_kept(route, frozen, p, device):
    x, dys = inputs(device, torch.float32, 20)
    group, words, seed = branches(device, torch.float32), frozen.split(), torch.tensor([5], device=device)
    if "x" in words:
        x.requires_grad_(False)
    for i, branch in enumerate(group):
        for name in ("a", "b", "bias"):
            if name in words and ("first" not in words or i == 0):
                getattr(branch, name).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = run(lowrank_group, x, group, dys, scale=SCALE, route=route, dropout_p=p, seed=seed)
    expected = run(separately, x, group, dys, dropout_p=p, keep=draw_keep(seed, 20, K, p)[:, :K] if p else None)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    owned = {t.data_ptr() for b in group for t in (b.weight, b.a, b.b)}
    of_tokens = [t for t in kept if t.data_ptr() not in owned and t.dim() == 2]
    needs_x = any(b.a.requires_grad for b in group)
    assert sum(t.shape[1] == K for t in of_tokens) == needs_x
    assert sum(t.shape[1] == sum(r for _, r in SIZES) for t in of_tokens) == any(b.b.requires_grad for b in group)


@pytest.mark.parametrize("route", ROUTES)
def test_a_result_that_the_loss_ignores_gets_no_gradient(route, device):
    x, dys = inputs(device, torch.float32, 6, 2)
    group = branches(device, torch.float32)
    ys = lowrank_group(x, group, scale=SCALE, route=route)
    found = torch.autograd.grad([ys[0], ys[2]], leaves(x, group), [dys[0], dys[2]], allow_unused=True)
    wanted = torch.autograd.grad(separately(x, group)[::2], leaves(x, group), dys[::2], allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-4, atol=1e-4)


class NoGradient(torch.autograd.Function):
    """Something that has no gradient to give, which is not the same as zeros."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_no_gradient_at_all_stays_none(device):
    x, _ = inputs(device, torch.float32, 6)
    group = branches(device, torch.float32)
    sum(NoGradient.apply(y).sum() for y in lowrank_group(x, group, scale=SCALE)).backward()
    assert all(leaf.grad is None for leaf in leaves(x, group))


def test_a_mask_that_nobody_needs_again_is_not_kept(device):
    x, _ = inputs(device, torch.float32, 18)
    group = branches(device, torch.float32)
    for branch in group:
        branch.a.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lowrank_group(x.detach(), group, dropout_p=0.5, seed=torch.tensor([1], device=device))
    assert kept and not any(t.dtype == torch.uint8 for t in kept)


def test_results_may_be_written_to_and_have_one_derivative(device):
    x, dys = inputs(device, torch.float32, 3, 6)
    group = branches(device, torch.float32)
    ys = lowrank_group(x, group, scale=SCALE)
    ys[0].add_(ys[0].detach())
    dys = [dy.requires_grad_() for dy in dys]
    first = torch.autograd.grad(ys, x, dys, create_graph=True)[0]
    torch.testing.assert_close(first, torch.autograd.grad(separately(x, group), x, dys)[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def apart(t: torch.Tensor) -> torch.Tensor:
    """The same rows with NaN between them."""
    held = torch.full((t.shape[0], t.shape[1] + 3), float("nan"), dtype=t.dtype)
    return held[:, : t.shape[1]].copy_(t)


def test_what_lies_between_rows_stays_out_of_bf16_products():
    """oneDNN reads it: the plain product shows that these sizes are such."""
    m, k, n = 40, 31, 16
    torch.manual_seed(0)
    x, dy = apart(torch.randn(m, k).bfloat16()), apart(torch.randn(m, k).bfloat16())
    weight = torch.randn(n, k).bfloat16()
    if torch.nn.functional.linear(x, weight).isfinite().all():
        pytest.skip("this library does not read between the rows")
    square = torch.randn(k, k).bfloat16()
    factors = [torch.randn(*shape).bfloat16().requires_grad_() for shape in ((4, k), (n, 4), (4, k), (k, 4))]
    of_n, of_k = Branch(weight, factors[0], factors[1]), Branch(square, factors[2], factors[3])
    x.requires_grad_()
    grads = [torch.ones(m, n).bfloat16(), dy]
    for ys in (
        lowrank_group(x, [of_n, of_k]),
        [lf.lowrank_linear(x, b.weight, b.a, b.b) for b in (of_n, of_k)],
    ):
        found = [*ys, *torch.autograd.grad(ys, [x, *factors], grads)]
        assert all(t.isfinite().all() for t in found)


def test_a_factor_with_nan_spoils_no_other_projection():
    """s of all projections lies side by side, and oneDNN reads what is beside its operand."""
    m, k, n, r = 40, 24, 16, 31
    torch.manual_seed(0)
    x = torch.randn(m, k).bfloat16()
    group = [Branch(*(torch.randn(*shape).bfloat16() for shape in ((n, k), (r, k), (n, r)))) for _ in range(2)]
    group[1].a.fill_(float("nan"))
    ours, spoiled = lowrank_group(x, group)
    assert ours.isfinite().all() and not spoiled.isfinite().any()


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_that_share_memory_are_clipped_accumulated_and_used_one_by_one(route, device):
    x, dys = inputs(device, torch.float32, 9)
    factors = []
    for forward in (
        lambda group: lowrank_group(x, group, scale=SCALE, route=route),
        lambda group: separately(x, group),
    ):
        group = branches(device, torch.float32)
        of_a = [branch.a for branch in group]
        optimizer = torch.optim.AdamW(of_a, lr=0.1)
        for _ in range(2):  # the second time into what is there, set to zero or not
            torch.autograd.backward(forward(group), dys, inputs=of_a)
            torch.nn.utils.clip_grad_norm_(of_a[1:2], 0.5)  # of one alone: the others' must stay
            assert all(a.grad.is_contiguous() for a in of_a)
            optimizer.step()
            of_a[0].grad.zero_()
        factors.append(of_a)
    for ours, theirs in zip(*factors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_one_mask_is_kept_and_x_by_reference(device):
    x, _ = inputs(device, torch.float32, 18)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lowrank_group(x, branches(device, torch.float32), dropout_p=0.5, seed=torch.tensor([1], device=device))
    assert [t.shape for t in kept if t.dtype == torch.uint8] == [(18, 5)]
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [x.data_ptr()]


def test_under_autocast_the_factors_are_rounded_once(device):
    x, dys = inputs(device, torch.float32, 12)
    group = branches(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        ys = lowrank_group(x, group, scale=SCALE)
        separate = [lf.lowrank_linear(x, b.weight, b.a, b.b, scale=SCALE, bias=b.bias) for b in group]
    for y, one in zip(ys, separate, strict=True):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, one, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(ys, leaves(x, group), [dy.bfloat16() for dy in dys])
    assert {g.dtype for g in grads} == {torch.float32}


def test_bad_input_is_told(device):
    x, _ = inputs(device, torch.float32, 4)
    group = branches(device, torch.float32)
    with pytest.raises(TypeError, match="x must be an ordinary tensor, not a list"):
        lowrank_group(x.tolist(), group)
    with pytest.raises(ValueError, match="serves single linears"):
        lowrank_group(x, group, route="reference")
    with pytest.raises(ValueError, match="must end in in_features"):
        lowrank_group(x[:, :7], group)
    with pytest.raises(TypeError, match="share one dtype"):
        lowrank_group(x, [group[0], Branch(group[1].weight, group[1].a.double(), group[1].b)])
    group[0].weight.requires_grad_()
    with pytest.raises(ValueError, match="must be frozen"):
        lowrank_group(x, group)


def test_each_direction_has_the_route_that_suits_it(monkeypatch):
    """A gated MLP on sm_90: wide outputs make the products with dy long."""
    target = Target(90, True)
    monkeypatch.setattr("lowrank_fused.routes.target_of", lambda device: target)
    shapes = [(14336, 16), (14336, 16)]
    found = choose_for_group("auto", 8192, 4096, shapes, torch.bfloat16, False, torch.device("cuda"))
    sizes = (8192, 2 * 14336, 4096, 32, torch.bfloat16, False, target, GROUP_ROUTES)
    assert found == (choose("forward", *sizes), choose("backward", *sizes)) and found[0] != found[1]


@pytest.mark.triton
@pytest.mark.parametrize(("route", "forward", "backward"), [("split", 4, 5), ("thin", 4, 4)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_launches(route, forward, backward, p, device):
    """q, k and v: one launch and one for each forward; one for each, one, and one for each backward, the library's
    three (thin) or two (split) of each way counted apart.
    """
    record = pytest.importorskip("lowrank_fused.kernels.launch").record
    x, dys = inputs(device, torch.float32, 6)
    group = branches(device, torch.float32)
    with record() as ahead:
        ys = lowrank_group(x, group, scale=SCALE, dropout_p=p, route=route)
    # On a GPU, backward runs in another thread otherwise, which nobody records.
    with record() as behind, torch.autograd.set_multithreading_enabled(False):
        torch.autograd.grad(ys, leaves(x, group), dys)
    assert (len(ahead), len(behind)) == (forward, backward)
    assert sum(launch.name.startswith("shrink") for launch in ahead) == 1
    assert sum(launch.name.startswith("x_factors") for launch in behind) == 1
