"""CoLA: what it is equal to, what each pairing computes, and what a random pairing must not break."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_fused as lf
from lowrank_fused.initializers.pissa import pissa
from lowrank_fused.methods.collaborative import STRATEGIES
from lowrank_fused.routes import ROUTES

IN, OUT, RANK, ALPHA = 24, 18, 4, 8
RANDOM = ("random", "random_reversed")
PAPER = {
    (2, 3): [(0, 0), (1, 1), (1, 2)],
    (4, 10): [(0, 0), (1, 1), (2, 2), *((3, j) for j in range(3, 10))],
    (1, 3): [(0, j) for j in range(3)],
    (3, 3): [(i, i) for i in range(3)],
}
CODE = {
    (2, 3): [(0, 0), (1, 1), (0, 2)],
    (4, 10): [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 6), (3, 7), (0, 8), (1, 9)],
    (1, 3): [(0, j) for j in range(3)],
    (3, 3): [(i, i) for i in range(3)],
}


def make(dtype: torch.dtype = torch.float64, moved: bool = True, seed: int = 0, **options) -> lf.LowRankLinear:
    torch.manual_seed(seed)
    settings = {"method": "collaborative", "rank": RANK, "alpha": ALPHA, **options}
    layer = lf.LowRankLinear.from_linear(nn.Linear(IN, OUT, dtype=dtype), **settings)
    if moved:
        with torch.no_grad():
            layer.cola_A.add_(0.2 * torch.randn_like(layer.cola_A))
            layer.cola_B.add_(0.2 * torch.randn_like(layer.cola_B))
    return layer


def delta(layer: lf.LowRankLinear, pairs: list[tuple[int, int]]) -> Tensor:
    """s · Σ B_j A_i over the given pairs."""
    a, b = layer.cola_A.chunk(layer.cola_num_A), layer.cola_B.chunk(layer.cola_num_B, dim=1)
    return layer.scaling * sum(b[j] @ a[i] for i, j in pairs)


def drawn(layer: lf.LowRankLinear, seed: int) -> list[tuple[int, int]]:
    """The pairs that a training call makes after manual_seed(seed)."""
    torch.manual_seed(seed)
    if layer.cola_strategy == "random":
        return list(enumerate(torch.randint(layer.cola_num_B, (layer.cola_num_A,)).tolist()))
    return [(i, j) for j, i in enumerate(torch.randint(layer.cola_num_A, (layer.cola_num_B,)).tolist())]


# Which pairs


@pytest.mark.parametrize(("name", "expected"), [("heuristic", PAPER), ("heuristic_code", CODE)])
@pytest.mark.parametrize("numbers", PAPER)
def test_a_heuristic_makes_the_pairs_of_its_source(name, expected, numbers):
    layer = make(strategy=name, num_A=numbers[0], num_B=numbers[1])
    x = torch.randn(5, IN, dtype=torch.float64)
    right = F.linear(x, layer.weight + delta(layer, expected[numbers]), layer.bias)
    torch.testing.assert_close(layer(x), right, rtol=1e-12, atol=1e-12)


def test_paper_and_code_agree_only_where_every_a_or_b_stands_alone():
    for m, n in itertools.combinations_with_replacement(range(1, 7), 2):
        paper, code = (make(strategy=s, num_A=m, num_B=n).cola_pairs.tolist() for s in ("heuristic", "heuristic_code"))
        assert (paper == code) == (m == 1 or m == n), (m, n)


@pytest.mark.parametrize("strategy", RANDOM)
@pytest.mark.parametrize("numbers", [(2, 3), (4, 2), (3, 3), (1, 4), (4, 1)])
def test_a_random_pairing_is_drawn_anew_in_training_and_stays_in_evaluation(strategy, numbers):
    layer = make(strategy=strategy, num_A=numbers[0], num_B=numbers[1])
    x = torch.randn(3, IN, dtype=torch.float64)
    seen = set()
    for seed in range(40):
        pairs = drawn(layer, seed)
        seen.add(tuple(pairs))
        torch.manual_seed(seed)
        right = F.linear(x, layer.weight + delta(layer, pairs), layer.bias)
        torch.testing.assert_close(layer(x), right, rtol=1e-12, atol=1e-12)
    choices = numbers[1] if strategy == "random" else numbers[0]
    assert (len(seen) > 3) == (choices > 1)
    layer.eval()
    first = layer(x)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), first) and torch.equal(torch.get_rng_state(), state)
    expected = layer.method.reference(x, layer.weight, layer.bias, layer)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", RANDOM)
def test_every_partner_is_as_likely(strategy):
    layer = make(strategy=strategy, num_A=3, num_B=4)
    counts = torch.zeros(3, 4)
    for seed in range(1200):
        for i, j in drawn(layer, seed):
            counts[i, j] += 1
    mean = 1200 / (4 if strategy == "random" else 3)
    assert ((counts - mean).abs() < 5 * mean**0.5).all()


@pytest.mark.parametrize("strategy", RANDOM)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_recompute_makes_the_same_pairs(strategy, use_reentrant, dropout):
    layer = make(strategy=strategy, num_A=3, num_B=4, dropout=dropout)
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    for seed in range(20):
        found = []
        for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
            torch.manual_seed(seed)
            y = run(x)
            torch.rand(7)  # whatever else draws between forward and recompute
            leaves = [x, layer.cola_A, layer.cola_B]
            for leaf in leaves:
                leaf.grad = None
            y.square().sum().backward()
            found.append([y, *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("strategy", RANDOM)
def test_a_random_pairing_compiles(strategy):
    layer = make(torch.float32, strategy=strategy, num_A=3, num_B=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN)
    outputs = []
    for seed in range(6):
        torch.manual_seed(seed)
        y = compiled(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(y, layer(x))
        outputs.append(y.detach())
    assert len({y.sum().item() for y in outputs}) > 1


@pytest.mark.parametrize("strategy", RANDOM)
def test_only_the_factors_of_the_drawn_pairs_learn(strategy):
    layer = make(strategy=strategy, num_A=2, num_B=5)
    x = torch.randn(5, IN, dtype=torch.float64)
    pairs = drawn(layer, 3)
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    for stacked, used in ((layer.cola_A.grad.chunk(2), {i for i, _ in pairs}),
                          (layer.cola_B.grad.chunk(5, dim=1), {j for _, j in pairs})):  # fmt: skip
        assert [bool(part.any()) for part in stacked] == [k in used for k in range(len(stacked))]


@pytest.mark.parametrize("strategy", RANDOM)
def test_the_pairing_of_evaluation_is_saved(strategy, tmp_path):
    options = {"method": "collaborative", "strategy": strategy, "num_A": 6, "num_B": 9, "rank": 2}
    model, other = (lf.inject(nn.Sequential(nn.Linear(IN, OUT)), **options) for _ in range(2))
    lf.save_adapter(model, tmp_path)
    assert not torch.equal(other[0].cola_pairs, model[0].cola_pairs)
    lf.load_adapter(other, tmp_path)
    assert torch.equal(other[0].cola_pairs, model[0].cola_pairs)


def test_a_random_pairing_refuses_to_merge_the_others_merge_as_they_pair():
    for strategy in STRATEGIES:
        layer = make(strategy=strategy, num_A=2, num_B=5)
        if strategy in RANDOM:
            with pytest.raises(lf.UnsupportedError, match=f"strategy '{strategy}' pairs factors anew"):
                layer.merge()
            continue
        pairs = list(itertools.product(range(2), range(5)))
        pairs = {"heuristic": [(0, 0), *((1, j) for j in range(1, 5))],
                 "heuristic_code": [(0, 0), (0, 1), (1, 2), (1, 3), (0, 4)]}.get(strategy, pairs)  # fmt: skip
        expected = layer.weight + delta(layer, pairs)
        layer.merge()
        torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-12)
    model = lf.inject(nn.Sequential(nn.Linear(IN, OUT)), method="collaborative", strategy="random")
    with pytest.raises(lf.UnsupportedError, match="^0: strategy 'random'"):
        lf.merge(model)


# The start


@pytest.mark.parametrize("energy_consistent", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("numbers", [(1, 1), (1, 3), (2, 3), (2, 5), (4, 10)])
def test_the_start_keeps_the_declared_share_of_the_principal_part(strategy, energy_consistent, numbers):
    m, n = numbers
    pairs = {"full": m * n, "random": m}.get(strategy, n)
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(linear.weight.detach())
    principal = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    options = {"strategy": strategy, "num_A": m, "num_B": n, "energy_consistent": energy_consistent}
    layer = lf.LowRankLinear.from_linear(linear, method="collaborative", rank=RANK, alpha=ALPHA, **options)
    torch.testing.assert_close(layer.weight, linear.weight - principal, rtol=0, atol=1e-12)
    share = 1.0 if energy_consistent else pairs / (m * n)
    x = torch.randn(5, IN, dtype=torch.float64)
    right = F.linear(x, linear.weight - (1 - share) * principal, linear.bias)
    for _ in range(3):  # whatever is drawn
        torch.testing.assert_close(layer(x), right, rtol=0, atol=1e-12)
    declared = lf.methods.differs_at_start("collaborative", options)
    assert (declared is None) == (share == 1.0)
    assert declared is None or f"{pairs}/{m * n} of W" in declared
    layer.enabled = False
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("energy_consistent", [False, True])
def test_the_factors_are_the_published_ones(energy_consistent):
    layer = make(moved=False, num_A=2, num_B=3, energy_consistent=energy_consistent)
    a, b = pissa(layer._replaced[0].weight.detach(), RANK, ALPHA / RANK)
    by = (6**0.5, 6**0.5) if energy_consistent else (2, 3)
    for part in layer.cola_A.chunk(2):
        torch.testing.assert_close(part, a / by[0], rtol=1e-14, atol=0)
    for part in layer.cola_B.chunk(3, dim=1):
        torch.testing.assert_close(part, b / by[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_a_and_one_b_is_pissa(strategy):
    layer = make(moved=False, strategy=strategy, num_A=1, num_B=1)
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    lora = lf.LowRankLinear.from_linear(linear, rank=RANK, alpha=ALPHA, init_lora_weights="pissa")
    assert torch.equal(layer.weight, lora.weight)
    assert torch.equal(layer.cola_A, lora.lora_A) and torch.equal(layer.cola_B, lora.lora_B)
    x = torch.randn(5, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), lora(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_factor_shares_memory_with_another(strategy, dtype):
    layer = make(dtype, moved=False, strategy=strategy, num_A=3, num_B=4, autocast_adapter_dtype=False)
    factors = [*layer.cola_A.chunk(3), *layer.cola_B.chunk(4, dim=1)]
    for tensor in (layer.cola_A, layer.cola_B):
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    before = [factor.detach().clone() for factor in factors]
    for k, factor in enumerate(factors):
        with torch.no_grad():
            factor.add_(1)
        changed = [not torch.equal(now, was) for now, was in zip(factors, before, strict=True)]
        assert changed == [i == k for i in range(7)]
        with torch.no_grad():
            factor.copy_(before[k])


def test_other_starts_that_take_their_values_out_of_w():
    for name in ("olora", "pissa_niter_8"):
        layer = make(moved=False, init_lora_weights=name, num_A=2, num_B=3)
        x = torch.randn(5, IN, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer._replaced[0](x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_A": 0}, "num_A must be a positive integer, got 0"),
        ({"num_B": 2.0}, "num_B must be a positive integer, got 2.0"),
        ({"num_A": True}, "num_A must be a positive integer, got True"),
        ({"strategy": "greedy"}, "strategy must be one of full, random, .*, got 'greedy'"),
        ({"strategy": "heuristic", "num_A": 4}, "needs num_A <= num_B, or some A would have no B; got 4 and 3"),
        ({"strategy": "heuristic_code", "num_A": 4}, "needs num_A <= num_B"),
        ({"init_lora_weights": "kaiming"}, "must take its values out of W"),
    ],
)
def test_bad_options_are_refused_with_the_reason(options, says):
    with pytest.raises(ValueError, match=says):
        lf.AdapterConfig("collaborative", **options)


# Full collaboration


def test_full_under_adamw_is_lora_on_the_sums_with_scaled_rates():
    m, n, lr = 2, 3, 1e-3
    layer = make(moved=False, num_A=m, num_B=n)
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    lora = lf.LowRankLinear.from_linear(linear, rank=RANK, alpha=ALPHA, init_lora_weights="pissa")
    optimizers = [
        torch.optim.AdamW([layer.cola_A, layer.cola_B], lr=lr, weight_decay=0.0),
        torch.optim.AdamW(
            [{"params": [lora.lora_A], "lr": m * lr}, {"params": [lora.lora_B], "lr": n * lr}], weight_decay=0.0
        ),
    ]
    start = lora.lora_A.detach().clone()
    for step in range(50):
        torch.manual_seed(100 + step)
        x, target = torch.randn(16, IN, dtype=torch.float64), torch.randn(16, OUT, dtype=torch.float64)
        for network, optimizer in zip((layer, lora), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(network(x), target).backward()
            optimizer.step()
    sums = layer.cola_A.view(m, RANK, IN).sum(0), layer.cola_B.view(OUT, n, RANK).sum(1)
    torch.testing.assert_close(sums[0], lora.lora_A, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums[1], lora.lora_B, rtol=0, atol=1e-12)
    assert (lora.lora_A - start).abs().max() > 10 * lr


def test_full_gives_all_a_the_same_gradient_and_all_b():
    layer = make(num_A=3, num_B=4)
    layer(torch.randn(6, IN, dtype=torch.float64)).square().sum().backward()
    for parts in (layer.cola_A.grad.chunk(3), layer.cola_B.grad.chunk(4, dim=1)):
        assert parts[0].any()
        assert all(torch.equal(part, parts[0]) for part in parts)


# Work


class CountOps(TorchDispatchMode):
    """Every operator that computes or allocates something; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not aliases:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def ops_of(run) -> list[str]:
    with CountOps() as counter:
        run()
    return counter.names


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ten_launches_serve_four_a_and_ten_b(strategy, training):
    """The published code needs 161."""
    layer = make(torch.float32, strategy=strategy, num_A=4, num_B=10, rank=2).train(training)
    x = torch.randn(5, IN)
    first = ops_of(lambda: layer(x))
    assert 0 < len(first) <= 10, first


def test_full_costs_what_lora_costs_and_one_operator_a_step_each_way():
    layer = make(torch.float32, num_A=4, num_B=10)
    lora = lf.LowRankLinear.from_linear(nn.Linear(IN, OUT), rank=RANK)
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)

    def forward_and_backward(layer):
        leaves = [getattr(layer, name) for name in layer.trained_names]
        return ops_of(lambda: layer(x)), ops_of(lambda: torch.autograd.grad(layer(x), leaves, dy))

    plain, trained = forward_and_backward(lora)
    (first, found), (again, _) = forward_and_backward(layer), forward_and_backward(layer)
    assert again == plain
    assert sorted(first) == sorted([*plain, "lowrank_fused.sum_blocks.default"])
    assert sorted(found) == sorted([*trained, "lowrank_fused.repeat_blocks.default"])
    single = make(torch.float32, num_A=1, num_B=10)
    assert len(ops_of(lambda: single(x))) == len(plain) + 1


@pytest.mark.triton
@pytest.mark.parametrize("route", [r for r in ROUTES if r in ("thin", "split")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_see_one_pair_of_factors(strategy, route, device):
    """As many kernels as for plain LoRA, at rank r for full and M·r for the others."""
    from lowrank_fused.kernels.launch import record

    layer = make(torch.float32, strategy=strategy, num_A=2, num_B=3).to(device)
    x = torch.randn(9, IN, device=device)
    terms = layer.method.terms(layer, layer.matrix, x)
    assert terms.core is None
    assert terms.a.shape[0] == terms.b.shape[1] == (RANK if strategy == "full" else 2 * RANK)
    with record() as launches:
        lf.lowrank_linear(x, layer.matrix, terms.a, terms.b, scale=terms.scale, route=route)
    assert [launch.name for launch in launches] == ["shrink", "expand" if route == "thin" else "lowrank_forward"]


def test_many_a_and_few_b_run_at_the_rank_of_the_fewer():
    layer = make(strategy="random", num_A=5, num_B=2).eval()
    terms = layer.method.terms(layer, layer.matrix, torch.empty(0, IN, dtype=torch.float64))
    assert terms.a.shape[0] == terms.b.shape[1] == 2 * RANK


@pytest.mark.parametrize("strategy", ["random", "heuristic"])
def test_autocast_does_not_round_the_sums(strategy):
    layer = make(torch.float32, strategy=strategy).eval()
    x = torch.randn(0, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = layer.method.terms(layer, layer.matrix, x)
    assert terms.b.dtype == torch.float32
    plain = layer.method.terms(layer, layer.matrix, x)
    assert torch.equal(terms.b, plain.b)
