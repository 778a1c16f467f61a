"""Which parameters learn faster under `parameter_groups` (LoRA+), and that nothing is lost on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_fused as lf

LR, RATIO = 1e-3, 16.0
# What of a layer makes its B and not its A.
OUTPUT_SIDE = {
    "lora": {"lora_B"},
    "dora": {"lora_B"},
    "adalora": {"lora_B"},
    "hydralora": {"lora_B"},
    "collaborative": {"cola_B"},
    "loldu": set(),
    "lora_xs": set(),
    "unilora": set(),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def faster(model: nn.Module, **settings) -> set[str]:
    """Names of the parameters at the larger rate; every trained one must be in exactly one group."""
    groups = lf.parameter_groups(model, LR, ratio=RATIO, **settings)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trained
    assert {group["lr"] for group in groups} <= {LR, RATIO * LR}
    assert all(group["params"] for group in groups)
    return {names[id(p)] for group in groups if group["lr"] == RATIO * LR for p in group["params"]}


@pytest.mark.parametrize("name", OUTPUT_SIDE)
def test_the_ratio_reaches_exactly_the_output_side(name):
    model = lf.inject(network(), method=name, rank=4, **lf.methods.small_options(name))
    assert faster(model) == {f"{layer}.{tensor}" for layer in "02" for tensor in OUTPUT_SIDE[name]}


@pytest.mark.parametrize("name", sorted(lf.methods.registry()))
def test_every_method_has_groups(name):
    model = lf.inject(network(), method=name, rank=4, **lf.methods.small_options(name))
    state = torch.get_rng_state()
    faster(model)
    assert torch.equal(torch.get_rng_state(), state), "it drew random numbers"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (8, 12), (12, 8)])
@pytest.mark.parametrize("init", [True, "init_b"])
def test_shapes_that_could_be_either_side_are_told_apart(in_features, out_features, init):
    """With r = in or r = out a factor has the other's shape, or that of W."""
    model = nn.Sequential(nn.Linear(in_features, out_features))
    assert faster(lf.inject(model, rank=8, init_lora_weights=init)) == {"0.lora_B"}


def test_random_pairs_leave_the_random_state_alone():
    model = lf.inject(network(), method="collaborative", strategy="random", rank=2).train()
    state = torch.get_rng_state()
    assert faster(model) == {"0.cola_B", "2.cola_B"}
    assert torch.equal(torch.get_rng_state(), state)


def test_biases_and_heads_learn_at_the_plain_rate():
    model = lf.inject(network(), target_modules=["0"], modules_to_save=["2"], bias="lora_only", rank=4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} > {"0.bias", "2.weight", "2.bias"}
    assert faster(model) == {"0.lora_B"}


def test_what_the_user_froze_is_in_no_group():
    model = lf.inject(network(), rank=4)
    model[0].lora_A.requires_grad_(False)
    model[2].lora_B.requires_grad_(False)
    assert faster(model) == {"0.lora_B"}


def test_weight_decay_is_on_every_group():
    model = lf.inject(network(), rank=4)
    assert {group["weight_decay"] for group in lf.parameter_groups(model, LR, weight_decay=0.3)} == {0.3}
    assert {group["weight_decay"] for group in lf.parameter_groups(model, LR)} == {0.0}


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": -1.0}, {"lr": LR, "ratio": 0.0}, {"lr": float("nan")}])
def test_rates_must_be_positive(bad):
    with pytest.raises(ValueError, match="lr and ratio must be positive"):
        lf.parameter_groups(lf.inject(network(), rank=4), **bad)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="has no adapters"):
        lf.parameter_groups(network(), LR)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_lora_is_grouped_and_stepped_as_by_peft():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    ours = llama()
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=4, target_modules="all-linear"))
    lf.inject(ours, rank=4, target_modules="all-linear")
    settings = {"lr": LR, "loraplus_lr_ratio": RATIO, "eps": 1e-6, "betas": (0.9, 0.999)}
    their_optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **settings)
    our_optimizer = torch.optim.AdamW(lf.parameter_groups(ours, LR, ratio=RATIO), eps=1e-6, betas=(0.9, 0.999))

    def plain(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".default.weight", "")

    def rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
        names = {id(p): plain(name) for name, p in model.named_parameters()}
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates(our_optimizer, ours) == rates(their_optimizer, theirs)
    twins = {plain(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad:
                p.copy_(twins[name])
    ids = torch.randint(64, (2, 9))
    for model, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, twins[name], rtol=1e-3, atol=1e-5)
