"""Layers that share x: found by watching, the same numbers as single layers, and everything around them as before."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_fused as lf
from lowrank_fused import grouping
from lowrank_fused.branches import Branch, lowrank_group
from lowrank_fused.grouping import GROUP, Call, group_of

WIDTH = 12


class Attention(nn.Module):
    """What q, k and v are called with can be changed from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, n) for n in (12, 6, 6))
        self.source = self.calls = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x if self.source is None else self.source
        if self.calls == "q":
            return self.q_proj(x)
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], -1).tanh()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 20), nn.Linear(24, 20), nn.Linear(20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, recomputed in backward by `mode`: "reentrant", "saved" or None."""

    def __init__(self, mode: str | None = None) -> None:
        super().__init__()
        self.attention, self.mlp, self.mode = Attention(), Mlp(), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode is None:
            return x + self.mlp(self.attention(x))
        return x + checkpoint(lambda x: self.mlp(self.attention(x)), x, use_reentrant=self.mode == "reentrant")


def adapted(mode: str | None = None, dropout: float = 0.0, **settings) -> nn.Sequential:
    """Two blocks in float64 with LoRA that does something."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(mode), Block(mode)).double()
    settings = {"method": "lora", "rank": 3, "dropout": dropout, "target_modules": "all-linear", **settings}
    lf.inject(model, lf.AdapterConfig(**settings))
    for parameter in trained(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def accelerated_attention() -> nn.Module:
    """An accelerated PEFT model of one attention block in float64."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(Attention().double(), config)
    lf.accelerate(model)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def data() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()


def settle(model: nn.Module) -> None:
    """A pass without gradients: nothing can be recomputed, so what it shows applies at once."""
    with torch.no_grad():
        model(data())


def steps(model: nn.Module, count: int = 3, micro_batches: int = 2) -> list[torch.Tensor]:
    """Losses and the gradients of the last step, AdamW between."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    found, x = [], data()
    for _ in range(count):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            loss = model(x).square().mean()
            loss.backward()
        found.append(loss.detach())
        optimizer.step()
    return [*found, *(p.grad for p in trained(model)), x.grad]


def states(model: nn.Module) -> set[str]:
    return {row[3] for row in lf.group(model).rows}


@pytest.mark.parametrize("mode", [None, "reentrant", "saved"])
def test_training_is_what_it_was(mode):
    """With micro-batches and both kinds of checkpointing, watched from the first step on."""
    single, grouped = adapted(mode), adapted(mode)
    lf.group(grouped)
    for ours, theirs in zip(steps(grouped), steps(single), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert states(grouped) == {"share x: q_proj, k_proj, v_proj", "share x: gate_proj, up_proj"}
    assert all(group_of(block.attention.q_proj).shared > 0 for block in grouped)


def test_a_pass_without_gradients_between_forward_and_backward_changes_nothing_under_way():
    """As a reference model's pass does in DPO: what is recomputed afterwards has to be what was."""
    model = adapted("saved")
    lf.group(model)
    loss = model(data()).square().mean()
    settle(model)
    loss.backward()
    assert states(model) == {"from the next optimiser step on"}
    torch.optim.SGD(trained(model), lr=0.0).step()
    settle(model)
    assert states(model) == {"share x: q_proj, k_proj, v_proj", "share x: gate_proj, up_proj"}


def test_peft_models_are_grouped_by_accelerate_and_keep_their_losses():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    theirs = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules="all-linear"))
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours)
    losses = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        ids, losses[name] = torch.arange(40).view(2, 20), []
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], abs=1e-5)
    rows = lf.group(ours).rows
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("LlamaAttention", 2, "share x: q_proj, k_proj, v_proj"),
        ("LlamaMLP", 2, "share x: gate_proj, up_proj"),
    ]
    assert "gate_proj, up_proj: one pass over x for all, 8 times" in lf.explain(ours).notes
    assert [(row.path, row.reason, row.calls) for row in lf.explain(ours).rows] == [("fused", "", 5 * 2 * 7)]
    lf.restore(ours)
    assert not any(GROUP in module.__dict__ for module in ours.modules())
    lf.accelerate(ours, groups=False)
    assert not any(GROUP in module.__dict__ for module in ours.modules())


def projected(model: nn.Module, autocast: bool) -> list[torch.Tensor]:
    """q, k, v of a bf16 model, with x in fp32 under autocast as a norm returns it; gradients of x and the factors."""
    layers = [model.get_submodule(f"base_model.model.{name}_proj") for name in "qkv"]
    x = data().detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ys = [layer(x) for layer in layers]
    torch.manual_seed(3)
    dys = [torch.randn_like(y) for y in ys]
    return [*ys, *torch.autograd.grad(ys, [x, *trained(model)], dys)]


@pytest.mark.parametrize(
    ("autocast", "precision", "route"),
    [(True, "match", "auto"), (True, "fast", "auto"), (False, "match", "precise"), (False, "fast", "auto")],
)
def test_fp32_adapters_of_a_bf16_model_are_grouped(autocast, precision, route, monkeypatch):
    """PEFT as shipped. Under autocast it rounds A and B itself; outside of it they stay what they are, unless asked."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(Attention().bfloat16(), config)
    assert {p.dtype for p in trained(theirs)} == {torch.float32}
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours, precision=precision)
    projected(ours, autocast)  # shows what is called with what
    torch.optim.SGD(trained(ours), lr=0.0).step()
    calls = []

    def spy(*args, **settings):
        calls.append(settings["route"])
        return lowrank_group(*args, **settings)

    monkeypatch.setattr("lowrank_fused.grouping.lowrank_group", spy)
    found, expected = projected(ours, autocast), projected(theirs, autocast)
    assert calls == [route]
    for mine, other in zip(found[:4], expected[:4], strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.03)
    for mine, other in zip(found[4:], expected[4:], strict=True):
        assert mine.dtype == other.dtype == torch.float32
        close = {"rtol": 1e-5, "atol": 1e-5} if route == "precise" else {"rtol": 0.02, "atol": 0.1}
        torch.testing.assert_close(mine, other, **close)


def test_biases_of_adapters_are_added():
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, lora_bias=True
    )
    theirs = peft.get_peft_model(Attention().double(), config)
    for parameter in trained(theirs):
        parameter.data += torch.randn_like(parameter)
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours)
    settle(ours)
    torch.testing.assert_close(ours(data()), theirs(data()))
    assert group_of(ours.base_model.model.q_proj).shared == 1


def test_the_context_manager_leaves_groups_as_they_were():
    model = peft.get_peft_model(Block(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with lf.accelerated(model):
        assert lf.group(model).groups == 1
    assert not any(GROUP in module.__dict__ for module in model.modules())
    lf.accelerate(model)
    before = group_of(model.base_model.model.attention.q_proj)
    with lf.accelerated(model, groups=False):
        assert group_of(model.base_model.model.attention.q_proj) is None
    assert group_of(model.base_model.model.attention.q_proj) is before


def test_cross_attention_shares_what_it_can():
    model = adapted()[0].attention
    model.source = torch.randn(2, 9, WIDTH, dtype=torch.float64)[:, :5]
    expected = model(data())
    lf.group(model)
    settle(model)
    torch.testing.assert_close(model(data()), expected)
    assert states(model) == {"share x: k_proj, v_proj"}


def test_cross_attention_to_inputs_of_another_width_shares_what_it_can():
    model = Attention().double()
    model.k_proj, model.v_proj = nn.Linear(7, 6).double(), nn.Linear(7, 6).double()
    lf.inject(model, lf.AdapterConfig(method="lora", rank=3, target_modules="all-linear"))
    model.source = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = model(data())
    lf.group(model)
    settle(model)
    torch.testing.assert_close(model(data()), expected)
    assert states(model) == {"share x: k_proj, v_proj"}


def test_layers_with_inputs_of_their_own_stay_single():
    model = adapted()[0].attention
    model.forward = lambda x: model.q_proj(x) + torch.cat([model.k_proj(x + 1), model.v_proj(x + 2)], -1)
    lf.group(model)
    settle(model)
    assert states(model) == {"called with different inputs"}
    assert group_of(model.q_proj).shared == 0


def test_results_that_nobody_fetches_end_the_sharing():
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    settle(model)
    assert group_of(model.q_proj).shared == 1
    model.calls = "q"
    expected = lf.ungroup(copy.deepcopy(model))(data())
    for _ in range(12):
        torch.testing.assert_close(model(data()), expected)
        torch.optim.SGD(trained(model), lr=0.0).step()
    assert states(model) == {"called with different inputs"}
    assert group_of(model.q_proj).shared < 9


def test_a_result_is_for_the_tensor_and_the_mode_that_it_was_computed_with():
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    single, x = lf.ungroup(copy.deepcopy(model)), data().detach()
    model.q_proj(x)
    x.add_(1.0)
    torch.testing.assert_close(model.k_proj(x), single.k_proj(x))  # written to since
    x = x.clone()
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad  # another mode
    model.q_proj(x)
    torch.testing.assert_close(model.k_proj(x.clone()), single.k_proj(x))
    first = model.v_proj(x)
    assert model.v_proj(x) is not first  # once only
    with torch.inference_mode():
        torch.testing.assert_close(model(data() * 1.0), single(data()))


@pytest.mark.parametrize("change", ["step", "B", "weight", "bias"])
def test_a_result_is_for_the_weights_that_it_was_computed_with(change):
    model = adapted(bias="all")[0].attention
    lf.group(model)
    settle(model)
    x = data().detach()
    model.q_proj(x)
    if change == "step":  # written where no version tells of it, as generated factors are
        model.k_proj.lora_B.data.mul_(2.0)
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()
    else:
        with torch.no_grad():
            {"B": model.k_proj.lora_B, "weight": model.k_proj.weight, "bias": model.k_proj.bias}[change].mul_(2.0)
    torch.testing.assert_close(model.k_proj(x), lf.ungroup(copy.deepcopy(model)).k_proj(x))


def test_a_result_is_for_its_thread_its_stream_and_its_kind_of_inference(monkeypatch):
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    one, x = group_of(model.q_proj), data().detach()
    with torch.inference_mode():
        model.q_proj(x)
    with torch.no_grad():
        assert not model.k_proj(x).is_inference()
    shared, x = one.shared, x.clone()
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        model.q_proj(x)
        grad_mode = torch.no_grad()(model.k_proj)
        torch.testing.assert_close(pool.submit(grad_mode, x).result(), model.k_proj(x))
    assert one.shared == shared + 3  # once for the other thread, once more for this one
    stream = SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), is_cuda=True)
    before = grouping._mode(on_gpu)
    assert grouping._mode(on_gpu) == before
    stream.cuda_stream = 2
    assert grouping._mode(on_gpu) != before


class SaysCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("captured_first", [False, True])
def test_a_result_from_outside_of_a_capture_is_not_used_inside_nor_the_other_way_round(captured_first, monkeypatch):
    """As when a graph is captured whose warm-up pass on the same stream and x fetched only the first result."""
    state = SimpleNamespace(capturing=captured_first)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    one, x = group_of(model.q_proj), data().detach()
    monkeypatch.setattr(grouping, "_mode", lambda x, mode=grouping._mode: mode(x.as_subclass(SaysCuda)))
    model.q_proj(x)
    shared = one.shared
    model.k_proj(x)
    assert one.shared == shared  # what waited was fetched
    state.capturing = not captured_first
    model.v_proj(x)
    assert one.shared == shared + 1  # computed anew, although v waited
    model.q_proj(x)
    assert one.shared == shared + 1


def test_hooks_see_and_change_what_they_always_did():
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    expected = lf.ungroup(copy.deepcopy(model))
    seen = []
    model.k_proj.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    x = data()
    model(x)
    assert seen[0][0] is x
    torch.testing.assert_close(seen[0][1], expected.k_proj(x))
    model.v_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.q_proj.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))
    expected.v_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    expected.q_proj.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))
    ours, theirs = data(), data()
    for _ in range(2):
        torch.testing.assert_close(model(ours), expected(theirs))
        model(ours).sum().backward()
        expected(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def kept_masks(model: nn.Module) -> int:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(data())
    return sum(t.dtype == torch.uint8 for t in kept)


def test_one_mask_serves_a_group():
    model = adapted(dropout=0.4)[0]
    assert kept_masks(model) == 6
    lf.group(model)
    settle(model)
    assert kept_masks(model) == 3
    assert kept_masks(model.eval()) == 0


@pytest.mark.parametrize("change", ["merge", "disable", "scale", "dropout"])
def test_layers_that_differ_are_computed_one_by_one(change):
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    single = lf.ungroup(copy.deepcopy(model))
    for one in (model, single):
        if change == "merge":
            one.k_proj.merge()
        elif change == "disable":
            one.k_proj.enabled = False
        elif change == "scale":
            one.k_proj.scaling *= 2
        else:
            one.k_proj.dropout_p = 0.99999
    before = group_of(model.q_proj).shared
    torch.testing.assert_close(model(data()), single(data()))
    assert group_of(model.q_proj).shared == before
    assert sum(group_of(model.q_proj).calls.values()) > 0


class Own(torch.Tensor):
    """A tensor of somebody else's."""


def test_who_watches_single_layers_sees_them():
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    settle(model)
    one, expected = group_of(model.q_proj), model(data())
    assert one.shared == 2
    with FlopCounterMode(display=False):
        torch.testing.assert_close(model(data()), expected)
    own = model(data().detach().as_subclass(Own))
    torch.testing.assert_close(own.as_subclass(torch.Tensor), expected)
    assert one.shared == 2


def test_one_pass_needs_one_of_everything_and_ranks_that_fit():
    x, weight, b = torch.randn(2, 4), torch.randn(5, 4), torch.randn(5, 80)
    call = Call(Branch(weight, torch.randn(80, 4), b), 2.0, 0.1, "auto")
    assert grouping._why_apart([call, call], x) is None
    others = {
        "scale": replace(call, scale=1.0),
        "dropout": replace(call, dropout_p=0.2),
        "route": replace(call, route="addmm"),
        "dtype": replace(call, branch=Branch(weight, torch.randn(80, 4).double(), b)),
        "device": replace(call, branch=Branch(weight.to("meta"), torch.randn(80, 4), b)),
    }
    for name, other in others.items():
        assert "differ" in (grouping._why_apart([call, other], x) or ""), name
    assert "128" in grouping._why_apart([call, call], SimpleNamespace(is_cuda=True))


def test_a_result_is_for_the_precision_that_it_was_computed_in():
    model = adapted()[0].attention.float()
    lf.group(model)
    x = data().detach().float()
    with torch.no_grad():
        model(x)
        model.q_proj(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.k_proj(x).dtype == torch.bfloat16
            model.q_proj(y := x.clone())
        assert model.k_proj(y).dtype == torch.float32


@pytest.mark.parametrize("method", ["lora", "unilora", "loldu", "vera", "dora", "peanut", "collaborative"])
def test_every_method_gives_what_it_gave(method):
    """Grouped where it is two factors, single where it is more."""
    options = {"unilora": {"theta_d_length": 64}, "vera": {"rank": 4}}.get(method, {})
    single, grouped = (adapted(method=method, **options) for _ in range(2))
    lf.group(grouped)
    settle(grouped)
    for ours, theirs in zip(steps(grouped, 2), steps(single, 2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_layers_that_leave_a_group_are_counted_out_and_one_alone_is_let_go():
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    old = group_of(model.q_proj)
    expected = lf.ungroup(copy.deepcopy(model))(data())
    lf.ungroup(model.k_proj)
    torch.testing.assert_close(model(data()), expected)
    assert old.together == ("q_proj", "v_proj") and old.shared == 1
    lf.ungroup(model.v_proj)
    torch.testing.assert_close(model(data()), expected)
    assert group_of(model.q_proj) is None and old.shared == 1


def test_a_layer_that_was_replaced_is_in_no_group_of_the_model():
    model = adapted()[0].attention
    lf.group(model)
    settle(model)
    removed, model.k_proj = model.k_proj, nn.Linear(WIDTH, 6).double()
    expected = lf.ungroup(copy.deepcopy(model))(data())
    assert states(model) == {"not called yet"}
    assert group_of(model.q_proj).names == ("q_proj", "v_proj")
    settle(model)
    torch.testing.assert_close(model(data()), expected)
    assert states(model) == {"share x: q_proj, v_proj"}
    removed(data())
    assert group_of(removed) is None
    model.v_proj = nn.Linear(WIDTH, 6).double()
    assert lf.group(model).groups == 0 and group_of(model.q_proj) is None


def test_half_watched_groups_go_on_with_who_is_left():
    model = adapted()[0].attention
    lf.group(model)
    lf.ungroup(model.k_proj)
    settle(model)
    assert group_of(model.q_proj).together == ("q_proj", "v_proj")


def test_restored_and_deleted_adapters_leave_their_group():
    model = accelerated_attention()
    attention = model.base_model.model
    settle(model)
    one, expected = group_of(attention.q_proj), model(data())
    assert one.together == ("q_proj", "k_proj", "v_proj")
    lf.restore(attention.k_proj)
    torch.testing.assert_close(model(data()), expected)
    assert one.together == ("q_proj", "v_proj")
    shared = one.shared
    attention.v_proj.delete_adapter("default")
    without = attention.v_proj.base_layer(data())
    torch.testing.assert_close(attention.v_proj(data()), without)
    torch.testing.assert_close(model(data()), torch.cat([expected[..., :-6], without.tanh()], -1))
    assert one.shared == shared and one.calls["no active adapter in this layer"] > 0
    lf.restore(model)
    assert not any(GROUP in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("make", [adapted, accelerated_attention], ids=["native", "PEFT"])
def test_a_compiled_graph_never_meets_a_group(make):
    """Whatever a group knows or holds: no break, no second graph, and nothing of the group's changes."""
    torch.compiler.reset()
    model = make()
    expected = model(data())
    expected_grad = torch.autograd.grad(expected.sum(), trained(model))
    lf.group(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    one = group_of(attention.q_proj)
    for state in ("unwatched", "known", "holding results"):
        if state == "known":
            torch.optim.SGD(trained(model), lr=0.0).step()
            settle(model)
        elif state == "holding results":
            attention.q_proj(data())
        before = (one.state(), one.shared, one.wasted, one._waiting)
        y = compiled(data())
        torch.testing.assert_close(y, expected)
        for ours, theirs in zip(torch.autograd.grad(y.sum(), trained(model)), expected_grad, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert before == (one.state(), one.shared, one.wasted, one._waiting) and counter.frame_count == 1
    assert one._waiting is not None and one.shared > 0
    lf.ungroup(model)
    torch.testing.assert_close(compiled(data()), expected)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_copies_and_pickles_are_in_no_group_and_names_stay():
    model = adapted()[0]
    names = list(model.state_dict())
    lf.group(model)
    settle(model)
    one = group_of(model.attention.q_proj)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded):
        assert group_of(other.attention.q_proj) is None
        torch.testing.assert_close(other(data()), model(data()))
    assert list(model.state_dict()) == names == list(twin.state_dict())
    assert lf.group(model).groups == 2 and group_of(model.attention.q_proj) is one
    assert lf.group(twin).groups == 2 and group_of(twin.attention.q_proj) is not one
    lf.ungroup(model)
    assert group_of(model.attention.q_proj) is None and group_of(twin.attention.q_proj) is not None


def test_the_report_is_a_table():
    model = adapted()
    text = str(lf.group(model))
    assert "Attention" in text and "q_proj, k_proj, v_proj" in text and "not called yet" in text
    assert str(lf.group(nn.Linear(2, 2))) == "no layers that could share their input"
