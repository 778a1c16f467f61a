"""act(A W) and the gradient of A: the kernel, whatever its strips and chunks, and the operators above it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowrank_fused import lowrank_linear, lowrank_linear_ref
from lowrank_fused.factors import activations, weight_factor
from lowrank_fused.testing import Operands, assert_as_accurate_as_torch, integer_operand
from lowrank_fused.tools.flops import FORMULAS

SHAPES = [
    # N, K, R, rows per chunk
    pytest.param(64, 128, 16, 32, id="aligned"),
    pytest.param(33, 65, 17, 16, id="one-over"),
    pytest.param(31, 63, 15, 16, id="one-under"),
    pytest.param(37, 53, 7, 64, id="one-chunk"),
    pytest.param(40, 1, 3, 16, id="one-column"),
    pytest.param(1, 40, 1, 16, id="one-row"),
    pytest.param(48, 20, 64, 16, id="rank-64"),
    pytest.param(40, 40, 150, 16, id="rank-blocks"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUSED = weight_factor.FUSED

kernel_test = pytest.mark.triton
poisoned = pytest.mark.usefixtures("poisoned")


def small_tile(r: int):
    from lowrank_fused.kernels.launch import Tile

    return Tile(block_n=16, block_k=32, block_r=min(64, max(16, 1 << (r - 1).bit_length())))


def launch(a: Tensor, dh: Tensor, w: Tensor, activation: str, **how) -> dict[str, Tensor]:
    """h, what is kept for backward, and da from the kernel."""
    from lowrank_fused.kernels import weight_factor as kernel

    h, slope = kernel.weight_factor(a, w, activation=activation, **how)
    da = kernel.weight_factor_grad(dh, slope if slope.numel() else h, w, activation=activation, **how)
    return {"h": h, "slope": slope, "da": da}


def by_autograd(a: Tensor, dh: Tensor, w: Tensor, activation: str) -> dict[str, Tensor]:
    """The same by PyTorch, in the dtype of its operands."""
    z = (a @ w).requires_grad_()
    h = activations.activation(activation)(z)
    (slope,) = torch.autograd.grad(h, z, torch.ones_like(h), retain_graph=True)
    return {"h": h.detach(), "slope": slope, "da": (dh * slope) @ w.t()}


def laid_out(w: Tensor, layout: str) -> Tensor:
    """The same values, their rows or their columns in one piece, or neither."""
    if layout == "columns":
        return w.t().contiguous().t()
    if layout == "sliced":
        wide = w.new_full((2 * w.shape[0], w.shape[1] + 3), float("nan"))
        wide[::2, 2:-1] = w
        return wide[::2, 2:-1]
    return w


@kernel_test
@poisoned
@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "r", "rows"), SHAPES)
def test_integers_come_out_exactly(n, k, r, rows, dtype, activation, device):
    a = integer_operand(r, n, low=-1, high=1).to(device)
    dh = integer_operand(r, k, low=-1, high=1).to(device)
    w = integer_operand(n, k, low=-1, high=1, dtype=dtype).to(device)
    got = launch(a, dh, w, activation, tile=small_tile(r), chunk_rows=rows)
    exact = by_autograd(a.double(), dh.double(), w.double(), activation)
    assert torch.equal(got["h"], exact["h"].float()) and torch.equal(got["da"], exact["da"].float())
    assert got["slope"].numel() == 0


@kernel_test
@poisoned
@pytest.mark.parametrize("layout", ["columns", "sliced"])
def test_any_strides(layout, device):
    a, dh, w = (integer_operand(*shape).to(device) for shape in ((5, 40), (5, 70), (40, 70)))
    got = launch(a, dh, laid_out(w, layout), "relu", tile=small_tile(5), chunk_rows=16)
    exact = by_autograd(a, dh, w, "relu")
    assert torch.equal(got["h"], exact["h"]) and torch.equal(got["da"], exact["da"])


@kernel_test
@poisoned
@pytest.mark.parametrize("size", [0.3, 3.0], ids=["small", "large"])
@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_torch(dtype, activation, size, device):
    n, k, r = 83, 70, 9
    g = torch.Generator().manual_seed(0)
    a, dh = (torch.randn(r, c, generator=g).to(device, dtype) for c in (n, k))
    w = (size * n**-0.5 * torch.randn(n, k, generator=g)).to(device, dtype)
    got = launch(a, dh, w, activation, tile=small_tile(r), chunk_rows=32)
    plain = by_autograd(a, dh, w, activation)
    # relu's slope jumps: the exact gradient is that of the signs which forward found.
    z = a.double() @ w.double()
    exact = by_autograd(a.double(), dh.double(), w.double(), activation)
    if activation == "relu":
        exact["da"] = (dh.double() * (got["h"] > 0)) @ w.double().t()
    size_of = {"h": a.double().abs() @ w.double().abs(), "da": dh.double().abs() @ w.double().abs().t()}
    for name in ("h", "da"):
        assert_as_accurate_as_torch(got[name], plain[name], exact[name], f"{activation} {name}", size_of[name])
    if got["slope"].numel():
        assert_as_accurate_as_torch(got["slope"], plain["slope"], exact["slope"], "slope", size_of["h"] + z.abs())


@kernel_test
def test_sine_and_cosine_are_good_for_any_argument_a_product_gives(device):
    z = torch.cat([torch.linspace(-size, size, 4001) for size in (1.0, 1e2, 3e4)]).to(device)[None]
    got = launch(torch.ones(1, 1, device=device), torch.ones_like(z), z, "sin")
    for ours, exact in ((got["h"], z.double().sin()), (got["slope"], z.double().cos())):
        assert (ours.double() - exact).abs().max() <= 1.2e-7


@kernel_test
def test_a_nan_stays_one(device):
    w = torch.zeros(3, 4, device=device)
    w[1, 2] = float("nan")
    for activation in FUSED:
        h = launch(torch.ones(2, 3, device=device), torch.ones(2, 4, device=device), w, activation)["h"]
        assert torch.equal(h.isnan(), w.isnan().any(0).expand(2, 4)), activation


@kernel_test
def test_tile_and_chunks_change_only_the_order_of_sums(device):
    a, dh, w = (integer_operand(*shape).to(device) for shape in ((5, 70), (5, 90), (70, 90)))
    default, small = launch(a, dh, w, "relu"), launch(a, dh, w, "relu", tile=small_tile(5), chunk_rows=16)
    assert torch.equal(default["h"], small["h"]) and torch.equal(default["da"], small["da"])


@kernel_test
@poisoned
def test_twice_the_same_bits_and_counters_left_at_zero(device, monkeypatch):
    import lowrank_fused.kernels.weight_factor as module

    made = []
    zeroed = module.zeroed_counters
    monkeypatch.setattr(module, "zeroed_counters", lambda *a: made.append(zeroed(*a)) or made[-1])
    a, dh, w = (torch.randn(*shape, device=device) for shape in ((5, 70), (5, 90), (70, 90)))
    first, second = (launch(a, dh, w, "gelu", tile=small_tile(5), chunk_rows=16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(made) == 4 and not any(counters.any() for counters in made)


@kernel_test
def test_declared_traffic(device):
    from lowrank_fused.kernels.launch import record

    a, dh = torch.ones(8, 64, device=device), torch.ones(8, 128, device=device)
    w = torch.ones(64, 128, device=device, dtype=torch.float16)
    with record() as launches:
        launch(a, dh, w, "gelu", tile=small_tile(8), chunk_rows=32)
    forward, backward = launches
    parts = 4 * 2 * 8 * 128
    assert forward.bytes_read == w.nbytes + a.nbytes + parts and forward.bytes_written == 2 * dh.nbytes + parts
    parts = 4 * 4 * 8 * 64
    assert backward.bytes_read == w.nbytes + 2 * dh.nbytes + parts and backward.bytes_written == a.nbytes + parts
    assert forward.flops == backward.flops == 2 * 8 * 64 * 128


@kernel_test
@pytest.mark.parametrize("activation", FUSED)
def test_the_operator_is_the_same_on_kernels_and_on_the_library(activation, device, monkeypatch):
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(weight_factor, "_uses_kernels", lambda w, answer=kernels: answer)
        g = torch.Generator().manual_seed(1)
        a = torch.randn(4, 24, generator=g).to(device).requires_grad_()
        w = (0.2 * torch.randn(24, 40, generator=g)).to(device, torch.bfloat16)
        h = weight_factor.weight_factor(a, w, activation)
        (da,) = torch.autograd.grad(h, a, h.detach().t().contiguous().t())
        results.append((h.detach(), da))
    (h, da), (kernel_h, kernel_da) = results
    # The library rounds z to 16 bits, the kernel does not.
    torch.testing.assert_close(kernel_h, h, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(kernel_da, da, rtol=2**-6, atol=2**-4)


def test_both_sides_know_the_same_activations():
    pytest.importorskip("triton")
    from lowrank_fused.kernels import weight_factor as kernel

    assert kernel.ACTIVATIONS == FUSED
    assert [kernel.keeps_slope(name) for name in FUSED] == [weight_factor._keeps_slope(name) for name in FUSED]


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("activation", [*FUSED, "tanh"])
def test_gradient_in_float64(activation, layout):
    a = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    w = laid_out(torch.randn(7, 9, dtype=torch.float64), layout)
    assert torch.autograd.gradcheck(lambda a: weight_factor.weight_factor(a, w, activation), (a,))


@pytest.mark.parametrize("name", activations.activation_names())
def test_every_activation_by_name(name):
    a, w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, 6, dtype=torch.float64)
    expected = activations.activation(name)(a @ w)
    got = weight_factor.weight_factor(a, w, name)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(h, a, torch.ones_like(h))[0] for h in (got, expected)]
    torch.testing.assert_close(*grads)


def test_names_mean_what_transformers_means():
    known = pytest.importorskip("transformers.activations").ACT2FN
    z = torch.linspace(-12, 12, 97)
    for name in set(activations.activation_names()) - {"sin"}:
        torch.testing.assert_close(activations.activation(name)(z), known[name](z), rtol=1e-5, atol=1e-6, msg=name)
    own_values = {"prelu", "xielu"}
    assert set(known) - own_values == set(activations.activation_names()) - {"sin"}


def test_a_new_activation_has_to_be_elementwise_and_new(monkeypatch):
    monkeypatch.setattr(activations, "_ACTIVATIONS", dict(activations._ACTIVATIONS))
    activations.add_activation("cube", lambda z: z**3)
    a, w = torch.randn(3, 5), torch.randn(5, 6)
    torch.testing.assert_close(weight_factor.weight_factor(a, w, "cube"), (a @ w) ** 3)
    with pytest.raises(ValueError, match="'cube' exists already"):
        activations.add_activation("cube", torch.relu)
    with pytest.raises(ValueError, match="elementwise"):
        activations.add_activation("sum", lambda z: z.sum(0))


@pytest.mark.parametrize("activation", FUSED)
def test_opcheck(activation):
    a, w = torch.randn(4, 7, requires_grad=True), torch.randn(9, 7).t()
    torch.library.opcheck(weight_factor.weight_factor_op, (a, w, activation))
    h, slope = weight_factor.weight_factor_op(a.detach(), w, activation)
    kept = slope if slope.numel() else h
    torch.library.opcheck(weight_factor.weight_factor_grad_op, (torch.randn(4, 9), kept, w, activation))


def test_backward_masks_with_the_signs_that_forward_found():
    """Sums that cancel to rounding noise: whatever sign they got, value and mask agree, and A W is not formed again."""
    g = torch.Generator().manual_seed(0)
    half = torch.randn(4, 300, generator=g)
    a = torch.cat([half, -half[:, torch.randperm(300, generator=g)]], 1).requires_grad_()
    w = torch.ones(600, 50)
    h = weight_factor.weight_factor(a, w)
    assert 0 < (h > 0).sum() < h.numel() and h.max() < 1e-3, "no noise: this proves nothing"
    dh = integer_operand(4, 50, generator=g)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        (da,) = torch.autograd.grad(h, a, dh)
    assert torch.equal(da, (dh * (h > 0)) @ w.t())
    assert counter.get_total_flops() == 2 * 4 * 600 * 50


def test_autocast_does_not_round_it():
    a, w = torch.randn(4, 30, requires_grad=True), torch.randn(30, 20)
    expected = torch.autograd.grad(weight_factor.weight_factor(a, w).sum(), a)
    with torch.autocast("cpu", torch.bfloat16):
        h = weight_factor.weight_factor(a, w)
        assert torch.equal(h, weight_factor.weight_factor(a.detach(), w)) and h.dtype == torch.float32
        assert torch.equal(torch.autograd.grad(h.sum(), a)[0], expected[0])


def test_mistakes_are_named():
    a, w = torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"a must be \[rank, 4\] to match w \[4, 3\], got \[2, 3\]"):
        weight_factor.weight_factor(a, w.t())
    with pytest.raises(ValueError, match="unknown activation 'rellu'; did you mean 'relu'"):
        weight_factor.weight_factor(a, w, "rellu")
    with pytest.raises(TypeError, match=r"got torch.float32 and torch.float16"):
        weight_factor.weight_factor(a.half(), w)
    with pytest.raises(ValueError, match="w must be frozen"):
        weight_factor.weight_factor(a, w.clone().requires_grad_())
    with pytest.raises(ValueError, match="a is on meta"):
        weight_factor.weight_factor(a.to("meta"), w)
    a.requires_grad_()
    (da,) = torch.autograd.grad(weight_factor.weight_factor(a, w, "sin").square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError):
        da.sum().backward()


@pytest.mark.parametrize("trained", [("x", "a", "b", "core"), ("x", "b"), ("a",), ("b",), ("core",)], ids=str)
@pytest.mark.parametrize("core", ["none", "diag", "dense", "gate"])
def test_flop_formulas_are_the_products_of_the_plain_formula(core, trained):
    """The formula of each operator against what PyTorch counts in the reference and its autograd."""
    o = Operands.random(12, 20, 28, 4, core=core)
    for name, leaf in o.leaves().items():
        leaf.requires_grad_(name in trained)
    if not o.leaves():
        pytest.skip("there is no such core")

    def count(linear: Callable[..., Tensor]) -> tuple[int, int]:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as forward:
            y = linear(o.x, o.weight, o.a, o.b, **o.arguments())
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as backward:
            torch.autograd.grad(y, list(o.leaves().values()), o.dy)
        return forward.get_total_flops(), backward.get_total_flops()

    forward, backward = count(lowrank_linear_ref)
    # Of s and v = s Cᵀ the engine keeps s alone.
    again = 2 * 12 * 5 * 4 if core == "dense" and "b" in trained else 0
    assert count(lowrank_linear) == (forward, backward + again)
