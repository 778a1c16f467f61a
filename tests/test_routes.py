"""The chooser is a pure function; a route asked for by name works or raises; launches per route are as stated."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_fused import UnsupportedError, lowrank_add, lowrank_linear, ops
from lowrank_fused.operands import routes_for
from lowrank_fused.routes import GROUP_ROUTES, ROUTES, choose, implementation, unavailable
from lowrank_fused.routes.problem import Options
from lowrank_fused.target import CPU, Target
from lowrank_fused.testing import Operands

H100, A100, B200 = (Target(arch, has_triton=True) for arch in (90, 80, 100))
BF16 = torch.bfloat16


def chosen(m, n, k, r=16, dtype=BF16, dropout=False, target=H100) -> tuple[str, str]:
    return tuple(choose(d, m, n, k, r, dtype, dropout, target) for d in ("forward", "backward"))


def test_cpu_is_served_by_the_library():
    assert chosen(2048, 4096, 4096, target=CPU) == ("addmm", "addmm")
    assert chosen(2048, 4096, 4096, target=Target(90, has_triton=False)) == ("addmm", "addmm")


def test_the_inner_dimension_decides_between_thin_and_split():
    # Break-even of the traffic model: e = 1 / (1 + 263 / inner) is 0.94 at 4096 and 0.98 at 14336; the prior is 0.96.
    assert chosen(8192, 4096, 4096) == ("split", "split")
    assert chosen(8192, 4096, 14336)[0] == "thin"
    assert chosen(8192, 14336, 4096) == ("split", "thin")
    # Where Triton's GEMM is further behind, thin wins at 4096 already.
    assert chosen(8192, 4096, 4096, target=B200) == ("thin", "thin")


def test_few_columns_and_ranks_are_worth_a_forward_pass_of_one_launch():
    """While n is well below ρ times the columns of a block over r, 4208 on an H100 for rank 16: k and v projections."""
    assert chosen(8192, 1024, 4096) == ("single", "split")
    assert chosen(8192, 1024, 4096, r=64)[0] == "split"
    assert chosen(8192, 512, 4096, r=64)[0] == "single" and chosen(8192, 512, 4096, r=65)[0] == "split"
    assert chosen(8192, 1024, 4096, dropout=True)[0] == "split"  # every block of columns would draw the mask again
    for_group = choose("forward", 8192, 1024, 4096, 16, BF16, False, H100, among=GROUP_ROUTES)
    assert for_group in GROUP_ROUTES and "single" not in GROUP_ROUTES


# The linears of a Llama-3-8B block as (N, K); and the tokens from which on another pair of routes is chosen, rank 16.
LINEARS = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}
CHANGES = {
    (80, False, "q, o"): {1: "single split", 142: "split split", 149: "split thin", 208: "thin thin"},
    (80, False, "k, v"): {1: "single split", 1373: "thin split"},
    (80, False, "gate, up"): {1: "single split", 127: "split split", 142: "split thin", 150: "thin thin"},
    (80, False, "down"): {1: "single split", 130: "split split", 145: "split thin", 146: "thin thin"},
    (80, True, "q, o"): {1: "single split", 43: "split split", 149: "split thin", 208: "thin thin"},
    (80, True, "k, v"): {1: "single split", 59: "split split", 830: "thin split"},
    (80, True, "gate, up"): {1: "single split", 40: "split split", 142: "split thin", 150: "thin thin"},
    (80, True, "down"): {1: "single split", 40: "split split", 145: "split thin", 146: "thin thin"},
    (90, False, "q, o"): {1: "single split", 2168: "split split"},
    (90, False, "k, v"): {1: "single split"},
    (90, False, "gate, up"): {1: "single split", 270: "split split", 280: "split thin"},
    (90, False, "down"): {1: "single split", 598: "thin split"},
    (90, True, "q, o"): {1: "single split", 91: "split split"},
    (90, True, "k, v"): {1: "single split", 148: "split split"},
    (90, True, "gate, up"): {1: "single split", 79: "split split", 280: "split thin"},
    (90, True, "down"): {1: "single split", 80: "split split", 577: "thin split"},
    (100, False, "q, o"): {1: "single split", 210: "single thin", 738: "thin thin"},
    (100, False, "k, v"): {1: "single split", 8334: "thin split"},
    (100, False, "gate, up"): {1: "single split", 190: "split split", 196: "split thin", 227: "thin thin"},
    (100, False, "down"): {1: "single split", 203: "single thin", 216: "split thin", 219: "thin thin"},
    (100, True, "q, o"): {1: "single split", 76: "split split", 210: "split thin", 720: "thin thin"},
    (100, True, "k, v"): {1: "single split", 155: "split split", 2879: "thin split"},
    (100, True, "gate, up"): {1: "single split", 59: "split split", 196: "split thin", 227: "thin thin"},
    (100, True, "down"): {1: "single split", 60: "split split", 203: "split thin", 219: "thin thin"},
}


@pytest.mark.parametrize(("arch", "dropout", "linears"), CHANGES)
def test_routes_of_a_block_from_one_token_to_many(arch, dropout, linears):
    """Few tokens take few launches; where routes are as good as one another, one token more changes the choice."""
    changes, shape = CHANGES[arch, dropout, linears], LINEARS[linears]
    for first, routes in changes.items():
        assert " ".join(chosen(first, *shape, dropout=dropout, target=Target(arch, True))) == routes
    for tokens in {*(2**power for power in range(15)), *(first - 1 for first in changes)} - {0}:
        expected = changes[max(first for first in changes if first <= tokens)]
        assert " ".join(chosen(tokens, *shape, dropout=dropout, target=Target(arch, True))) == expected, tokens


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("shape", LINEARS.values())
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_more_tokens_never_take_fewer_launches(arch, shape, dropout):
    launches = {"single": 1, "split": 2, "thin": 3, "addmm": 4}
    forward = [chosen(tokens, *shape, dropout=dropout, target=Target(arch, True))[0] for tokens in range(1, 20000, 97)]
    counts = [launches[route] for route in forward]
    assert counts == sorted(counts) and (dropout or counts[0] == 1)


def test_ranks_that_do_not_fit_take_two_launches():
    assert chosen(16, 4096, 4096, r=64)[0] == "single"
    assert chosen(16, 4096, 4096, r=65)[0] == "split"


def test_the_chooser_knows_gpus_as_the_roofline_does():
    from lowrank_fused import routes
    from lowrank_fused.roofline.gpus import GPUS

    firsts = {gpu.arch: gpu for gpu in reversed(GPUS.values())}
    for arch, gpu in firsts.items():
        assert routes._PEAK[arch] == gpu.peak and routes._GEMM_EFFICIENCY[arch] == gpu.efficiency
        assert routes._BALANCE[arch] == round(gpu.balance)


@pytest.mark.parametrize("call", ["linear", "add"])
def test_compiled_graphs_choose_by_the_tokens_they_run_on(call, monkeypatch):
    """One graph for any number of them."""
    asked, graphs, compiled = [], [], []

    def chooses(direction, m, n, k, r, *rest):
        asked.append((direction, m, n, k, r))
        return "addmm"

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(ops, "choose", chooses)
    w, a, b = torch.randn(6, 8), torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def run(x: torch.Tensor) -> torch.Tensor:
        if call == "linear":
            return lowrank_linear(x, w, a, b, dropout_p=0.25)
        return lowrank_add(x @ w.t(), x, a, b, dropout_p=0.25)

    for tokens in (10, 300, 9000, 16):
        run(torch.randn(1, tokens, 8)).sum().backward()
        assert asked == [("forward", tokens, 6, 8, 2), ("backward", tokens, 6, 8, 2)]
        asked.clear()
        compiled.append(len(graphs))
    assert compiled[0] == compiled[-1]


@pytest.mark.parametrize("target", [A100, H100, B200, Target(89, True), Target(120, True), Target(103, True)])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 64), (512, 1024, 4096), (8192, 14336, 4096), (77, 999, 1001)])
def test_always_names_a_route(target, dropout, shape):
    assert set(chosen(*shape, dropout=dropout, target=target)) <= set(ROUTES)


def test_what_kernels_do_not_serve_goes_to_the_library():
    assert chosen(0, 64, 64) == ("addmm", "addmm")
    assert chosen(8192, 4096, 4096, r=512) == ("addmm", "addmm")
    assert chosen(8192, 4096, 4096, dtype=torch.float32) == ("addmm", "addmm")
    assert chosen(8192, 4096, 4096, dtype=torch.float64) == ("addmm", "addmm")


def test_unavailable_says_why(monkeypatch):
    cpu = torch.device("cpu")
    assert unavailable("addmm", cpu, torch.float64) is None
    assert "choose auto or one of" in unavailable("fast", cpu, BF16)
    assert "float64" in unavailable("thin", cpu, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CUDA" in unavailable("split", cpu, BF16)
    with pytest.raises(UnsupportedError, match="CUDA"):
        implementation("split", torch.zeros(2, 2))
    o = Operands.random(4, 5, 6, 2)
    with pytest.raises(UnsupportedError, match="route 'split' cannot run"):
        routes_for(o.x, (5, 6), o.a, o.b, 0.0, "split")


class CountProducts(TorchDispatchMode):
    """Counts the library GEMMs in which both x-sized and W-sized operands meet."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.storage = weight.untyped_storage().data_ptr()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += any(
                isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() == self.storage for t in args
            )
        return function(*args, **(kwargs or {}))


# route: kernels forward, library GEMMs forward, kernels backward, library GEMMs backward
LAUNCHES = {
    "split": (["shrink", "lowrank_forward"], 0, ["dy_factors", "x_factors", "grad_input"], 0),
    "single": (["single_forward"], 0, ["dy_factors", "x_factors", "grad_input"], 0),
    "thin": (["shrink", "expand"], 1, ["dy_factors", "x_factors"], 1),
}


@pytest.mark.triton
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("core", ["none", "diag"])
@pytest.mark.parametrize("route", LAUNCHES)
def test_launches(route, core, p):
    """Two launches forward and three backward (split), one and three (single); three and three with one library GEMM
    each way (thin).
    """
    from lowrank_fused.kernels.launch import record

    o = Operands.random(150, 70, 90, 4, core=core, device="cuda" if torch.cuda.is_available() else "cpu")
    x, a, b, d = (None if t is None else t.detach() for t in (o.x, o.a, o.b, o.core))
    seed = torch.tensor([3], device=x.device) if p else None
    options = Options(0.5, core, p, True, True, True, core != "none", False)
    engine = implementation(route, x)
    forward, forward_products, backward, backward_products = LAUNCHES[route]
    with record() as launches, CountProducts(o.weight) as counter:
        _, saved = engine.forward(x, o.weight, a, b, d, None, seed, options)
    assert [launch.name for launch in launches] == forward
    assert counter.products == forward_products
    with record() as launches, CountProducts(o.weight) as counter:
        engine.backward(o.dy, x, o.weight, a, b, d, saved, options)
    assert [launch.name for launch in launches] == backward
    assert counter.products == backward_products


@pytest.mark.triton
@pytest.mark.parametrize(("core", "r"), [("dense", 4), ("gate", 4), ("diag", 65), ("none", 64)])
def test_single_is_split_where_s_does_not_fit_beside_a_tile(core, r):
    from lowrank_fused.kernels.launch import record

    device = "cuda" if torch.cuda.is_available() else "cpu"
    o = Operands.random(20, 24, 40, r, core=core, dtype=torch.float16, device=device)
    x, a, b, d = (None if t is None else t.detach() for t in (o.x, o.a, o.b, o.core))
    options = Options(0.5, core, 0.0, True, True, True, core != "none", False)
    with record() as launches:
        implementation("single", x).forward(x, o.weight, a, b, d, None, None, options)
    fits = core in ("none", "diag") and r <= 64
    assert [launch.name for launch in launches] == (["single_forward"] if fits else ["shrink", "lowrank_forward"])
