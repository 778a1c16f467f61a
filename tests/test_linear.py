"""lowrank_linear: values and every gradient on every route, what it keeps, and how it lives with PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lowrank_fused import Gate, UnsupportedError, lowrank_linear
from lowrank_fused.routes.addmm import forms_weight
from lowrank_fused.routes.problem import Options
from lowrank_fused.testing import Operands, check_against_float64, integer_operand

LIBRARY_ROUTES = ["reference", "addmm"]
KERNEL_ROUTES = ["thin", "split", "single"]
ROUTES = [*LIBRARY_ROUTES, *(pytest.param(r, marks=pytest.mark.triton) for r in KERNEL_ROUTES)]
CORES = ["none", "diag", "dense", "gate"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("route", ROUTES)
def test_as_accurate_as_torch(route, core, p, dtype, device):
    operands = Operands.random(37, 29, 43, 5, core=core, dtype=dtype, vectors=("bias", "out", "col"), device=device)
    check_against_float64(operands, route=route, dropout_p=p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("route", ROUTES)
def test_fp32_adapters_beside_16_bit_x(route, core, dtype, device):
    operands = Operands.random(33, 24, 40, 4, core=core, dtype=dtype, adapter_dtype=torch.float32, device=device)
    check_against_float64(operands, route=route, dropout_p=0.25)


# (m, n, k, r): ranks that fill no tile, a rank as large as the matrix, primes, one token.
SHAPES = [(33, 65, 17, 9), (64, 65, 63, 17), (31, 37, 41, 37), (70, 15, 130, 8), (1, 48, 64, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_shapes(route, shape, device):
    check_against_float64(Operands.random(*shape, vectors=("bias",), device=device), route=route, dropout_p=0.2)


@pytest.mark.parametrize("subset", ["all", "only x", "all but x"])
@pytest.mark.parametrize("core", CORES)
def test_many_tokens_at_a_high_rank(core, subset, device):
    """Where the library route forms the weight, forward and backward; with a gate it must not."""
    o = Operands.random(90, 40, 45, 64, core=core, vectors=("bias",), device=device)
    options = Options(o.scale, core, 0.0, *[True] * 5)
    assert (
        forms_weight(90, 45, 64, o.x.dtype, options) and forms_weight(90, 40, 64, o.x.dtype, options) or core == "gate"
    )
    for name, leaf in o.leaves().items():
        leaf.requires_grad_(subset == "all" or (name == "x") == (subset == "only x"))
    check_against_float64(o, route="addmm")


def test_sixteen_bit_weights_are_never_formed(device):
    """Each element of B A is below half a unit in the last place of W, and yet their sum over K shows."""
    x, weight = torch.ones(200, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[:, 0], weight[:, 1] = 1, -1
    a, b = torch.zeros(64, 64), torch.zeros(64, 64)
    a[0, :2], b[:, 0] = 1, 2.0**-10
    y = lowrank_linear(x.to(device), weight.to(device), a.to(device), b.to(device), route="addmm")
    assert (y == 2 * 2.0**-10).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("route", ROUTES)
def test_small_integers_are_exact(route, core, dtype, device):
    check_exact(Operands.random(19, 11, 21, 3, core=core, dtype=dtype, device=device, make=ternary), route)


def ternary(*shape, generator):
    """Mostly zeros, some ±1."""
    occupied = integer_operand(*shape, low=0, high=9, generator=generator).eq(0)
    return occupied * integer_operand(*shape, low=-1, high=1, generator=generator)


def check_exact(operands: Operands, route: str) -> None:
    """Every partial sum is an integer that the dtype holds, so a route must agree with float64 bit for bit."""
    for name in ("weight", "a", "b", "core"):
        tensor = getattr(operands, name)
        if tensor is not None:
            tensor.data.sign_()
    operands.scale = 2.0
    exact = operands.to(torch.float64).run_ref()
    for name, value in operands.run(route=route).items():
        assert torch.equal(value.double(), exact[name]), name


@pytest.mark.parametrize("layout", ["linear", "conv1d", "sliced"])
@pytest.mark.parametrize("route", ROUTES)
def test_weight_layouts(route, layout, device):
    operands = Operands.random(20, 24, 32, 4, device=device)
    n, k = operands.weight.shape
    if layout == "conv1d":
        operands.weight = operands.weight.t().contiguous().t()
    elif layout == "sliced":
        wide = torch.full((2 * n, 2 * k), torch.nan, device=device)
        wide[::2, ::2] = operands.weight
        operands.weight = wide[::2, ::2]
    check_against_float64(operands, route=route, dropout_p=0.2)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("view", ["rank 1", "rank 4", "transposed", "sliced", "expanded"])
def test_x_of_any_rank_and_stride(route, view, device):
    o = Operands.random(24, 10, 16, 3, device=device)
    base = torch.randn(2, 3, 4, 16, device=device)
    x = {
        "rank 1": base[0, 0, 0],
        "rank 4": base,
        "transposed": base.transpose(0, 2),
        "sliced": torch.randn(2, 3, 32, device=device)[..., ::2],
        "expanded": base[:, :1].expand(2, 5, 4, 16),
    }[view].detach().requires_grad_()  # fmt: skip
    y = lowrank_linear(x, o.weight, o.a, o.b, route=route)
    flat = lowrank_linear(x.reshape(-1, 16), o.weight, o.a, o.b, route=route)
    assert y.shape == (*x.shape[:-1], 10)
    assert torch.equal(y.reshape(-1, 10), flat)
    dy = torch.randn_like(y)
    dx, da = torch.autograd.grad(y, (x, o.a), dy)
    dx_flat, da_flat = torch.autograd.grad(flat, (x, o.a), dy.reshape(-1, 10))
    assert torch.equal(dx, dx_flat) and torch.equal(da, da_flat)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(route, shape, device):
    o = Operands.random(1, 10, 16, 3, device=device)
    x = torch.empty(*shape, 16, device=device, requires_grad=True)
    y = lowrank_linear(x, o.weight, o.a, o.b, route=route, dropout_p=0.5)
    assert y.shape == (*shape, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not o.a.grad.any() and not o.b.grad.any()


LEAVES = ("x", "a", "b", "core", "bias")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("core", ["none", "diag"])
def test_every_subset_of_gradients(route, core, device):
    o = Operands.random(12, 10, 16, 3, core=core, vectors=("bias",), device=device)
    leaves = [name for name in LEAVES if getattr(o, name) is not None]
    seed = torch.tensor([5], device=device)
    full = o.run(route=route, dropout_p=0.3, seed=seed)
    for count in range(len(leaves)):
        for wanted in itertools.combinations(leaves, count):
            for name in leaves:
                getattr(o, name).requires_grad_(name in wanted)
            part = o.run(route=route, dropout_p=0.3, seed=seed)
            assert set(part) == {"y", *(f"d{name}" for name in wanted)}
            for name, value in part.items():
                torch.testing.assert_close(value, full[name], rtol=1e-5, atol=1e-5)


def restrided(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same leaf in another layout: rows apart, every other column of a parent, or column by column.

    Gaps hold zeros, because PyTorch's own bf16 products on a CPU, the standard here, read them.
    """
    rows, columns = t.shape
    if layout == "rows apart":
        view = torch.zeros(rows, columns + 3, dtype=t.dtype, device=t.device)[:, :columns]
    elif layout == "sliced":
        view = torch.zeros(2 * rows, 2 * columns, dtype=t.dtype, device=t.device)[::2, ::2]
    else:
        view = torch.zeros(columns, rows, dtype=t.dtype, device=t.device).t()
    return view.copy_(t.detach()).requires_grad_(t.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_what_lies_between_rows_is_never_read(route, dtype, device):
    o = Operands.random(23, 19, 29, 8, dtype=dtype, device=device)
    seed = torch.tensor([3], device=device)
    expected = o.run(route=route, dropout_p=0.3, seed=seed)
    for name in ("x", "weight", "a", "b", "dy"):
        t = getattr(o, name)
        gaps = torch.full((t.shape[0], t.shape[1] + 3), float("nan"), dtype=dtype, device=device)[:, : t.shape[1]]
        setattr(o, name, gaps.copy_(t.detach()).requires_grad_(t.requires_grad))
    for name, value in o.run(route=route, dropout_p=0.3, seed=seed).items():
        torch.testing.assert_close(value, expected[name])


@st.composite
def calls(draw: st.DrawFn, smallest: int, largest: int, **options) -> Operands:
    """Operands of any shape, strides, core, dtype and subset of gradients."""
    n, k = draw(st.integers(smallest, largest), "n"), draw(st.integers(smallest, largest), "k")
    operands = Operands.random(
        draw(st.integers(smallest, largest), "m"),
        n,
        k,
        draw(st.integers(smallest, min(n, k)), "r"),
        core=draw(st.sampled_from(CORES), "core"),
        seed=draw(st.integers(0, 99), "seed"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        device="cuda" if torch.cuda.is_available() else "cpu",
        **options,
    )
    for name in draw(st.sets(st.sampled_from(sorted(operands.leaves()))), "frozen"):
        getattr(operands, name).requires_grad_(False)
    for name in draw(st.sets(st.sampled_from(["x", "weight", "a", "b", "dy"])), "restrided"):
        layout = draw(st.sampled_from(["rows apart", "sliced", "transposed"]), "layout")
        setattr(operands, name, restrided(getattr(operands, name), layout))
    return operands


any_dropout = st.sampled_from([0.0, 0.1, 0.7])
library_route, kernel_route = st.sampled_from(LIBRARY_ROUTES), st.sampled_from(KERNEL_ROUTES)


@settings(max_examples=40)
@given(calls(8, 40, vectors=("bias", "out", "col")), library_route, any_dropout)
def test_any_call_of_the_library_routes(operands, route, p):
    check_against_float64(operands, route=route, dropout_p=p)


@settings(max_examples=40)
@given(calls(1, 40, make=ternary), library_route)
def test_any_integer_call_of_the_library_routes(operands, route):
    check_exact(operands, route)


@pytest.mark.triton
@settings(max_examples=12)
@given(calls(8, 80, vectors=("bias",)), kernel_route, any_dropout)
def test_any_call_of_the_kernel_routes(operands, route, p):
    check_against_float64(operands, route=route, dropout_p=p)


@pytest.mark.triton
@settings(max_examples=12)
@given(calls(1, 80, make=ternary), kernel_route)
def test_any_integer_call_of_the_kernel_routes(operands, route):
    check_exact(operands, route)


@pytest.mark.parametrize("route", ROUTES)
def test_all_routes_draw_the_same_mask(route, device):
    """With A = B = 1 on one rank and W = 0, dx is zero exactly where an element was dropped."""
    m, k = 33, 50
    x = torch.ones(m, k, device=device, requires_grad=True)
    a, b = torch.ones(1, k, device=device), torch.ones(4, 1, device=device)
    seed = torch.tensor([123], device=device)
    y = lowrank_linear(x, torch.zeros(4, k, device=device), a, b, dropout_p=0.3, seed=seed, route=route)
    (dx,) = torch.autograd.grad(y.sum(), x)
    reference = lowrank_linear(x, torch.zeros(4, k, device=device), a, b, dropout_p=0.3, seed=seed, route="reference")
    (expected,) = torch.autograd.grad(reference.sum(), x)
    assert torch.equal(dx != 0, expected != 0)
    assert 0.6 < (dx != 0).float().mean() < 0.8
    # The forward saw the same elements: y counts them.
    torch.testing.assert_close(y[:, 0], (dx != 0).sum(1) / 0.7)


@pytest.mark.parametrize("route", ROUTES)
def test_p_0_is_no_dropout_and_keeps_the_generator(route, device):
    o = Operands.random(9, 10, 16, 3, device=device)
    state = torch.get_rng_state()
    assert torch.equal(
        lowrank_linear(o.x, o.weight, o.a, o.b, dropout_p=0.0, route=route),
        lowrank_linear(o.x, o.weight, o.a, o.b, route=route),
    )
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_checkpointing_redraws_the_mask(route, use_reentrant, device):
    o = Operands.random(9, 10, 16, 3, device=device)

    def layer(x):
        return lowrank_linear(x, o.weight, o.a, o.b, dropout_p=0.4, route=route).relu()

    def gradients(run):
        torch.manual_seed(3)
        for leaf in (o.x, o.a, o.b):
            leaf.grad = None
        run(o.x).square().sum().backward()
        return [leaf.grad.clone() for leaf in (o.x, o.a, o.b)]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(g, h) for g, h in zip(plain, again, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("route", ROUTES)
def test_compiles_to_one_graph(route, p, device):
    o = Operands.random(9, 10, 16, 3, core="diag", vectors=("bias", "out", "col"), device=device)
    seed = torch.tensor([4], device=device) if p else None
    eager = o.run(route=route, dropout_p=p, seed=seed)
    # aot_eager traces forward and backward as Inductor does, without waiting for a C++ compiler.
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend="aot_eager")
    y = compiled(o.x, o.weight, o.a, o.b, **o.arguments(), dropout_p=p, seed=seed, route=route)
    leaves = o.leaves()
    for name, g in zip(leaves, torch.autograd.grad(y, list(leaves.values()), o.dy), strict=True):
        assert torch.equal(g, eager[f"d{name}"]), name
    assert torch.equal(y, eager["y"])


def test_compiled_dropout_draws_anew_and_inductor_runs_it(device):
    o = Operands.random(64, 32, 64, 4, device=device)
    compiled = torch.compile(lowrank_linear, fullgraph=True)

    def step():
        y = compiled(o.x, o.weight, o.a, o.b, dropout_p=0.5)
        return y.detach(), torch.autograd.grad(y, (o.x, o.a), o.dy)

    torch.manual_seed(0)
    first, first_grads = step()
    second, _ = step()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    again, again_grads = step()
    assert torch.equal(first, again)
    assert all(torch.equal(g, h) for g, h in zip(first_grads, again_grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_autocast(route, dtype, device):
    o = Operands.random(20, 24, 32, 4, vectors=("bias",), device=device)
    with torch.autocast(device, dtype=dtype):
        y = lowrank_linear(o.x, o.weight, o.a, o.b, bias=o.bias, route=route)
        assert y.dtype == dtype
        # A backward that runs inside the context must not have its fp32 sums rounded either.
        inside = torch.autograd.grad(y, (o.x, o.a, o.b, o.bias), o.dy.to(dtype), retain_graph=True)
    outside = torch.autograd.grad(y, (o.x, o.a, o.b, o.bias), o.dy.to(dtype))
    low = Operands.random(20, 24, 32, 4, vectors=("bias",), dtype=dtype, adapter_dtype=torch.float32, device=device)
    low.bias = o.bias
    low.scale = 1.0
    expected = low.run(route=route)
    assert torch.equal(y, expected["y"])
    for name, g, h in zip(("x", "a", "b", "bias"), inside, outside, strict=True):
        assert g.dtype == getattr(o, name).dtype == torch.float32
        assert torch.equal(g, h)
        assert torch.equal(g, expected[f"d{name}"].float())


@pytest.mark.parametrize("route", ROUTES)
def test_no_grad_records_nothing(route, device):
    o = Operands.random(9, 10, 16, 3, device=device)
    with torch.no_grad():
        y = lowrank_linear(o.x, o.weight, o.a, o.b, route=route)
    assert not y.requires_grad
    torch.testing.assert_close(y, lowrank_linear(o.x, o.weight, o.a, o.b, route=route))


def test_second_derivatives_raise():
    o = Operands.random(9, 10, 16, 3)
    y = lowrank_linear(o.x, o.weight, o.a, o.b)
    (dx,) = torch.autograd.grad(y.square().sum(), o.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_gradcheck_of_the_library_routes():
    for route, core in itertools.product(LIBRARY_ROUTES, CORES):
        o = Operands.random(4, 5, 6, 2, core=core, dtype=torch.float64, vectors=("bias", "out", "col"))
        leaves = o.leaves()
        seed = torch.tensor([8])

        def call(*values, o=o, names=tuple(leaves), route=route, seed=seed):
            named = dict(zip(names, values, strict=True))
            core = named.get("core")
            return lowrank_linear(
                named["x"], o.weight, named["a"], named["b"], scale=0.5,
                core=Gate(core) if o.is_gate else core, out=named["out"], col=named["col"], bias=named["bias"],
                dropout_p=0.3, seed=seed, route=route,
            )  # fmt: skip

        assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_does_not_write_into_its_inputs():
    o = Operands.random(9, 10, 16, 3, vectors=("bias",))
    for route in LIBRARY_ROUTES:
        before = {name: leaf.detach().clone() for name, leaf in o.leaves().items()}
        dy = o.dy.clone()
        o.run(route=route, dropout_p=0.4, seed=torch.tensor([1]))
        assert all(torch.equal(before[name], leaf) for name, leaf in o.leaves().items())
        assert torch.equal(dy, o.dy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0] * 16), TypeError, "x must be an ordinary tensor, not a list"),
        (dict(x=torch.randn(3, 15)), ValueError, r"x must end in in_features = 16"),
        (dict(a=torch.randn(16, 3)), ValueError, r"\[rank, 16\], got \[16, 3\]; did you pass its transpose"),
        (dict(b=torch.randn(3, 10)), ValueError, r"\[10, rank\], got \[3, 10\]; did you pass its transpose"),
        (dict(b=torch.randn(10, 4)), ValueError, r"a has rank 3 but b has rank 4"),
        (dict(weight=torch.randn(10)), ValueError, r"weight must be \[out_features, in_features\]"),
        (dict(weight=torch.randn(10, 16, requires_grad=True)), ValueError, "weight must be frozen"),
        (dict(weight=torch.randn(10, 16).half()), TypeError, "must share one floating dtype"),
        (dict(a=torch.randn(3, 16).half()), TypeError, "a must be torch.float32"),
        (dict(core=torch.randn(2)), ValueError, r"a diag core must be \[3\], got \[2\]"),
        (dict(core=torch.randn(2, 3)), ValueError, r"a dense core must be \[3, 3\], got \[2, 3\]"),
        (dict(core=Gate(torch.randn(9, 2))), ValueError, "a gate must have a row per token"),
        (dict(core="diag"), TypeError, "core must be None, a vector"),
        (dict(bias=torch.randn(9)), ValueError, r"bias must be \[out_features\] = \[10\], got \[9\]"),
        (dict(out=torch.randn(3)), ValueError, r"out must be"),
        (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
        (dict(route="fastest"), ValueError, "unknown route 'fastest'"),
        (dict(a=torch.randn(0, 16), b=torch.randn(10, 0)), ValueError, "rank must be at least 1"),
        (dict(bias=torch.randn(10, device="meta")), ValueError, "bias is on meta but x is on cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(change, error, message):
    arguments = dict(x=torch.randn(9, 16), weight=torch.randn(10, 16), a=torch.randn(3, 16), b=torch.randn(10, 3))
    with pytest.raises(error, match=message):
        lowrank_linear(**arguments | change)


def test_a_kernel_route_that_cannot_run_raises():
    o = Operands.random(4, 5, 6, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="float64"):
        lowrank_linear(o.x, o.weight, o.a, o.b, route="split")
