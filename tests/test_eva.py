"""EVA: the incremental decomposition against the whole one, the start of a model, and PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_fused as lf
from lowrank_fused.initializers.incremental_svd import IncrementalSVD, leading_directions
from lowrank_fused.training.eva import counted_tokens

IN = 40


def data(rows: int, features: int = IN, decay: float = 0.8, seed: int = 0, shift: float = 2.0) -> Tensor:
    """Rows whose variance falls off geometrically along random directions, around a mean that is not zero."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, features, generator=g, dtype=torch.float64)).Q
    spread = decay ** torch.arange(features, dtype=torch.float64)
    return (torch.randn(rows, features, generator=g, dtype=torch.float64) * spread) @ basis.T + shift


def lost(found: Tensor, exact: Tensor) -> float:
    """The sine of the largest angle between the row spaces of two orthonormal matrices."""
    return (found - found @ exact.T @ exact).norm(2).item()


# The decomposition


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sizes", [[200], [50] * 6, [7] * 40, [1] * 60, [3, 120, 1, 80]], ids=str)
def test_batches_add_up_to_the_whole(center, sizes):
    rows = data(sum(sizes))
    svd = IncrementalSVD(6, center=center)
    for batch in rows.split(sizes):
        svd.update(batch)
    whole = rows - rows.mean(0) if center else rows
    _, values, directions = torch.linalg.svd(whole, full_matrices=False)
    assert lost(svd.components, directions[:6]) < 0.02
    torch.testing.assert_close(svd.values, values[:6], rtol=0.01, atol=0)
    torch.testing.assert_close(svd.total, whole.square().sum().item(), rtol=1e-12, atol=0)
    torch.testing.assert_close(svd.ratios, values[:6].square() / values.square().sum(), rtol=0.02, atol=0)
    if center:
        torch.testing.assert_close(svd.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(svd.components @ svd.components.T, torch.eye(6, dtype=torch.float64))


def test_nothing_is_lost_while_everything_fits():
    rows = data(64, features=12)
    svd = IncrementalSVD(6)
    for batch in rows.split(9):
        svd.update(batch)
    _, values, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert lost(svd.components, directions[:6]) < 1e-10
    torch.testing.assert_close(svd.values, values[:6], rtol=1e-10, atol=0)


def test_similarity_says_when_directions_have_settled():
    svd = IncrementalSVD(4)
    rows = data(4000)
    svd.update(rows[:50])
    assert not svd.similarity.any()
    svd.update(rows[50:3000])
    assert svd.similarity.min() < 0.99
    svd.update(rows[3000:3010])
    assert svd.similarity.min() > 0.999


def test_a_large_stack_is_decomposed_without_touching_the_random_state():
    rows = data(300, features=200)
    state = torch.get_rng_state()
    values, directions = leading_directions(rows, 8)  # 200 > 8 · 8: subspace iteration
    again = leading_directions(rows, 8)[1]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(directions, again)
    _, exact_values, exact = torch.linalg.svd(rows, full_matrices=False)
    assert lost(directions[:4], exact[:4]) < 1e-3  # half, as the incremental decomposition keeps
    torch.testing.assert_close(values[:4], exact_values[:4], rtol=1e-5, atol=0)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_few_rows_and_no_rows_are_no_error():
    svd = IncrementalSVD(4)
    svd.update(torch.zeros(0, 9))
    assert svd.rows == 0
    svd.update(torch.randn(2, 9).bfloat16())
    assert svd.components.shape == (2, 9) and svd.components.dtype == torch.float32
    svd.update(torch.randn(8, 9))
    assert svd.components.shape == (4, 9)


# A model


class Attention(nn.Module):
    """q and k read the same tensor, the others each its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(IN, 24), nn.Linear(IN, 16)
        self.mix = nn.Linear(24, IN)
        self.out = nn.Linear(IN, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return self.out(self.drop(self.mix(q) + k.mean(-1, keepdim=True)))


def attention(dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(0)
    return Attention().to(dtype)


def batches(count: int = 12, rows: int = 60) -> list[Tensor]:
    return list(data(count * rows).view(count, 3, rows // 3, IN))


def test_a_is_the_leading_subspace_of_the_inputs_and_b_is_zero():
    plain = attention().eval()
    inputs: dict[str, list[Tensor]] = {"q": [], "mix": [], "out": []}
    for name, seen in inputs.items():
        plain.get_submodule(name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].detach()))
    for x in batches():
        plain(x)
    model = lf.inject(attention(), rank=4).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="had not settled to tau=1.0"):
        ranks = lf.initialize_eva(model, batches(), rho=1.0, tau=1.0)
    assert ranks == {"q": 4, "k": 4, "mix": 4, "out": 4}
    for name, seen in inputs.items():
        rows = torch.cat([x.flatten(0, 1) for x in seen])
        exact = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
        layer = model.get_submodule(name)
        assert lost(layer.lora_A.detach(), exact) < 0.02
        assert not layer.lora_B.any()
    assert torch.equal(model.q.lora_A, model.k.lora_A)
    # The same parameters as before, so that an optimiser made earlier still trains them.
    assert all(a is b for a, b in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True))
    x = batches()[0]
    assert torch.equal(model.eval()(x), plain(x))


def test_layers_that_share_an_input_are_decomposed_once(monkeypatch):
    updates = []
    update = IncrementalSVD.update
    monkeypatch.setattr(IncrementalSVD, "update", lambda self, rows: (updates.append(rows), update(self, rows)))
    model = lf.inject(attention(), rank=4)
    with pytest.warns(UserWarning, match="had not settled"):
        lf.initialize_eva(model, batches(3), rho=1.0, tau=1.0)
    assert len(updates) == 3 * 3  # three batches of three inputs for four layers


def test_it_stops_when_the_directions_have_settled():
    taken = []

    def stream():
        for x in batches(200):
            taken.append(x)
            yield x

    model = lf.inject(attention(), rank=2)
    lf.initialize_eva(model, stream(), rho=1.0, tau=0.99)
    assert 2 < len(taken) < 150


def test_ranks_go_where_a_direction_explains_more():
    model = lf.inject(attention(), rank=4, alpha=8)
    with pytest.warns(UserWarning, match="had not settled"):
        ranks = lf.initialize_eva(model, batches(), rho=2.0, tau=1.0)
    assert sum(ranks.values()) == 16 and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    plain, ratios = attention().eval(), {}
    for name in ranks:
        seen: list[Tensor] = []
        handle = plain.get_submodule(name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for x in batches():
                plain(x)
        handle.remove()
        rows = torch.cat([x.flatten(0, 1) for x in seen])
        variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
        ratios[name] = (variances / variances.sum())[:8]
    best = sorted(((ratio, name) for name, each in ratios.items() for ratio in each.tolist()), reverse=True)[:16]
    # Two layers with one input have equal ratios: between these the order is free.
    pooled = {"q": "qk", "k": "qk"}
    expected, got = (dict.fromkeys(("qk", "mix", "out"), 0) for _ in range(2))
    for _, name in best:
        expected[pooled.get(name, name)] += 1
    for name, rank in ranks.items():
        got[pooled.get(name, name)] += rank
    assert got == expected
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, lf.LowRankLinear) == (rank > 0)
        if rank:
            assert layer.rank == rank and layer.lora_A.shape[0] == layer.lora_B.shape[1] == rank
            assert layer.scaling == pytest.approx(2.0)
    assert torch.equal(model.eval()(batches()[0]), plain(batches()[0]))


def test_a_layer_without_rank_loses_its_adapter_and_the_rest_is_saved_and_loaded(tmp_path):
    """One input varies along a single direction: it needs no more, and what is left goes elsewhere."""

    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x) + self[1](torch.randn_like(x)) + self[2](x)

    def network() -> Two:
        torch.manual_seed(0)
        return Two(*(nn.Linear(IN, 6) for _ in range(3))).double()

    model = network()
    originals = list(model)
    lf.inject(model, rank=1, alpha=3, bias="lora_only")
    rows = list(data(600, decay=0.3, shift=0.0).split(50))
    ranks = lf.initialize_eva(model, rows, rho=2.0, tau=0.5, adjust_scaling=False)
    assert ranks == {"0": 2, "1": 0, "2": 1} or ranks == {"0": 1, "1": 0, "2": 2}
    assert model[1] is originals[1] and not model[1].weight.requires_grad
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.{name}" for layer in "02" for name in ("lora_A", "lora_B", "bias")
    }
    assert [model[i].scaling for i in (0, 2)] == [3.0 / model[i].rank for i in (0, 2)]
    lf.save_adapter(model, tmp_path)
    again = lf.load_adapter(network(), tmp_path)
    assert torch.equal(again[0].lora_A, model[0].lora_A) and again[2].rank == model[2].rank
    lf.remove(model)
    assert all(module is original for module, original in zip(model, originals, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_whitening_divides_by_the_root_of_the_singular_value():
    plain, white = (lf.inject(attention(), rank=3) for _ in range(2))
    for model, whiten in ((plain, False), (white, True)):
        lf.initialize_eva(model, batches(40), rho=1.0, tau=0.9, whiten=whiten)
    roots = white.q.lora_A.norm(dim=1)
    torch.testing.assert_close(white.q.lora_A / roots[:, None], plain.q.lora_A)
    assert roots[0] < roots[1] < roots[2]


def test_without_centring_the_mean_comes_first():
    model = lf.inject(attention(), rank=2)
    lf.initialize_eva(model, batches(40), rho=1.0, center=False)
    mean = torch.cat([x.flatten(0, 1) for x in batches(40)]).mean(0)
    assert (model.q.lora_A[0] @ mean / mean.norm()).abs() > 0.99


def test_only_counted_tokens_count():
    x, keep = torch.randn(4, 9, IN), torch.rand(4, 9) < 0.5
    poisoned = torch.where(keep[..., None], x, 1e6)
    models = [lf.inject(nn.Sequential(nn.Linear(IN, 8)), rank=3) for _ in range(2)]
    for model, values in zip(models, (x, poisoned), strict=True):
        lf.initialize_eva(model, [values] * 2, rho=1.0, keep=lambda batch: keep)
    torch.testing.assert_close(models[0][0].lora_A, models[1][0].lora_A)


def test_padding_and_ignored_labels_do_not_count():
    mask, ids = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.ones(2, 3, dtype=torch.long)
    labels = torch.tensor([[-100, 5, -100], [1, -100, 2]])
    assert counted_tokens({"input_ids": ids}).all()
    assert torch.equal(counted_tokens({"input_ids": ids, "attention_mask": mask}), mask.bool())
    both = counted_tokens({"attention_mask": mask, "labels": labels})
    assert torch.equal(both, torch.tensor([[False, True, False], [True, False, True]]))
    assert torch.equal(counted_tokens({"attention_mask": mask, "labels": torch.tensor([0, 1])}), mask.bool())
    assert counted_tokens(torch.ones(3)) is None and counted_tokens({"pixel_values": torch.ones(3)}) is None


@pytest.mark.parametrize(
    ("adapters", "settings", "error", "says"),
    [
        ({}, {"batches": []}, ValueError, "there are no batches"),
        ({}, {"rho": 0.5}, ValueError, "rho must be at least 1"),
        ({}, {"tau": 1.5}, ValueError, "tau in"),
        ({}, {"batches": [torch.randn(2, 1, IN)]}, ValueError, "tokens are too few"),
        ({"init_lora_weights": "pissa"}, {}, lf.UnsupportedError, "q has a residual start"),
        ({"method": "loldu"}, {}, lf.UnsupportedError, "q has method 'loldu'"),
        ({}, {"forward": lambda model, batch: 1 / 0}, ZeroDivisionError, "division"),
    ],
)
def test_a_failure_changes_nothing(adapters, settings, error, says):
    model = lf.inject(attention(torch.float32), rank=4, **adapters).train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    given = {"batches": [x.float() for x in batches(2)], **settings}
    with pytest.raises(error, match=says):
        lf.initialize_eva(model, **given)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert model.q.training and not model.drop.training and model.q.enabled
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_merged_adapters_are_refused():
    model = lf.merge(lf.inject(attention(), rank=4))
    with pytest.raises(lf.UnsupportedError, match="are merged"):
        lf.initialize_eva(model, batches())


def test_a_layer_that_no_token_reaches_keeps_its_start():
    model = attention()
    model.spare = nn.Linear(IN, 8).double()
    lf.inject(model, rank=4)
    start = model.spare.lora_A.clone()
    with pytest.warns(UserWarning, match="no token reached 1 layers, which keep their start: spare"):
        ranks = lf.initialize_eva(model, batches(40), rho=1.5, tau=0.9)
    assert ranks["spare"] == 4 and model.spare.rank == 4
    assert sum(ranks.values()) == 20
    assert start.shape == model.spare.lora_A.shape and not model.spare.lora_B.any()


def test_dora_starts_so_too():
    model = lf.inject(attention(), method="dora", rank=4)
    x = batches()[0]
    expected = attention().eval()(x)
    lf.initialize_eva(model, batches(40), tau=0.9)
    torch.testing.assert_close(model.eval()(x), expected)
    assert not model.q.lora_B.any()


# PEFT


def llama() -> nn.Module:
    """A small Llama whose embeddings vary along some directions more than along others, as trained ones do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10 * 0.75 ** torch.arange(32))
    return model


def token_batches(count: int) -> list[dict[str, Tensor]]:
    """Random text that repeats itself, with padding, and prompts whose labels are ignored."""
    g = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 64, (16, 10), generator=g)
        mask = torch.ones_like(ids)
        mask[::2, 8:] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_subspaces_and_ranks_are_pefts(rho):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    eva = peft.EvaConfig(rho=rho, tau=0.99)
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(**settings, init_lora_weights="eva", eva_config=eva, task_type="CAUSAL_LM")
    )
    loader = token_batches(60)
    peft.initialize_lora_eva_weights(theirs, loader, show_progress_bar=False)
    ours = lf.inject(llama(), **settings)
    ranks = lf.initialize_eva(ours, loader, rho=rho, tau=0.99)
    known = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    differences = []
    for path, rank in ranks.items():
        their_rank = known[path].r["default"] if path in known else 0
        differences.append(abs(rank - their_rank))
        if rank and their_rank:
            a, b = ours.get_submodule(path).lora_A.detach(), known[path].lora_A["default"].weight.detach()
            # The last directions are nearly as strong as the first that were left out, and each side's own choice.
            assert lost(a[:2], b) < 0.15, path
            assert ours.get_submodule(path).scaling == pytest.approx(known[path].scaling["default"])
    assert sum(ranks.values()) == 4 * 14
    assert max(differences) <= (0 if rho == 1 else 1)


def test_what_it_made_is_loaded_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = lf.inject(llama(), r=4, lora_alpha=8, target_modules="all-linear")
    ranks = lf.initialize_eva(model, token_batches(40), tau=0.9)
    assert len(set(ranks.values())) > 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lf.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    batch = token_batches(1)[0]
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits)
