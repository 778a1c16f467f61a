"""AdaLoRA's training loop: penalty, budget schedule and pruning, against PEFT's; pruned checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_fused as lf
from lowrank_fused.tools.tiny_models import logits, tiny_model
from lowrank_fused.training.adalora import BudgetSchedule, RankAllocator, orthogonality_penalty

SETTINGS = {"target_r": 2, "total_step": 14, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.7, "beta2": 0.9}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 20))


def adapted(**more) -> nn.Module:
    return lf.inject(make_model(), method="adalora", rank=5, **{**SETTINGS, **more})


def twin_of(model: nn.Module, folder) -> nn.Module:
    """PEFT's model with the same adapter, in training mode."""
    peft = pytest.importorskip("peft")
    lf.save_adapter(model, folder)
    return peft.PeftModel.from_pretrained(make_model(), folder, is_trainable=True)


def batches(steps: int) -> Tensor:
    return torch.randn(steps, 2, 6, 20, generator=torch.Generator().manual_seed(3))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    optimizer.zero_grad()
    (model(batch[0]) - batch[1]).square().mean().backward()
    optimizer.step()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def zeros_of(model: nn.Module, name: str = "lora_E") -> Tensor:
    return torch.cat([p.detach()[:, 0] == 0 for n, p in model.named_parameters() if name in n])


def test_the_same_triplets_are_pruned_as_by_peft(tmp_path):
    model = adapted()
    twin = twin_of(model, tmp_path)
    allocator, sides = RankAllocator(model), [(m, optimizer_of(m)) for m in (model, twin)]
    pruned = []
    for step, batch in enumerate(batches(16), start=1):
        for side, optimizer in sides:
            train_step(side, optimizer, batch)
        allocator.update_and_allocate(step)
        twin.base_model.update_and_allocate(step)
        assert torch.equal(zeros_of(model), zeros_of(twin)), step
        pruned.append(int(zeros_of(model).sum()))
    assert max(pruned) == 6 and pruned[-1] == 6, "10 triplets, of which 4 are kept"
    assert len(set(pruned)) > 2 and pruned[1] == 0
    assert sum(allocator.ranks.values()) == 4 and set(allocator.ranks) == {"0", "2"}
    torch.testing.assert_close(model(batch[0]), twin(batch[0]))


@pytest.mark.parametrize(
    "changed", [{}, {"tinit": 0, "deltaT": 1}, {"tfinal": 0}, {"target_r": 5}, {"total_step": 100}]
)
def test_budgets_and_steps_are_pefts(changed, tmp_path):
    model = adapted(**changed)
    theirs = twin_of(model, tmp_path).base_model.rankallocator
    schedule = RankAllocator(model).schedule
    for step in range(schedule.total_step + 3):
        budget, prunes = theirs.budget_schedule(step)
        assert schedule.budget(step) == budget
        # From the last step on PEFT says yes for every step and means the choice that is fixed by then.
        if step < schedule.last:
            assert schedule.prunes(step) == prunes
    assert schedule.prunes(schedule.last) and not schedule.prunes(schedule.last + 1)


def test_a_triplet_that_is_pruned_may_come_back_until_the_last_step():
    model = adapted(total_step=30, tinit=0, tfinal=2, deltaT=1)
    allocator, optimizer = RankAllocator(model), optimizer_of(model)
    kept = []
    for step, batch in enumerate(batches(33), start=1):
        train_step(model, optimizer, batch)
        allocator.update_and_allocate(step)
        kept.append(torch.cat(list(allocator.kept.values())))
        if step == 28:
            final = copy.deepcopy(allocator.state_dict())
    returned = sum(int((later & ~earlier).sum()) for earlier, later in zip(kept, kept[1:], strict=False))
    assert returned > 0
    assert all(torch.equal(choice, kept[27]) for choice in kept[27:]) and zeros_of(model).sum() == 6
    for name, tensors in allocator.state_dict().items():
        assert all(torch.equal(final[name][key], value) for key, value in tensors.items()), (
            "nothing is observed any more"
        )


def test_a_run_goes_on_from_its_state():
    def run(model: nn.Module, optimizer, allocator: RankAllocator, steps: range) -> None:
        for step in steps:
            train_step(model, optimizer, batches(16)[step])
            allocator.update_and_allocate(step)

    model = adapted()
    optimizer, allocator = optimizer_of(model), RankAllocator(model)
    run(model, optimizer, allocator, range(1, 7))
    again = copy.deepcopy(model)
    second = RankAllocator(again)
    second.load_state_dict(copy.deepcopy(allocator.state_dict()))
    other = optimizer_of(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for side in ((model, optimizer, allocator), (again, other, second)):
        run(*side, range(7, 16))
    assert torch.equal(zeros_of(model), zeros_of(again)) and zeros_of(model).sum() == 6
    assert second.ranks == allocator.ranks


def test_a_layer_without_gradients_is_pruned_first():
    model = adapted()
    allocator = RankAllocator(model, total_step=3, tinit=0, tfinal=0, deltaT=1)
    for step in (1, 2, 3):
        model[0](batches(1)[0, 0]).square().sum().backward()  # the second layer is not used
        with torch.no_grad():
            model[0].lora_E.add_(0.1)
        allocator.update_and_allocate(step)
    assert allocator.ranks == {"0": 4, "2": 0}


def test_the_penalty_is_its_formula():
    model = adapted()
    expected = {"mean": torch.zeros(()), "sum": torch.zeros(())}
    for layer in (model[0], model[2]):
        for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B):
            off = (gram - torch.eye(5)).detach()
            expected["mean"] += off.square().sum().sqrt() / 4
            expected["sum"] += off.square().sum()
    for form, value in expected.items():
        torch.testing.assert_close(orthogonality_penalty(model, 2.0, form=form), 2 * value)
        torch.testing.assert_close(orthogonality_penalty(model, form=form), 0.5 * value)
    orthogonality_penalty(model).backward()
    assert model[0].lora_A.grad.abs().max() > 0 and model[0].lora_E.grad is None
    with torch.no_grad():
        for layer in (model[0], model[2]):
            nn.init.orthogonal_(layer.lora_A), nn.init.orthogonal_(layer.lora_B)
    assert orthogonality_penalty(model, 1.0) < 1e-5
    with pytest.raises(ValueError, match="form must be 'mean' or 'sum', got 'peft'"):
        orthogonality_penalty(model, form="peft")
    with pytest.raises(ValueError, match="not of method 'adalora'"):
        orthogonality_penalty(lf.inject(make_model()))


def test_the_penalty_is_what_peft_adds_to_the_loss():
    peft = pytest.importorskip("peft")
    settings = {"init_r": 4, "total_step": 9, "orth_reg_weight": 0.3, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model(tiny_model("llama"), peft.AdaLoraConfig(**settings))
    tokens = torch.arange(12).view(2, 6)
    plain = theirs.get_base_model()(input_ids=tokens, labels=tokens).loss
    added = theirs.base_model(input_ids=tokens, labels=tokens).loss - plain
    ours = lf.inject(tiny_model("llama"), method="adalora", rank=4, target_modules=["q_proj", "down_proj"])
    state = {key.replace(".default", "").removeprefix("base_model.model."): v for key, v in theirs.state_dict().items()}
    ours.load_state_dict({key: state.get(key, value) for key, value in ours.state_dict().items()})
    torch.testing.assert_close(orthogonality_penalty(ours, 0.3), added)


def test_pefts_pruned_checkpoints_load(tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "down_proj"]
    config = peft.AdaLoraConfig(init_r=4, target_r=1, total_step=3, deltaT=1, lora_alpha=6, target_modules=targets)
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    tokens = torch.arange(12).view(2, 6)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.eval().save_pretrained(tmp_path)
    kept = [sum(mask) for mask in config.rank_pattern.values()]
    assert sum(kept) == 6 and max(kept) > 1 and 0 in kept, "it shows layers of several ranks, and one of none"
    loaded = lf.load_adapter(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (logits(theirs) - logits(tiny_model("llama"))).abs().max() > 1e-3
    lf.save_adapter(loaded, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=1e-5)


def test_the_scale_is_pefts():
    assert adapted(alpha=6)[0].scaling == 6 / (5 + 1e-5)


def test_bad_schedules_are_refused():
    for settings, text in (
        ({"beta1": 1.0}, "beta1 and beta2 must be between 0 and 1, got 1.0 and 0.9"),
        ({"orth_reg_weight": -1}, "orth_reg_weight must not be negative"),
        ({"deltaT": 0}, "must be at least 1, tinit and tfinal at least 0.*deltaT=0"),
        ({"tinit": 11}, "tinit . tfinal = 14 leaves no step of total_step=14 to prune in"),
    ):
        with pytest.raises(ValueError, match=text):
            lf.AdapterConfig("adalora", **{**SETTINGS, **settings})
    with pytest.raises(ValueError, match="needs total_step"):
        RankAllocator(lf.inject(make_model(), method="adalora"))
    with pytest.raises(ValueError, match="a budget of 12 triplets is not from 1 to the 10 there are"):
        RankAllocator(adapted(target_r=6))
    with pytest.raises(ValueError, match="no step to prune in between tinit = 4 and total_step - tfinal = 4"):
        BudgetSchedule(initial=8, target=4, total_step=6, tinit=4, tfinal=2)
