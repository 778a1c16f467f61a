"""Training loops that people use: accelerated, a PEFT model gives PEFT's loss curve and PEFT's adapters.

Every course is run twice from the same seeds, by PEFT and accelerated. Dropout masks are PEFT's (`dropout="torch"`).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lowrank_fused as lf
from lowrank_fused.peft.layers import Accelerated, state_of

STEPS, BATCH, LAYERS = 12, 4, 14
TARGETS = r".*_proj"
TOLERANCE = 1e-5  # of an fp32 loss: the order of sums alone differs


@dataclass
class Course:
    """What a training left behind."""

    losses: list[float]
    adapters: dict[str, Tensor]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words for numbers, signs and little else."""
    words = ["<pad>", "</s>", "<unk>", "+", "=", *map(str, range(24)), "who", "knows"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers make their output folder even if nothing goes there."""
    monkeypatch.chdir(tmp_path)


SUMS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
VOCABULARY = 31


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, initializer_range=0.1,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lora(dropout: float = 0.0, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=dropout, task_type="CAUSAL_LM", **options
    )


METHODS: dict[str, Callable[[float], Any]] = {
    "lora": lora,
    "dora": lambda dropout: lora(use_dora=True),
    "peanut": lambda dropout: peft.PeanutConfig(r=4, target_modules=TARGETS, depth=1, task_type="CAUSAL_LM"),
    "vera": lambda dropout: peft.VeraConfig(r=8, target_modules=TARGETS, vera_dropout=dropout, d_initial=0.5),
}


def peft_model(method: str = "lora", dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> PeftModel:
    if method == "peanut" and not hasattr(peft, "PeanutConfig"):
        pytest.skip(f"PEFT {peft.__version__} has no PEANuT")
    return get_peft_model(llama().to(dtype), METHODS[method](dropout))


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def calls_of(model: nn.Module) -> Counter[tuple[str, str]]:
    """(path, reason) -> calls of all layers together; none for a model that is not accelerated."""
    calls: Counter[tuple[str, str]] = Counter()
    if any(isinstance(module, Accelerated) for module in model.modules()):
        for row in lf.explain(model).rows:
            calls[row.path, row.reason] += row.calls or 0
    return calls


def course_of(model: nn.Module, losses: list[float], **metrics: list[float]) -> Course:
    return Course(losses, adapters_of(model), metrics, calls_of(model))


def assert_same(theirs: Course, ours: Course, *, forwards: int | None = None) -> None:
    """Equal in every step's loss, every metric and every final adapter, all learned, none of ours by PEFT's forward.

    Adapters have the rounding of all steps, which AdamW magnifies where gradients are small.
    """
    assert len(theirs.losses) == len(ours.losses) >= 10
    assert theirs.calls.total() == 0
    assert sum(theirs.losses[-4:]) < sum(theirs.losses[:4])
    assert max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)) < TOLERANCE
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, expected in theirs.metrics.items():
        assert ours.metrics[name] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), name
    assert ours.adapters.keys() == theirs.adapters.keys()
    for name, expected in theirs.adapters.items():
        assert (ours.adapters[name] - expected).norm() < 2 * TOLERANCE * expected.norm(), name
    if forwards is not None:
        assert ours.calls == {("fused", ""): forwards * LAYERS}


# A loop of one's own, in every precision


def rows(count: int) -> list[dict[str, Tensor]]:
    """Counting up from random numbers, which is quickly learned."""
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "labels": ids} for ids in (starts + torch.arange(11)) % VOCABULARY]


def batches() -> Iterator[dict[str, Tensor]]:
    data = rows(STEPS * BATCH)
    for start in range(0, len(data), BATCH):
        ids = torch.stack([row["input_ids"] for row in data[start : start + BATCH]])
        yield {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Precision:
    """dtype of the base, dtype of autocast, and whether a gradient scaler is used."""

    base: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    scaled: bool = False

    @property
    def rounding(self) -> float:
        """Of a number near 1, in the narrower dtype."""
        return torch.finfo(self.autocast or self.base).eps / 2


PRECISIONS = {
    "fp32": Precision(),
    "bf16 autocast": Precision(autocast=torch.bfloat16),
    "fp16 autocast": Precision(autocast=torch.float16, scaled=True),
    "bf16 base": Precision(base=torch.bfloat16),
    "fp16 base": Precision(base=torch.float16, scaled=True),
}


def plain(precision: str = "fp32", method: str = "lora", dropout: float = 0.0, *, accelerated: bool) -> Course:
    """AdamW on counting; fp16 with a scale that overflows at first."""
    how = PRECISIONS[precision]
    model = peft_model(method, dropout, how.base).train()
    if accelerated:
        lf.accelerate(model, dropout="torch", strict=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=how.scaled)
    torch.manual_seed(2)
    losses, scales, norms = [], [], []
    for batch in batches():
        with torch.autocast("cpu", dtype=how.autocast, enabled=how.autocast is not None):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), math.inf)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return course_of(model, losses, scales=scales, norms=norms)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_plain_loop(method, dropout):
    if dropout and method in ("dora", "peanut"):
        pytest.skip("PEANuT has no dropout, and DoRA with it is PEFT's to compute")
    runs = [plain(method=method, dropout=dropout, accelerated=accelerated) for accelerated in (False, True)]
    assert_same(*runs, forwards=STEPS)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp32"])
def test_plain_loop_in_low_precision(precision, dropout):
    """At most twice as far from the fp32 curve as PEFT is; the scaler sees the same overflows and goes on."""
    how = PRECISIONS[precision]
    theirs, ours = (plain(precision, dropout=dropout, accelerated=accelerated) for accelerated in (False, True))
    assert ours.calls == {("fused", ""): STEPS * LAYERS}
    assert ours.losses[-1] < ours.losses[0] - 0.3
    assert ours.metrics["scales"] == theirs.metrics["scales"]
    # Where steps are skipped fp32 takes another course, and PEFT's is the one to follow.
    exact = theirs if how.scaled else plain(dropout=dropout, accelerated=False)
    if how.scaled:
        first, last = ours.metrics["scales"][0], ours.metrics["scales"][-1]
        assert 2.0**20 > first >= last > 1.0
    assert distance(ours, exact) <= max(2 * distance(theirs, exact), how.rounding)


def distance(one: Course, other: Course) -> float:
    """Between two loss curves, root mean square."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one.losses, other.losses, strict=True)) / len(one.losses))


# Hugging Face Accelerate


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerator keeps its precision in a state that all instances of a process share."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def with_accelerate(when: str, dropout: float, mixed_precision: str = "no", *, accumulate: int = 2) -> Course:
    """`when` our classes are swapped in: never, before prepare or after it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
    model: Any = peft_model("lora", dropout).train()
    if when == "before":
        lf.accelerate(model, dropout="torch", strict=True)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    loader: Any = DataLoader(rows(2 * STEPS * BATCH), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if when == "after":
        lf.accelerate(model, dropout="torch", strict=True)
    torch.manual_seed(2)
    losses, norms = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return course_of(accelerator.unwrap_model(model), losses, norms=norms)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_loop(when, dropout, fresh_accelerator):
    assert_same(with_accelerate("never", dropout), with_accelerate(when, dropout), forwards=2 * STEPS)


def test_accelerate_loop_in_bf16(fresh_accelerator):
    exact = with_accelerate("never", 0.1)
    theirs, ours = (with_accelerate(when, 0.1, "bf16") for when in ("never", "before"))
    assert ours.calls == {("fused", ""): 2 * STEPS * LAYERS}
    assert distance(theirs, exact) > 0
    assert distance(ours, exact) <= max(2 * distance(theirs, exact), PRECISIONS["bf16 autocast"].rounding)


# Transformers' Trainer


class Recorded:
    """Keeps the loss of every step as it is; a trainer's log rounds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.losses.append(loss.item())
        return loss

    def logged(self, name: str) -> list[float]:
        """What was logged under a name."""
        return [float(entry[name]) for entry in self.state.log_history if name in entry]  # type: ignore[attr-defined]


class RecordedTrainer(Recorded, Trainer):
    """Transformers' trainer."""


COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 5e-3,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}
QUIET = {"save_strategy": "no", "logging_steps": 1}


def callbacks(how: str) -> list[TrainerCallback]:
    return [lf.AccelerateCallback(dropout="torch", strict=True)] if how == "callback" else []


def trainer_of(
    how: str, out: Path | str, method: str = "lora", dropout: float = 0.0, **options: Any
) -> RecordedTrainer:
    """`how` it is accelerated: "never", "before" the trainer is made, or by its "callback"."""
    model = peft_model(method, dropout)
    if how == "before":
        lf.accelerate(model, dropout="torch", strict=True)
    return RecordedTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **{**COMMON, **options}),
        train_dataset=rows(2 * STEPS * BATCH),
        eval_dataset=rows(2 * BATCH),
        callbacks=callbacks(how),
    )


TRAINER_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "evaluated": {"eval_strategy": "steps", "eval_steps": 4},
}
FORWARDS = {"plain": 12, "accumulated": 24, "checkpointed": 24, "checkpointed, reentrant": 24, "evaluated": 15}


@functools.cache
def trained(how: str, case: str, method: str, dropout: float) -> Course:
    """With Transformers' Trainer."""
    trainer = trainer_of(how, "unused", method, dropout, **QUIET, **TRAINER_OPTIONS[case])
    trainer.train()
    evaluated, norms = trainer.logged("eval_loss"), trainer.logged("grad_norm")
    return course_of(trainer.model, trainer.losses, evaluated=evaluated, norms=norms)


@pytest.mark.parametrize(("how", "dropout"), [("before", 0.1), ("callback", 0.0), ("callback", 0.1)])
@pytest.mark.parametrize("case", TRAINER_OPTIONS)
def test_trainer(case, how, dropout, in_tmp_path):
    ours = trained(how, case, "lora", dropout)
    assert_same(trained("never", case, "lora", dropout), ours, forwards=FORWARDS[case])
    assert len(ours.metrics["evaluated"]) == 3 * (case == "evaluated")


@pytest.mark.parametrize("method", ["dora", "peanut"])
@pytest.mark.parametrize("case", ["accumulated", "checkpointed", "checkpointed, reentrant"])
def test_factors_that_are_remembered_between_steps(case, method, in_tmp_path):
    """DoRA's norms and PEANuT's network are evaluated once per step, for all its micro-batches and recomputations."""
    theirs = trained("never", case, method, 0.0)
    trainer = trainer_of("before", "unused", method, **QUIET, **TRAINER_OPTIONS[case])
    trainer.train()
    norms = trainer.logged("grad_norm")
    assert_same(theirs, course_of(trainer.model, trainer.losses, evaluated=[], norms=norms), forwards=FORWARDS[case])
    layers = [module for module in trainer.model.modules() if isinstance(module, Accelerated)]
    kept = [kept for layer in layers for *_, kept in state_of(layer).generated.values()]
    assert [each.evaluations for each in kept] == [STEPS] * LAYERS


def test_trainer_in_bf16(in_tmp_path):
    def run(how: str, **options: Any) -> Course:
        trainer = trainer_of(how, "unused", "lora", 0.1, **QUIET, **options)
        trainer.train()
        return course_of(trainer.model, trainer.losses)

    exact, theirs, ours = run("never"), run("never", bf16=True), run("callback", bf16=True)
    assert ours.calls == {("fused", ""): STEPS * LAYERS}
    assert distance(theirs, exact) > 0
    assert distance(ours, exact) <= max(2 * distance(theirs, exact), PRECISIONS["bf16 autocast"].rounding)


def test_callback_restores_if_asked_to(in_tmp_path):
    trainer = trainer_of("never", "unused", **QUIET)
    classes = [type(module) for module in trainer.model.modules()]
    callback = lf.AccelerateCallback(restore_at_end=True)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.report is not None
    assert callback.report.of_path("fused") == LAYERS
    assert [type(module) for module in trainer.model.modules()] == classes


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_best_checkpoint_is_loaded_into_the_accelerated_model(method, tmp_path):
    """The first of three, by asking for the largest loss; what is evaluated then is what was loaded."""
    options = {
        "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "logging_strategy": "no",
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    courses = []
    for how in ("never", "callback"):
        trainer = trainer_of(how, tmp_path / how, method, **options)
        trainer.train()
        evaluated = trainer.logged("eval_loss")
        after = trainer.evaluate()["eval_loss"]
        assert after == pytest.approx(evaluated[0], abs=TOLERANCE)
        assert after > evaluated[-1] + 0.05
        courses.append(course_of(trainer.model, trainer.losses, evaluated=evaluated))
    assert_same(*courses)


@pytest.mark.parametrize(("wrote", "resumes"), [("never", "callback"), ("callback", "never")])
def test_training_resumes_from_a_checkpoint_of_either(wrote, resumes, tmp_path):
    """Half the way by one, the rest by the other, with the dropout masks of a training that PEFT did at one go."""
    options = {"dropout": 0.1, "logging_strategy": "no", "save_strategy": "steps", "save_steps": STEPS // 2}
    whole = trainer_of("never", tmp_path / "whole", **options)
    whole.train()
    first = trainer_of(wrote, tmp_path / "halves", **options)
    first.train()
    second = trainer_of(resumes, tmp_path / "halves", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "halves" / f"checkpoint-{STEPS // 2}"))
    assert len(second.losses) == STEPS // 2
    halves = course_of(second.model, first.losses[: STEPS // 2] + second.losses)
    assert_same(course_of(whole.model, whole.losses), replace(halves, calls=Counter()))


# TRL


def sft(how: str, dropout: float, **options: Any) -> Course:
    """SFTTrainer makes the PEFT model, with gradient checkpointing unless told otherwise."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    recorded = type("RecordedSFT", (Recorded, trl.SFTTrainer), {})
    trainer = recorded(
        model=llama(),
        args=trl.SFTConfig(output_dir="unused", **{**COMMON, **QUIET, **options}),
        train_dataset=datasets.Dataset.from_list(SUMS),
        processing_class=tokenizer(),
        peft_config=lora(dropout),
        callbacks=callbacks(how),
    )
    trainer.train()
    return course_of(trainer.model, trainer.losses, norms=trainer.logged("grad_norm"))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_trl_sft(checkpointing, dropout, in_tmp_path):
    theirs, ours = (sft(how, dropout, gradient_checkpointing=checkpointing) for how in ("never", "callback"))
    assert_same(theirs, ours, forwards=STEPS * (1 + checkpointing))


LOGGED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm")


def dpo(how: str, dropout: float, *, trained_before: bool) -> Course:
    """DPOTrainer: its reference is the base model, or for a PeftModel a copy "ref" of the adapter it comes with."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    recorded = type("RecordedDPO", (Recorded, trl.DPOTrainer), {})
    model: Any = llama()
    if trained_before:
        model = get_peft_model(model, lora(dropout))
        g = torch.Generator().manual_seed(4)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(torch.randn(parameter.shape, generator=g), alpha=0.1)
        if how != "never":
            lf.accelerate(model, dropout="torch", strict=True)
    options = {**COMMON, **QUIET, "gradient_checkpointing": False}
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " who knows"} for row in SUMS]
    trainer = recorded(
        model=model,
        args=trl.DPOConfig(output_dir="unused", disable_dropout=not dropout, **options),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer(),
        peft_config=None if trained_before else lora(dropout),
        callbacks=callbacks(how),
    )
    trainer.train()
    return course_of(trainer.model, trainer.losses, **{name: trainer.logged(name) for name in LOGGED})


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_trl_dpo_against_the_base_model(dropout, in_tmp_path):
    """The reference pass runs with the adapters disabled: a policy that has not moved yet gets no reward."""
    theirs, ours = (dpo(how, dropout, trained_before=False) for how in ("never", "callback"))
    assert_same(theirs, ours)
    assert ours.calls == {("fused", ""): STEPS * LAYERS, ("original", "adapters disabled"): STEPS * LAYERS}
    assert ours.metrics["rewards/margins"][0] == pytest.approx(0.0, abs=1e-6)
    assert ours.metrics["rewards/margins"][-1] > 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_trl_dpo_against_an_adapter(dropout, in_tmp_path):
    """The trainer adds the reference adapter to a model that is accelerated already, and switches to and fro."""
    theirs, ours = (dpo(how, dropout, trained_before=True) for how in ("never", "callback"))
    assert_same(theirs, ours, forwards=2 * STEPS)
    assert ours.metrics["rewards/margins"][-1] > 0.01
