"""The training step of a causal language model of few layers, from its configuration: frozen, with PEFT, with ours."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_fused as lf
from bench.model_step import TrainingStep
from lowrank_fused.benchmark import Row, dtype_name
from lowrank_fused.benchmark.providers import FP32
from lowrank_fused.tools.model_shapes import build

__all__ = ["PROVIDERS", "CausalCase", "causal_steps", "default_names", "factors_of", "step_verdicts", "warmed"]

# "grouped" is "inject" whose layers share passes over x; "accelerate" does that by itself.
PROVIDERS = ("frozen", "eager", "compile", "accelerate", "inject", "grouped")
GATE_LENGTH = 256
SCALE = 2.0


@dataclass(frozen=True)
class CausalCase:
    """A model of `model_shapes`, config fields to override, the size of its input, the adapter on all its linears."""

    model: str
    batch: int
    length: int
    rank: int = 16
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def tokens(self) -> int:
        """Rows that a linear sees."""
        return self.batch * self.length

    def title(self) -> str:
        """One line for a person."""
        return (
            f"training step of {self.label()}, {self.batch} x {self.length} tokens, rank {self.rank}, "
            f"dropout {self.dropout:g}, {dtype_name(self.dtype)}"
        )

    def label(self) -> str:
        """The model, and what of its config was changed."""
        settings = dict(self.settings)
        layers = settings.get("num_hidden_layers")
        narrow = f", hidden size {settings['hidden_size']}" if "hidden_size" in settings else ""
        return self.model + (f", {layers} layer{'s' * (layers > 1)}" if layers else "") + narrow

    def row(self, provider: str, **numbers: Any) -> Row:
        """A row of this case."""
        config = build(self.model, "meta", **dict(self.settings)).config
        return Row(
            label=self.label(),
            in_features=config.hidden_size,
            out_features=config.intermediate_size,
            tokens=self.tokens,
            rank=self.rank,
            dropout=self.dropout,
            dtype=dtype_name(self.dtype),
            device=self.device.type,
            mode="both",
            provider=provider,
            what="step",
            **numbers,
        )


def default_names(case: CausalCase, *, with_compile: bool = False) -> list[str]:
    """Providers of a step; PEFT's default of fp32 adapters, and ours on them, only beside a 16-bit model."""
    names = [name for name in PROVIDERS if with_compile or name != "compile"]
    return names if case.dtype == torch.float32 else [*names, "eager" + FP32, "accelerate" + FP32]


def causal_steps(case: CausalCase, names: Iterable[str] | None = None) -> dict[str, Callable[[], TrainingStep]]:
    """Makers of the steps by provider, over one random base model; all adapters hold the same, nonzero factors.

    Makers, so that memory can be measured with one of them alive. Input embeddings are a leaf that requires a gradient:
    the first layers pay for dx like all others, and the frozen model has a backward pass.
    """
    base, ids = _base(case)
    shared = {id(p): p for p in base.parameters()}

    def maker(name: str) -> Callable[[], TrainingStep]:
        def make() -> TrainingStep:
            # The copy shares the frozen weights: the base is in memory once, however many steps there are.
            return _step(copy.deepcopy(base, dict(shared)), name, case, ids)

        return make

    wanted = default_names(case) if names is None else list(names)
    for name in wanted:
        if name.removesuffix(FP32) not in PROVIDERS:
            raise ValueError(f"the provider of a training step must be one of {', '.join(PROVIDERS)}, got {name!r}")
    return {name: maker(name) for name in wanted}


def _base(case: CausalCase) -> tuple[nn.Module, Tensor]:
    """A frozen model with random weights, and the token ids of one batch."""
    with torch.random.fork_rng(devices=[case.device] if case.device.type == "cuda" else []):
        torch.manual_seed(0)
        base = build(case.model, case.device, **dict(case.settings)).to(case.dtype).requires_grad_(False)
        ids = torch.randint(base.config.vocab_size, (case.batch, case.length), device=case.device)
    return base, ids


def _step(model: nn.Module, name: str, case: CausalCase, ids: Tensor) -> TrainingStep:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    adapted, kind = model, name.removesuffix(FP32)
    if kind in ("inject", "grouped"):
        adapted = _with_ours(model, case)
    elif kind != "frozen":
        adapted = _with_peft(model, case, fp32=name.endswith(FP32))
    fill_factors(adapted, case.dtype)
    if kind == "accelerate":
        lf.accelerate(adapted, strict=True)
    elif kind == "grouped":
        lf.group(adapted)
    called = torch.compile(adapted) if kind == "compile" else adapted
    autocast = name.endswith(FP32) and case.dtype != torch.float32

    def loss() -> Tensor:
        embeddings.grad = None
        with torch.autocast(case.device.type, dtype=torch.bfloat16, enabled=autocast):
            return called(inputs_embeds=embeddings, labels=ids).loss

    return TrainingStep.of(adapted, loss, capturable=case.device.type == "cuda")


def _linears(model: nn.Module) -> list[str]:
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and not p.endswith("lm_head")]


def _with_peft(model: nn.Module, case: CausalCase, fp32: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=case.rank, lora_alpha=int(SCALE * case.rank), lora_dropout=case.dropout, target_modules=_linears(model)
    )
    return get_peft_model(model, config, autocast_adapter_dtype=fp32)


def _with_ours(model: nn.Module, case: CausalCase) -> nn.Module:
    return lf.inject(
        model,
        method="lora",
        rank=case.rank,
        alpha=SCALE * case.rank,
        dropout=case.dropout,
        target_modules=_linears(model),
        autocast_adapter_dtype=False,
    )


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained factors by path of their linear and A or B, the same for PEFT and for us."""
    found = {}
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for name, parameter in trained:
        if match := re.fullmatch(r"(?:base_model\.model\.)?(.*)\.lora_([AB])(?:\.default\.weight)?", name):
            found[f"{match[1]} {match[2]}"] = parameter
    return found


def fill_factors(model: nn.Module, dtype: torch.dtype) -> None:
    """Normal factors, rounded to `dtype`, that depend on the linear's path alone; the low-rank term matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(factors_of(model).items()):
            std = 0.5 * parameter.shape[1] ** -0.5 if name.endswith("B") else parameter.shape[1] ** -0.5
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * std).to(dtype))


def step_verdicts(case: CausalCase, names: Iterable[str]) -> dict[str, str]:
    """ "ok" for every provider whose loss and gradients are as accurate as eager PEFT's, without dropout; else why not.

    Truth is PEFT's model in float64 (transformers' norms go through fp32 in it). A gradient's relative RMS error may be
    twice that of PEFT's worst gradient in the case's dtype: which of them rounding hits hardest is chance, those that
    come out of the softmax above all. The loss is judged by PEFT's loss. Either counts as at least four roundings.
    """
    small = replace(case, batch=1, length=min(case.length, GATE_LENGTH), dropout=0.0)
    verdicts = dict.fromkeys(names, "ok")
    judged = [name for name in verdicts if name.removesuffix(FP32) not in ("frozen", "eager")]
    if not judged:
        return verdicts
    makers = causal_steps(small, ["eager", *judged])
    allowed = _values(makers["eager"]())
    base, ids = _base(small)
    exact = _values(_step(base.double(), "eager", small, ids))
    errors = {key: _rms(allowed[key], truth) for key, truth in exact.items()}
    floor = 4 * torch.finfo(case.dtype).eps
    limits = {"loss": 2 * max(errors.pop("loss"), floor), "gradient": 2 * max(*errors.values(), floor)}
    for name in judged:
        try:
            verdicts[name] = _verdict(_values(warmed(makers[name]())), exact, limits)
        except Exception as failure:  # a compiler or driver may raise anything; the other providers go on
            verdicts[name] = f"failed: {type(failure).__name__}: {failure}".strip().splitlines()[0]
    return verdicts


def _verdict(got: dict[str, Tensor], exact: dict[str, Tensor], limits: dict[str, float]) -> str:
    if got.keys() != exact.keys():
        return f"wrong: trains {sorted(got.keys() ^ exact.keys())} or does not"
    for key, truth in exact.items():
        error, limit = _rms(got[key], truth), limits[key.partition(" ")[0]]
        if not error <= limit:  # nor NaN
            return f"wrong: {key} is off by {error:.2e} (RMS, relative), allowed {limit:.2e}"
    return "ok"


def warmed(step: TrainingStep) -> TrainingStep:
    """The step after two of a learning rate of 0: layers learn in their first steps who is called with the same x."""
    if step.optimizer is not None:
        groups = step.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        step.run()
        step.run()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    return step


def _values(step: TrainingStep) -> dict[str, Tensor]:
    """The loss and every factor's gradient, in float64."""
    loss = step.loss()
    factors = factors_of(step.model)
    grads = torch.autograd.grad(loss, list(factors.values()))
    found = {f"gradient of {name}": grad for name, grad in zip(factors, grads, strict=True)}
    return {name: value.detach().double() for name, value in {"loss": loss, **found}.items()}


def _rms(value: Tensor, truth: Tensor) -> float:
    """Root-mean-square difference over the truth's root mean square."""
    return ((value - truth).square().mean() / truth.square().mean()).sqrt().item()
