"""Accelerated PEFT layers give PEFT's output and PEFT's gradients: every method, base layer, dtype and shape of x.

Each case is built once and copied, and one of the two is accelerated. In fp32 they agree to rounding. In 16 bits both
are judged against PEFT's own arithmetic in float64, by the rule of `lowrank_fused.testing`. A reader without a case
fails, and so does a case that takes another path than it declares.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_fused as lf
from lowrank_fused.peft import readers
from lowrank_fused.testing import assert_as_accurate_as_torch

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore:.*{word}.*" for word in ("fan_in_fan_out", "lora_bias", "invalid shape", "rank_pattern", "eva"))
)

IN, P = 24, 0.1


class Net(nn.Module):
    """Layers on one input: the bias of the first trains, that of the second doesn't, the third has none."""

    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        self.trained, self.frozen, self.plain = nn.Linear(IN, 18), nn.Linear(IN, 30), nn.Linear(IN, 12, bias=False)
        if conv1d:
            self.stored = Conv1D(18, IN)
            nn.init.normal_(self.stored.weight, std=IN**-0.5)
            nn.init.normal_(self.stored.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.trained(x), self.frozen(x), self.plain(x)]
        if hasattr(self, "stored"):
            # Conv1D needs x as a matrix without a copy.
            y.append(self.stored(x if x.stride(-1) == 1 else x.contiguous()))
        return torch.cat(y, -1)


def layers(model: Any) -> dict[str, Any]:
    return dict(model.base_model.model.named_children())


def move(model: nn.Module) -> None:
    """Whatever trains, away from its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def eva(model: nn.Module) -> None:
    """Ranks and directions from the inputs of some batches."""
    batches = [torch.randn(64, IN) * torch.logspace(0, -2, IN)] * 4
    peft.initialize_lora_eva_weights(
        model, batches, forward_fn=lambda m, x: m(x.to(next(m.parameters()).dtype)), show_progress_bar=False,
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=lambda x, *_: x[0].float(),
    )  # fmt: skip
    move(model)


def mask_triplets(model: nn.Module) -> None:
    """What AdaLoRA's allocator does during training: E of the less important triplets is zero."""
    move(model)
    with torch.no_grad():
        layers(model)["frozen"].lora_E["default"].mul_(2)
    for step in range(1, 11):
        model(torch.randn(8, IN).to(next(model.parameters()).dtype)).square().mean().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    left = [int((layer.lora_E["default"] != 0).sum()) for layer in layers(model).values()]
    assert min(left) < 4 and min(left) > 0, left


def drop_triplets(model: nn.Module) -> None:
    """What PEFT does when it loads such an adapter: each layer has its own rank, divided by the old one."""
    mask_triplets(model)
    model.base_model.resize_modules_by_rank_pattern(model.peft_config["default"].rank_pattern, "default")
    assert min(len(layer.lora_E["default"]) for layer in layers(model).values()) < 4


@dataclass(frozen=True)
class Case:
    """Adapters of a layer, all of them active, by PEFT's config classes and settings; `adjust` has the last word.

    path, and why if it isn't the fused one: without dropout and with. A case that `starts` differs from another in
    the values it starts with alone.
    """

    adapters: tuple[tuple[str, dict[str, Any]], ...]
    adjust: Callable[[nn.Module], None] = move
    path: tuple[str, str] = ("fused", "")
    dropped_path: tuple[str, str] = ("fused", "")
    conv1d: bool = True
    starts: bool = False


def one(config: str, **settings: Any) -> Case:
    fields = {f.name for f in dataclasses.fields(Case)} - {"adapters"}
    return Case(
        ((config, {k: v for k, v in settings.items() if k not in fields}),),
        **{k: v for k, v in settings.items() if k in fields},
    )


def dropout_field(config: str) -> str | None:
    """What PEFT calls the probability in this config."""
    fields = dataclasses.fields(getattr(peft, config)) if hasattr(peft, config) else ()
    return next((field.name for field in fields if field.name.endswith("_dropout")), None)


_DORA = "DoRA with dropout, which in PEFT acts on the input of the base weight too"
_BESIDE = "several adapters, one of which depends on the weight"
_ADALORA = {"init_r": 4, "target_r": 3, "total_step": 10, "tinit": 1, "lora_alpha": 6}
_VERA = {"r": 8, "d_initial": 0.5}

# Named after our method, then what is special about it.
CASES = {
    "lora": one("LoraConfig", r=4, lora_alpha=6),
    "lora-rslora": one("LoraConfig", r=4, use_rslora=True, starts=True),
    "lora-bias": one("LoraConfig", r=4, lora_bias=True),
    "lora-pissa": one("LoraConfig", r=4, init_lora_weights="pissa", starts=True),
    "lora-olora": one("LoraConfig", r=4, init_lora_weights="olora", starts=True, conv1d=False),
    "lora-orthogonal": one("LoraConfig", r=4, init_lora_weights="orthogonal", starts=True),
    "lora-gaussian": one("LoraConfig", r=4, init_lora_weights="gaussian", starts=True),
    "lora-random": one("LoraConfig", r=4, init_lora_weights=False, starts=True),
    "lora-eva": one("LoraConfig", r=4, init_lora_weights="eva", adjust=eva, starts=True),
    "lora-two": Case((("LoraConfig", {"r": 3}), ("LoraConfig", {"r": 5, "lora_bias": True}))),
    "dora": one("LoraConfig", r=4, use_dora=True, dropped_path=("original", _DORA)),
    "dora-lora": Case(
        (("LoraConfig", {"r": 3}), ("LoraConfig", {"r": 4, "use_dora": True})),
        path=("original", _BESIDE),
        dropped_path=("original", _DORA),
    ),
    "adalora": one("AdaLoraConfig", **_ADALORA),
    "adalora-masked": one("AdaLoraConfig", **_ADALORA, adjust=mask_triplets),
    "adalora-resized": one("AdaLoraConfig", **_ADALORA, adjust=drop_triplets),
    "vera": one("VeraConfig", **_VERA),
    "vera-two": Case((("VeraConfig", _VERA), ("VeraConfig", _VERA))),
    "vblora": one("VBLoRAConfig", r=3, num_vectors=12, vector_length=6),
    "unilora": one("UniLoraConfig", r=3, theta_d_length=40),
    "unilora-saved": one("UniLoraConfig", r=3, theta_d_length=300, save_indices=True),
    "peanut": one("PeanutConfig", r=4, conv1d=False),
    "peanut-deep": one("PeanutConfig", r=4, depth=1, act_fn="gelu", scaling=0.5, conv1d=False),
    "peanut-tanh": one("PeanutConfig", r=4, depth=2, act_fn="tanh", conv1d=False),
    "miss": one("MissConfig", r=6, conv1d=False),
    "miss-uneven": one("MissConfig", r=7, init_weights=False, conv1d=False),
    "miss-mini": one("MissConfig", r=8, init_weights="mini", mini_r=3, conv1d=False),
    "miss-two": Case((("MissConfig", {"r": 5}), ("MissConfig", {"r": 7})), conv1d=False),
    "tinylora": one("TinyLoraConfig", u=5),
    "tinylora-tied": one("TinyLoraConfig", r=3, u=5, weight_tying=0.5, init_weights="uniform"),
}


@dataclass(frozen=True)
class Mode:
    """Dtype of the base model and of x; adapters are fp32, PEFT's default, or like the base; autocast to bf16."""

    base: torch.dtype
    fp32_adapters: bool = True
    autocast: bool = False
    x: torch.dtype | None = None


MODES = {
    "fp32": Mode(torch.float32),
    "bf16": Mode(torch.bfloat16, fp32_adapters=False),
    "fp16": Mode(torch.float16, fp32_adapters=False),
    "bf16-fp32": Mode(torch.bfloat16),
    "fp16-fp32": Mode(torch.float16),
    "autocast-fp32": Mode(torch.float32, autocast=True),
    "autocast-bf16": Mode(torch.bfloat16, autocast=True),
    "autocast-mixed": Mode(torch.bfloat16, autocast=True, x=torch.float32),
}

# The last two are no whole block of memory.
SHAPES: dict[str, Callable[[], Tensor]] = {
    "2-D": lambda: torch.randn(40, IN),
    "3-D": lambda: torch.randn(4, 10, IN),
    "transposed": lambda: torch.randn(IN, 10, 4).permute(2, 1, 0),
    "sliced": lambda: torch.randn(5, 9, IN + 5)[..., 3:-2],
}


def built(name: str, mode: Mode = MODES["fp32"], p: float = 0.0, seed: int = 0) -> Any:
    """A PEFT model in training mode whose adapters do something."""
    case = CASES[name]
    torch.manual_seed(seed)
    model: Any = Net(case.conv1d).to(mode.base)
    targets = [key for key, _ in model.named_children()]
    for i, (config, settings) in enumerate(case.adapters):
        if not hasattr(peft, config):
            pytest.skip(f"PEFT {peft.__version__} has no {config}")
        dropout = {dropout_field(config): p} if p else {}
        made = getattr(peft, config)(target_modules=targets, **settings, **dropout)
        if i == 0:
            model = peft.get_peft_model(model, made, autocast_adapter_dtype=mode.fp32_adapters)
        else:
            # PEFT 0.18 gives further adapters the dtype of the base.
            known = "autocast_adapter_dtype" in inspect.signature(model.add_adapter).parameters
            model.add_adapter(f"more{i}", made, **({"autocast_adapter_dtype": mode.fp32_adapters} if known else {}))
    if len(case.adapters) > 1:
        model.base_model.set_adapter(list(model.peft_config))
    case.adjust(model)
    layers(model)["trained"].base_layer.bias.requires_grad_(True)
    return model.train()


@dataclass
class Run:
    """Output and gradients by name, and the random generator's state after the forward pass."""

    found: dict[str, Tensor]
    rng: Tensor


def run(
    model: nn.Module, x: Tensor, mode: Mode = MODES["fp32"], *, dy: Tensor | None = None, seed: int = 0,
    through: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
) -> Run:  # fmt: skip
    """One step on x, without an optimiser."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
    generator.manual_seed(seed)
    with torch.autocast(x.device.type, torch.bfloat16) if mode.autocast else nullcontext():
        y = through(model, x)
    rng = generator.get_state()
    y.backward(upstream(y) if dy is None else dy)
    grads = {f"d{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Run({"y": y.detach(), "dx": x.grad, **grads}, rng)


def upstream(y: Tensor) -> Tensor:
    """A gradient that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(y.numel())
    return torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.device, y.dtype)


class Replay(nn.Module):
    """Drops what another dropout module dropped last."""

    keep: Tensor

    def __init__(self, module: nn.Dropout) -> None:
        super().__init__()
        module.register_forward_hook(self.record)
        self.scale = 1 / (1 - module.p)

    def record(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.keep = out != 0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep * self.scale


class Exact:
    """A model's computation in float64, with the masks that the model drew last."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).double()
        self.replays = []
        for path, module in model.named_modules():
            if type(module) is nn.Dropout:
                parent, _, name = path.rpartition(".")
                self.replays.append(Replay(module))
                self.model.get_submodule(parent)[name] = self.replays[-1]
        self.inputs: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def run(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        self.inputs.append((x.double(), dy.double(), [replay.keep for replay in self.replays]))
        return run(self.model, x.double(), dy=dy.double()).found

    def sizes(self) -> Iterator[dict[str, Tensor]]:
        """Every run so far again, of absolute values: how large intermediates are. The last thing to ask for."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data.abs_()
        for x, dy, keeps in self.inputs:
            for replay, keep in zip(self.replays, keeps, strict=True):
                replay.keep = keep
            yield run(self.model, x.abs(), dy=dy.abs()).found


def paths(model: nn.Module) -> dict[tuple[str, str], int]:
    """(path, reason) -> calls."""
    taken: Counter[tuple[str, str]] = Counter()
    for row in lf.explain(model).rows:
        taken[row.path, row.reason] += row.calls
    return dict(taken)


def route_of(model: nn.Module, mode: Mode, p: float, device: torch.device | str) -> str:
    """`auto`, but for calls that it leaves to PEFT for speed alone one that runs ours."""
    (reader,) = {readers.layer_classes()[type(layer)] for layer in layers(model).values()}
    in_16_bits = (mode.x or mode.base) != torch.float32 and torch.device(device).type == "cpu"
    return "addmm" if reader.as_fast_in_16_bits and in_16_bits and not p else "auto"


def calls_of(name: str, p: float) -> tuple[str, str]:
    """The path that all calls of a case are declared to take, and why."""
    return CASES[name].dropped_path if p else CASES[name].path


def rates(name: str) -> tuple[float, ...]:
    """Without dropout, and with it where the method has any."""
    config = CASES[name].adapters[0][0]
    return (0.0, P) if dropout_field(config) or not hasattr(peft, config) else (0.0,)


def all_runs() -> Iterator[Any]:
    for name, case in CASES.items():
        for p in rates(name):
            everywhere = calls_of(name, p)[0] == "fused" and not case.starts
            for mode in MODES if everywhere else ("fp32", "bf16-fp32"):
                yield pytest.param(name, mode, p, id=f"{name}-{mode}{'-dropout' if p else ''}")


each_case = pytest.mark.parametrize("name", CASES)
each_dropped = pytest.mark.parametrize(
    "name", [name for name in CASES if P in rates(name) and calls_of(name, P)[0] == "fused"]
)


def test_every_reader_has_a_case():
    assert {name.partition("-")[0] for name in CASES} == set(readers.methods())
    used = set()
    for name, case in CASES.items():
        if hasattr(peft, case.adapters[0][0]):
            model = built(name)
            used |= {type(layer) for layer in layers(model).values()}
    # Layers on quantised weights are defined in files of their own.
    assert {layer for layer in readers.layer_classes() if layer.__module__.endswith(".layer")} == used


@pytest.mark.parametrize(("name", "mode", "p"), list(all_runs()))
def test_output_and_gradients_are_pefts(name, mode, p, device):
    mode = MODES[mode]
    theirs = built(name, mode, p).to(device)
    ours, exact = copy.deepcopy(theirs), Exact(theirs)
    lf.accelerate(ours, dropout="torch", route=route_of(theirs, mode, p, device))
    found = []
    for shape, draw in SHAPES.items():
        x = draw().to(device, mode.x or mode.base)
        expected, got = run(theirs, x, mode), run(ours, x, mode)
        assert torch.equal(got.rng, expected.rng), f"{shape}: the generator is not where PEFT leaves it"
        found.append((got.found, expected.found, exact.run(x, upstream(expected.found["y"]))))
    kinds: dict[str, list[tuple[Tensor, ...]]] = {}
    for (got, expected, reference), size in zip(found, exact.sizes(), strict=True):
        assert got.keys() == expected.keys()
        for key in got:
            kind = re.sub("|".join(layers(ours)), "*", key)
            kinds.setdefault(kind, []).append((got[key], expected[key], reference[key], size[key]))
    for kind, values in kinds.items():
        judge(kind, *(torch.cat([t.flatten() for t in tensors]) for tensors in zip(*values, strict=True)), mode)
    assert paths(ours) == {calls_of(name, p): len(layers(ours)) * len(SHAPES)}


@pytest.mark.parametrize(("name", "p"), [(name, p) for name in CASES for p in rates(name)])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "bf16-fp32"])
def test_no_tokens_give_zeros_as_in_peft(name, p, mode, device):
    mode = MODES[mode]
    theirs = built(name, mode, p).to(device)
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours, dropout="torch", route=route_of(theirs, mode, p, device))
    for shape in ((0, IN), (2, 0, IN)):
        x = torch.randn(shape, device=device, dtype=mode.base)
        expected, got = run(theirs, x, mode).found, run(ours, x, mode).found
        assert got.keys() == expected.keys()
        assert all(same(got[key], expected[key]) for key in expected)
    assert paths(ours) == {calls_of(name, p): 2 * len(layers(ours))}


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def judge(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, size: Tensor, mode: Mode) -> None:
    """Equal to rounding in fp32; otherwise as accurate as PEFT is.

    The latter takes elements by the hundred to be more than luck: all gradients of a kind count together. Autocast
    rounds to 16 bits on the way to results of any dtype.
    """
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, PEFT gives {theirs.dtype}"
    if mode == MODES["fp32"]:
        assert_equal_to_rounding(ours, theirs, name)
    elif mode.autocast:
        size = size * (torch.finfo(torch.bfloat16).eps / torch.finfo(ours.dtype).eps)
    assert_as_accurate_as_torch(ours, theirs, exact, name, size)


def assert_equal_to_rounding(ours: Tensor, theirs: Tensor, name: str = "y") -> None:
    """fp32 sums of some dozens of terms in another order: seen to differ by 5e-7 of the largest result."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference < 5e-6, f"{name}: {difference:.1e} beside PEFT's"


@each_case
def test_evaluation_is_pefts(name, device):
    theirs = built(name, p=rates(name)[-1]).to(device).eval()
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours)
    x = torch.randn(7, IN, device=device)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert_equal_to_rounding(ours(x), theirs(x))
    assert paths(ours) == {calls_of(name, 0.0): 2 * len(layers(ours))}


def test_a_layer_without_triplets_is_left_to_peft(device):
    theirs = built("adalora").to(device)
    kept = {f"{name}.lora_E.default": [name != "plain"] * 4 for name in layers(theirs)}
    theirs.base_model.resize_modules_by_rank_pattern(kept, "default")
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours)
    x = torch.randn(7, IN, device=device)
    expected, got = run(theirs, x).found, run(ours, x).found
    for key in expected:
        if expected[key].numel():
            assert_equal_to_rounding(got[key], expected[key], key)
    assert paths(ours) == {("fused", ""): 3, ("original", "every triplet is pruned"): 1}


def test_autocast_to_another_16_bit_dtype_is_left_to_peft(device):
    theirs = built("lora", MODES["fp16"]).to(device)
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours)
    x, mode = torch.randn(7, IN, device=device, dtype=torch.float16), Mode(torch.float16, autocast=True)
    expected, got = run(theirs, x, mode).found, run(ours, x, mode).found
    assert all(same(got[key], expected[key]) for key in expected)
    assert paths(ours) == {("original", "adapter in float16 under autocast to bfloat16"): len(layers(ours))}


@each_case
def test_fast_rounds_fp32_adapters_to_the_dtype_of_the_base(name, device):
    """To bf16, of 8 bits, at most some times on the way to anything; where terms cancel, each of them."""
    mode = MODES["bf16-fp32"]
    model = built(name, mode).to(device)
    exact = Exact(model)
    lf.accelerate(model, precision="fast")
    x = torch.randn(40, IN, device=device, dtype=torch.bfloat16)
    got = run(model, x, mode).found
    values = exact.run(x, upstream(got["y"]))
    (sizes,) = exact.sizes()
    for key, value in values.items():
        assert (got[key] - value).norm() < 0.02 * value.norm() + 2**-8 * sizes[key].norm(), key


@each_dropped
def test_our_dropout_leaves_the_mean(name, device):
    model = built(name, p=P).to(device)
    lf.accelerate(model)
    x = torch.randn(1, IN, device=device)
    with torch.no_grad():
        many = model(x.expand(4000, IN))
        mean, error = many.mean(0), many.std(0) / 4000**0.5
        assert (error > 0).all()
        assert ((mean - model.eval()(x)).abs() < 5 * error).all()
    assert paths(model) == {("fused", ""): 2 * len(layers(model))}


def test_our_dropout_has_the_rate(device):
    """Layers that return what dropout left of their input."""
    config = peft.LoraConfig(r=64, lora_alpha=64, lora_dropout=P, target_modules=["0", "1"])
    model = peft.get_peft_model(nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)]), config).to(device)
    lf.accelerate(model)
    first, second = model.base_model.model
    for one_of_them in (first, second):
        nn.init.zeros_(one_of_them.base_layer.weight)
        nn.init.eye_(one_of_them.lora_A["default"].weight)
        nn.init.eye_(one_of_them.lora_B["default"].weight)

    def kept(call: Callable[[Tensor], Tensor]) -> Tensor:
        y = call(torch.ones(3000, 64, device=device))
        assert ((y == 0) | ((y - 1 / (1 - P)).abs() < 1e-6)).all()
        return (y != 0).double()

    torch.manual_seed(5)
    masks = [kept(first), kept(first), kept(second)]
    for mask in masks:
        for count, fraction in ((64 * 3000, mask.mean()), (3000, mask.mean(0)), (64, mask.mean(1))):
            assert ((fraction - (1 - P)).abs() < 5 * (P * (1 - P) / count) ** 0.5).all()
    for one_mask, other in itertools.combinations(masks, 2):
        assert abs((one_mask == other).double().mean() - (P**2 + (1 - P) ** 2)) < 0.005, "masks depend on each other"
    torch.manual_seed(5)
    assert torch.equal(kept(first), masks[0])
    model.eval()
    assert torch.equal(first(torch.ones(3, 64, device=device)), torch.ones(3, 64, device=device))


@each_dropped
def test_gradients_belong_to_the_masks_of_our_dropout(name, device):
    """Slopes along a direction in each leaf, by differences in float64."""
    model = built(name, p=0.4).to(device).double()
    lf.accelerate(model)
    x = torch.randn(6, IN, device=device, dtype=torch.float64, requires_grad=True)

    def value(seed: int = 3) -> Tensor:
        torch.manual_seed(seed)
        y = model(x)
        return (y * upstream(y)).sum()

    value().backward()
    assert (value() - value(4)).abs() > 1e-3, "the seed does not matter"
    h = 1e-6
    for leaf_name, leaf in {"x": x, **dict(model.named_parameters())}.items():
        if leaf.requires_grad:
            direction = torch.randn_like(leaf)
            with torch.no_grad():
                leaf.add_(h * direction)
                above = value()
                leaf.sub_(2 * h * direction)
                slope = (above - value()) / (2 * h)
                leaf.add_(h * direction)
            expected = (leaf.grad * direction).sum()
            assert (slope - expected).abs() < 1e-6 * (leaf.grad * direction).abs().sum(), leaf_name
    assert set(paths(model)) == {("fused", "")}


@each_dropped
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "bf16-fp32"])
def test_checkpointing_draws_our_masks_again(name, mode, reentrant, device):
    mode = MODES[mode]
    model = built(name, mode=mode, p=P).to(device)
    lf.accelerate(model)
    x = torch.randn(6, IN, device=device, dtype=mode.base)
    plain = run(model, x, mode, seed=9).found
    again = run(model, x, mode, seed=9, through=lambda m, x: checkpoint(m, x, use_reentrant=reentrant)).found
    other = run(model, x, mode, seed=10).found
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    assert not torch.equal(other["y"], plain["y"])


def identity(model: nn.Module) -> list[Any]:
    """Everything about parameters, buffers and modules that has to stay what it is."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [
        [(key, value.data_ptr()) for key, value in model.state_dict().items()],
        [(key, id(tensor), tensor.data_ptr(), tensor.requires_grad) for key, tensor in tensors],
        [(key, id(module), module.training) for key, module in model.named_modules()],
    ]


@each_case
def test_the_model_keeps_its_tensors(name):
    model = built(name, p=rates(name)[-1])
    before, kinds = identity(model), [type(module) for module in model.modules()]
    attributes = [list(module.__dict__) for module in model.modules()]
    lf.accelerate(model)
    assert identity(model) == before
    run(model, torch.randn(3, IN))
    assert identity(model) == before
    lf.restore(model)
    assert identity(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert [list(module.__dict__) for module in model.modules()] == attributes


def loaded(name: str, folder: Path) -> Any:
    """The saved adapters on the weights that `built` starts from, by PEFT alone."""
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(Net(CASES[name].conv1d), folder)
    others = [f"more{i}" for i in range(1, len(CASES[name].adapters))]
    for other in others:
        model.load_adapter(folder / other, other)
    if others:
        model.base_model.set_adapter(["default", *others])
    return model.eval()


def saved(folder: Path) -> dict[str, Any]:
    """Weights byte for byte, and configs but for the order that PEFT writes a set in."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("adapter_model.*")
    }
    for path in folder.rglob("adapter_config.json"):
        config = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = config | {"target_modules": sorted(config["target_modules"])}
    return found


@each_case
def test_saved_files_do_not_tell_who_wrote_them(name, tmp_path):
    theirs = built(name).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(theirs)
    lf.accelerate(ours)
    ours.save_pretrained(tmp_path / "ours")
    assert saved(tmp_path / "ours") == saved(tmp_path / "theirs")
    assert len(saved(tmp_path / "ours")) == 2 * len(CASES[name].adapters)
    x = torch.randn(5, IN)
    by_peft, by_us = loaded(name, tmp_path / "ours"), loaded(name, tmp_path / "theirs")
    lf.accelerate(by_us)
    with torch.no_grad():
        expected = theirs(x)
        assert_equal_to_rounding(by_peft(x), expected)
        assert_equal_to_rounding(by_us(x), expected)
    assert paths(by_us) == {calls_of(name, 0.0): len(layers(by_us))}
