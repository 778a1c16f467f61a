"""PEFT's LoRA beside base layers that multiply by themselves: quantised ones, and any other whose product isn't ours.

bitsandbytes, hqq, gptqmodel and torchao run as they are where they are installed. Where not, and for AQLM, EETQ and
INC always, PEFT's own layer class runs on a stand-in for the library's: what a device would compute is not tested.
"""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank_fused as lf
from lowrank_fused.peft import layers as accelerated_layers
from lowrank_fused.peft import readers
from lowrank_fused.testing import assert_as_accurate_as_torch

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning", "ignore:Unmerge lora module:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*without `get_apply_tensor_subclass`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed"),
]

K, N, R = 64, 96, 4
NEW = tuple(int(part) for part in peft.__version__.split(".")[:2]) >= (0, 19)


# What the layers stand on


def plain(bias: bool) -> nn.Linear:
    """The same numbers in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(K, N, bias=bias).requires_grad_(False)


def bnb(name: str, bias: bool, **settings: Any) -> nn.Module:
    """A layer of bitsandbytes that holds `plain`, quantised."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = getattr(library.nn, name)(K, N, bias=bias, **settings)
    layer.load_state_dict(plain(bias).state_dict())
    return layer.to("cpu").requires_grad_(False)


BITSANDBYTES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("Linear4bit", dict(quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False)),
    "nf4-double": ("Linear4bit", dict(quant_type="nf4", compute_dtype=torch.float32)),
    "nf4-bf16": ("Linear4bit", dict(quant_type="nf4", compute_dtype=torch.bfloat16)),
    "nf4-stored-bf16": (
        "Linear4bit",
        dict(quant_type="nf4", compute_dtype=torch.float32, quant_storage=torch.bfloat16),
    ),
    "fp4-fp16": ("Linear4bit", dict(quant_type="fp4", compute_dtype=torch.float16)),
    "int8": ("Linear8bitLt", dict(has_fp16_weights=False)),
    "int8-outliers": ("Linear8bitLt", dict(has_fp16_weights=False, threshold=2.0)),
}


class Net(nn.Module):
    """One layer, and a parameter that floats, which PEFT looks for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer
        self.other = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(
        **{"r": R, "lora_alpha": 6, "target_modules": ["fc"], "init_lora_weights": False, **settings}
    )


def adapted(base: nn.Module, dtype: torch.dtype = torch.float32, adapters: int = 1, **settings: Any) -> nn.Module:
    """A PEFT model of one layer over `base`; the second adapter has another rank and scale."""
    net = Net(base)
    kind = type(base).__name__
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "Linear4bit", kind == "Linear8bitLt"
    torch.manual_seed(1)
    model = peft.get_peft_model(net, lora(**settings))
    if adapters == 2:
        model.add_adapter("second", lora(**{"r": 2, "lora_alpha": 7, **settings}))
        model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
            if name.endswith("bias"):
                parameter.data.normal_()
    return model


def twins(make: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The same model twice, the first accelerated."""
    ours, theirs = make(), make()
    lf.accelerate(ours, **{"dropout": "torch", **settings})
    return ours, theirs


def layer_of(model: nn.Module) -> Any:
    found = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    return found[0]


def paths(model: nn.Module) -> dict[tuple[str, str], int | None]:
    return {(row.path, row.reason): row.calls for row in lf.explain(model).rows}


# How results are judged


def run(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, dy: Tensor, amp: Any = None) -> dict:
    """y, dx and every gradient of a parameter; x enters by a product, so that no leaf does."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    with amp() if amp else nullcontext():
        y = function(leaf * 1)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach().clone(), "x": leaf.grad, **grads}


def in_float64(model: nn.Module, x: Tensor, dy: Tensor, alone: dict, view: Callable = lambda t: t) -> dict[str, Tensor]:
    """What the layer's result is when the adapters are exact, beside the base layer's own rounded product `alone`.

    With `abs` as the view: how large intermediates are.
    """
    layer = layer_of(model)
    leaf = view(x.double()).requires_grad_()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    leaves = {name: view(p.detach().double()).requires_grad_() for name, p in trained}
    y = view(alone["y"].double())
    torch.manual_seed(5)
    for adapter in layer.active_adapters:
        dropout = layer.lora_dropout[adapter]
        on = isinstance(dropout, nn.Dropout) and dropout.training
        keep = F.dropout(torch.ones_like(x), dropout.p) != 0 if on else 1.0
        of = {n.rpartition("lora_")[2]: t for n, t in leaves.items() if f".{adapter}." in n}
        s = F.linear(leaf * keep / (1 - dropout.p if on else 1), of[f"A.{adapter}.weight"])
        y = y + F.linear(s, of[f"B.{adapter}.weight"], of.get(f"B.{adapter}.bias")) * layer.scaling[adapter]
    dx, *grads = torch.autograd.grad(y, [leaf, *leaves.values()], view(dy.double()))
    return {"y": y.detach(), "x": view(alone["x"].double()) + dx, **dict(zip(leaves, grads, strict=True))}


def judge(ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor, amp: Any = None) -> None:
    """Everything that comes out of both models, by the rule of `lowrank_fused.testing`."""
    layer_of(theirs)._disable_adapters = True
    alone = run(theirs, theirs, x, dy, amp)
    layer_of(theirs)._disable_adapters = False
    found, known = run(ours, ours, x, dy, amp), run(theirs, theirs, x, dy, amp)
    exact, size = in_float64(theirs, x, dy, alone), in_float64(theirs, x, dy, alone, torch.abs)
    assert found.keys() == known.keys() == exact.keys() and len(found) >= 4
    for name, value in found.items():
        assert_as_accurate_as_torch(value, known[name], exact[name], name, size[name])


def operands(dtype: torch.dtype, *leading: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(leading))
    return tuple(torch.randn(*leading, size, generator=generator).to(dtype) for size in (K, N))  # type: ignore[return-value]


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def autocast_as_on_a_gpu() -> Iterator[None]:
    """PEFT's quantised layers ask for autocast on CUDA, wherever x is, and then leave the cast of x to it."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@dataclass(frozen=True)
class Mode:
    x: torch.dtype
    adapter: torch.dtype
    amp: Callable[[], AbstractContextManager] | None = None


MODES = {
    "fp32": Mode(torch.float32, torch.float32),
    "bf16": Mode(torch.bfloat16, torch.bfloat16),
    "fp32-beside-bf16": Mode(torch.bfloat16, torch.float32),
    "fp32-beside-fp16": Mode(torch.float16, torch.float32),
    "autocast": Mode(torch.float32, torch.float32, autocast),
    "autocast-gpu": Mode(torch.float32, torch.float32, autocast_as_on_a_gpu),
    "autocast-gpu-bf16": Mode(torch.bfloat16, torch.float32, autocast_as_on_a_gpu),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "two": {"adapters": 2},
    "two-dropped": {"adapters": 2, "lora_dropout": 0.1},
    "lora-bias": {"lora_bias": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", BITSANDBYTES)
def test_bitsandbytes_gives_pefts_numbers(base, mode, feature):
    name, settings = BITSANDBYTES[base]
    kind = MODES[mode]
    bias = feature in ("plain", "lora-bias")
    ours, theirs = twins(lambda: adapted(bnb(name, bias, **settings), kind.adapter, **FEATURES[feature]))
    x, dy = operands(kind.x, 3, 23)
    judge(ours, theirs, x, dy, kind.amp)
    for model in (ours, theirs):
        model.eval()
    judge(ours, theirs, x.flatten(0, 1), dy.flatten(0, 1), kind.amp)
    assert paths(ours) == {("tail", ""): 2}
    assert [row.path for row in lf.accelerate(ours, dropout="torch").rows] == ["tail"] * FEATURES[feature].get(
        "adapters", 1
    )


@pytest.mark.parametrize("base", BITSANDBYTES)
def test_bitsandbytes_without_gradients_and_without_tokens(base):
    name, settings = BITSANDBYTES[base]
    ours, theirs = twins(lambda: adapted(bnb(name, True, **settings)))
    if name == "Linear4bit":
        none = torch.zeros(2, 0, K, requires_grad=True)
        assert ours(none).shape == theirs(none).shape == (2, 0, N)
    x = operands(torch.float32, 3, 4)[0]
    for training in (True, False):  # the last call: for some processors it packs the weight anew, for inference alone
        with torch.no_grad() if training else torch.inference_mode():
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


# What is written into


@pytest.fixture
def products(monkeypatch) -> list[Tensor]:
    """What bitsandbytes' products return, in the order of calls."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    seen: list[Tensor] = []

    def spy(function):
        def call(*args, **kwargs):
            seen.append(function(*args, **kwargs))
            return seen[-1]

        return call

    for name in ("matmul", "matmul_4bit"):
        monkeypatch.setattr(library, name, spy(getattr(library, name)))
    return seen


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_the_term_is_added_where_bitsandbytes_left_its_product(base, bias, leading, grad, products):
    """Whether autograd calls that a view or a leaf: the memory of the product is the result's."""
    name, settings = BITSANDBYTES[base]
    ours, _ = twins(lambda: adapted(bnb(name, bias, **settings)))
    x, dy = operands(torch.float32, *leading)
    with torch.set_grad_enabled(grad):
        y = ours(x.requires_grad_() * 1)
    assert y.data_ptr() == products[0].data_ptr()
    if grad:
        y.backward(dy)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_what_a_hook_on_the_base_layer_saw_stays(base):
    name, settings = BITSANDBYTES[base]
    ours, theirs = twins(lambda: adapted(bnb(name, False, **settings)))
    seen: list[Tensor] = []
    for model in (ours, theirs):
        layer_of(model).base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x, dy = operands(torch.float32, 7)
    judge(ours, theirs, x, dy)
    alone, first, second = seen
    assert torch.equal(alone, first) and torch.equal(first, second)
    assert paths(ours) == {("tail", ""): 1}


class Recording(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Squashing(nn.Linear):
    """The backward of sigmoid looks at its result."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Handing(nn.Linear):
    """Gives back what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class Slicing(nn.Linear):
    """Part of a larger product, which isn't contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.weight, self.weight]))[..., : self.out_features]


class Outer(nn.Linear):
    """Leaves the work to a layer within, on which somebody may have put a hook."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.inner = nn.Linear(k, n)
        self.inner.register_forward_hook(lambda module, args, output: setattr(self, "last", output))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Rounding(nn.Linear):
    """Returns another dtype than it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16())


class Keyword(nn.Linear):
    """Takes more than x."""

    def forward(self, x: Tensor, *, factor: float | None = 1.0) -> Tensor:
        return super().forward(x) * (3.0 if factor is None else factor)


def foreign(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls(K, K if cls is Handing else N)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("cls", [Recording, Squashing, Handing, Slicing, Outer, Keyword], ids=lambda c: c.__name__)
def test_a_linear_layer_of_another_class_keeps_what_it_returned(cls, feature):
    ours, theirs = twins(lambda: adapted(foreign(cls), **FEATURES[feature]))
    x, dy = operands(torch.float32, 9)
    dy = dy[:, :K] if cls is Handing else dy
    judge(ours, theirs, x, dy)
    assert paths(ours) == {("tail", ""): 1}
    if hasattr(layer_of(ours).base_layer, "last"):
        assert torch.equal(layer_of(ours).base_layer.last, layer_of(theirs).base_layer.last)


def test_adapters_of_several_dtypes():
    """None is computed in less than its own."""

    def make() -> nn.Module:
        model = adapted(foreign(Recording), adapters=2)
        model.add_adapter("third", lora(r=3))
        model.base_model.set_adapter(["default", "second", "third"])
        for name, parameter in model.named_parameters():
            if "second" not in name:
                parameter.data = parameter.data.bfloat16()
        return model

    ours, theirs = twins(make)
    judge(ours, theirs, *operands(torch.bfloat16, 60))
    assert paths(ours) == {("tail", ""): 1}


def test_a_base_layer_that_returns_another_dtype():
    ours, theirs = twins(lambda: adapted(foreign(Rounding)))
    judge(ours, theirs, *operands(torch.float32, 40))
    assert paths(ours) == {("tail", ""): 1}


@pytest.mark.parametrize("given", [None, 2.0])
def test_arguments_of_the_base_layer_reach_it(given):
    ours, theirs = twins(lambda: adapted(foreign(Keyword)))
    x, dy = operands(torch.float32, 5)
    found, known = (run(lambda t, m=m: layer_of(m)(t, factor=given), m, x, dy) for m in (ours, theirs))
    for name, value in found.items():
        torch.testing.assert_close(value, known[name])


@pytest.mark.parametrize("trained", ["both", "base alone"])
def test_a_base_weight_that_trains(trained):
    def make() -> nn.Module:
        model = adapted(foreign(nn.Linear))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("base_layer" in name or ("lora_" in name and trained == "both"))
        return model

    ours, theirs = twins(make)
    x, dy = operands(torch.float32, 2, 5)
    results = []
    for model in (ours, theirs):
        y = model(x)  # no gradient for x: with frozen adapters only y itself wants one
        y.backward(dy)
        results.append({"y": y} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    found, known = results
    assert found.keys() == known.keys() and len(found) == (5 if trained == "both" else 3)
    for name, value in found.items():
        torch.testing.assert_close(value, known[name], msg=lambda m, name=name: f"{name}: {m}")
    assert paths(ours) == {("tail", ""): 1}


def test_lora_on_top_of_another_tuners_layer():
    """The inner layer hands on its own base layer's result, which a hook there has seen."""
    seen: list[Tensor] = []

    def make() -> nn.Module:
        torch.manual_seed(1)
        net = Net(foreign(nn.Linear))
        model = peft.get_peft_model(net, peft.LoHaConfig(r=2, target_modules=["fc"]), mixed=True)
        model.add_adapter("lora", lora())
        model.set_adapter(["default", "lora"])
        for module in model.modules():
            if type(module) is nn.Linear and module.out_features == N and module.in_features == K:
                module.register_forward_hook(lambda module, args, output: seen.append(output))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        return model

    ours, theirs = twins(make)
    assert type(layer_of(ours).base_layer).__name__.endswith("Linear") and layer_of(ours).base_layer.base_layer
    x, dy = operands(torch.float32, 6)
    for active in (["default", "lora"], ["lora"]):
        for model in (ours, theirs):
            model.set_adapter(active)
        found, known = (run(m, m, x, dy) for m in (ours, theirs))
        for name, value in found.items():
            torch.testing.assert_close(value, known[name], msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(*seen[-2:])
    assert paths(ours)["tail", ""] == 2


@pytest.mark.parametrize("where", ["base layer", "everywhere"])
@pytest.mark.parametrize("order", ["offload first", "accelerate first"])
def test_weights_that_are_offloaded(where, order):
    hooks = pytest.importorskip("accelerate.hooks")

    def offload(model: nn.Module) -> None:
        layer = layer_of(model).base_layer if where == "base layer" else model
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        hooks.attach_align_device_hook(layer, execution_device="cpu", offload=True, weights_map=state)

    ours, theirs = adapted(foreign(nn.Linear)), adapted(foreign(nn.Linear))
    for step in order, "the other":
        offload(ours) if step == "offload first" or (step, order) == (
            "the other",
            "accelerate first",
        ) else lf.accelerate(ours)
    assert layer_of(ours).base_layer.weight.is_meta
    x = operands(torch.float32, 2, 3)[0]
    torch.testing.assert_close(ours(x), theirs(x))
    taken = paths(ours)
    assert len(taken) == 1 and list(taken)[0][0] == ("tail" if where == "base layer" else "original"), taken


# What PEFT and trainers do around the layers


def memory_kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for backward, each storage once, without parameters and x itself."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(("adapter", "share"), [(torch.bfloat16, 0.55), (torch.float32, 0.35)], ids=str)
@pytest.mark.parametrize("base", ["nf4-bf16", "int8"])
def test_less_is_kept_for_backward(base, adapter, share):
    name, settings = BITSANDBYTES[base]
    ours, theirs = twins(lambda: adapted(bnb(name, False, **settings), adapter, lora_dropout=0.1), dropout="fused")
    x = operands(torch.bfloat16, 256)[0].requires_grad_()
    assert 0 < memory_kept(ours, x) <= share * memory_kept(theirs, x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", ["nf4-bf16", "int8"])
def test_checkpointing(base, reentrant):
    name, settings = BITSANDBYTES[base]
    ours, theirs = twins(lambda: adapted(bnb(name, True, **settings), adapters=2, lora_dropout=0.2))
    x, dy = operands(torch.bfloat16, 2, 8)
    plainly = run(ours, ours, x, dy)
    again = run(lambda t: checkpoint(ours, t, use_reentrant=reentrant), ours, x, dy)
    for name, value in again.items():
        assert torch.equal(value, plainly[name]), name
    judge(ours, theirs, x, dy)


@pytest.mark.parametrize("amp", [None, autocast])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_llama_prepared_for_training_on_few_bits(bits, amp, tmp_path):
    """Loaded, prepared with checkpointing and trained as PEFT's guide to quantisation does."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path)
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    config = transformers.BitsAndBytesConfig(**(four if bits == 4 else dict(load_in_8bit=True)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}
    )
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, lora(target_modules="all-linear", lora_dropout=0.1, init_lora_weights=True))
    ours, theirs = model, copy.deepcopy(model)
    assert lf.accelerate(ours, dropout="torch").of_path("tail") == 14
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    losses: list[list[float]] = []
    for each in (ours.train(), theirs.train()):
        losses.append([])
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], 1e-2)
        for _ in range(4):
            with amp() if amp else nullcontext():
                loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    found, known = (torch.tensor(curve) for curve in losses)
    assert known[-1] < known[0] - 0.1
    rounding = 1e-5 if amp is None else 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found, known, rtol=rounding, atol=0.0)
    assert paths(ours) == {("tail", ""): 14 * 4 * 2}


@pytest.mark.parametrize("base", ["nf4-bf16", "int8"])
def test_compiling_to_one_graph(base):
    name, settings = BITSANDBYTES[base]
    ours, _ = twins(lambda: adapted(bnb(name, True, **settings)), dropout="fused")
    x, dy = operands(torch.bfloat16, 2, 8)
    known = run(ours, ours, x, dy)
    found = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), ours, x, dy)
    for name, value in found.items():
        torch.testing.assert_close(value, known[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_dora_is_pefts(base):
    name, settings = BITSANDBYTES[base]
    ours, theirs = twins(lambda: adapted(bnb(name, True, **settings), use_dora=True))
    reason = "DoRA beside a base layer that multiplies by itself"
    (row,) = lf.accelerate(ours, dropout="torch").rows
    assert (row.method, row.path, row.reason) == ("dora", "original", reason)
    x, dy = operands(torch.float32, 5)
    found, known = run(ours, ours, x, dy), run(theirs, theirs, x, dy)
    assert all(torch.equal(value, known[name]) for name, value in found.items()) and len(found) == 5
    assert paths(ours) == {("original", reason): 1}
    with pytest.raises(lf.NotAcceleratedError, match=reason):
        lf.accelerate(ours, strict=True)


def base_state(model: nn.Module) -> list[Tensor]:
    """All that the layer holds, adapters aside: merging replaces the quantised weight."""
    return [t for name, t in model.state_dict().items() if "lora_" not in name]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_merging_and_all_else_of_pefts(base, safe):
    """Bit for bit, since PEFT does it. Its merge of 4 bits spoils the weight on some CPUs, and does so here too."""
    name, settings = BITSANDBYTES[base]
    ours, theirs = twins(lambda: adapted(bnb(name, False, **settings), adapters=2))
    x = operands(torch.float32, 2, 3)[0].requires_grad_()  # if not, some processors pack the weight anew in eval

    def both(act: Callable[[Any], Any]) -> None:
        for model in (ours, theirs):
            act(model)

    def same(*, exactly: bool, **more: Any) -> None:
        found, known = (model(x, **more) for model in (ours, theirs))
        torch.testing.assert_close(found, known, **(dict(rtol=0.0, atol=0.0) if exactly else {}))

    same(exactly=False)
    with ours.disable_adapter(), theirs.disable_adapter():
        same(exactly=True)
    both(lambda model: model.eval())
    with torch.no_grad():
        same(exactly=True, adapter_names=["second", "__base__"])
    both(lambda model: layer_of(model).scale_layer(2.0))
    same(exactly=False)
    both(lambda model: layer_of(model).unscale_layer())
    both(lambda model: model.base_model.set_adapter("second"))
    same(exactly=False)
    both(lambda model: model.delete_adapter("default"))
    same(exactly=False)
    both(lambda model: model.merge_adapter(safe_merge=safe))
    assert all(map(torch.equal, base_state(ours), base_state(theirs)))
    same(exactly=True)
    assert paths(ours)["original", "adapters merged"] == 1
    both(lambda model: model.unmerge_adapter())
    assert all(map(torch.equal, base_state(ours), base_state(theirs)))
    same(exactly=False)
    both(lambda model: model.add_adapter("third", lora(init_lora_weights=True)))
    same(exactly=False)
    assert type(lf.restore(ours).base_model.model.fc) is type(theirs.base_model.model.fc)
    same(exactly=True)
    assert all(map(torch.equal, base_state(ours.merge_and_unload()), base_state(theirs.merge_and_unload())))


@pytest.mark.parametrize("base", ["nf4-double", "int8"])
def test_copies_and_pickles(base):
    name, settings = BITSANDBYTES[base]
    ours, theirs = twins(lambda: adapted(bnb(name, True, **settings)))
    x, dy = operands(torch.float32, 2, 3)
    known = run(theirs, theirs, x, dy)
    for again in (copy.deepcopy, through_a_file):
        model = again(ours)
        assert type(layer_of(model)) is type(layer_of(ours)) and layer_of(model) is not layer_of(ours)
        for name, value in run(model, model, x, dy).items():
            torch.testing.assert_close(value, known[name], msg=lambda m, name=name: f"{name}: {m}")
        assert paths(model) == {("tail", ""): 1}


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["vera", "adalora"])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_other_methods_too(base, method):
    if method == "vera" and not NEW:
        pytest.skip("PEFT 0.18 has classes of its own for VeRA on bitsandbytes")
    name, settings = BITSANDBYTES[base]
    config = {
        "vera": lambda: peft.VeraConfig(r=8, target_modules=["fc"], d_initial=0.5, vera_dropout=0.1),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_modules=["fc"], total_step=9, lora_dropout=0.1),
    }[method]

    def make() -> nn.Module:
        net = Net(bnb(name, True, **settings))
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = name == "Linear4bit", name == "Linear8bitLt"
        model = peft.get_peft_model(net, config())
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        return model

    ours, theirs = twins(make)
    x, dy = operands(torch.float32, 2, 3)
    found, known = run(ours, ours, x, dy), run(theirs, theirs, x, dy)
    for name, value in found.items():
        torch.testing.assert_close(value, known[name], msg=lambda m, name=name: f"{name}: {m}")
    assert paths(ours) == {("tail", ""): 1} and len(found) == {"vera": 4, "adalora": 5}[method]


# PEFT's other classes, on a stand-in


class Int8(nn.Module):
    """Keeps small integers and a scale for each row, and multiplies by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.infeatures = K
        self.out_features = self.outfeatures = N
        weight = plain(False).weight
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scales.to(x.dtype))


@dataclass(frozen=True)
class Library:
    """The file of PEFT's class, and what has to be there for PEFT to define it."""

    file: str
    layer: str
    available: str = ""
    imports: tuple[tuple[str, str], ...] = ()


LIBRARIES = {
    "gptq": Library("gptq", "GPTQLoraLinear"),
    "awq": Library("awq", "AwqLoraLinear"),
    "aqlm": Library("aqlm", "AqlmLoraLinear"),
    "torchao": Library("torchao", "TorchaoLoraLinear"),
    "hqq": Library("hqq", "HqqLoraLinear", "is_hqq_available", (("hqq.core.quantize", "HQQLinear"),)),
    "eetq": Library("eetq", "EetqLoraLinear", "is_eetq_available", (("eetq", "EetqLinear"),)),
    "inc": Library("inc", "IncLoraLinear", "is_inc_available"),
}


@pytest.fixture
def layer_class(request, monkeypatch) -> type[nn.Module]:
    """PEFT's class for a library that needn't be there, defined anew with a stand-in for what it imports."""
    library = LIBRARIES[request.param]
    place = f"peft.tuners.lora.{library.file}"
    if library.available:
        monkeypatch.setattr(peft.import_utils, library.available, lambda: True)
        for name, attribute in library.imports:
            for part in itertools.accumulate(name.split("."), "{}.{}".format):
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
            monkeypatch.setattr(sys.modules[name], attribute, Int8, raising=False)
        importlib.import_module(place)
        monkeypatch.setattr(peft.tuners.lora, library.file, sys.modules[place])
        monkeypatch.delitem(sys.modules, place)
    cls = getattr(importlib.import_module(place), library.layer)
    for made in accelerated_layers.accelerated_classes().values():
        monkeypatch.setattr(accelerated_layers, made.__name__, made)  # pickles look for them there afterwards
    monkeypatch.setattr(accelerated_layers, "_classes", {})
    if hasattr(cls, "_check_dtype_supported"):
        monkeypatch.setattr(cls, "_check_dtype_supported", lambda self: None)
    return cls


def direct(cls: type[nn.Module], dtype: torch.dtype, adapters: int = 1, **settings: Any) -> nn.Module:
    """PEFT's layer built by its constructor, which took single settings before 0.19."""
    torch.manual_seed(1)
    settings = {"init_lora_weights": False, **settings}
    given = dict(config=peft.LoraConfig(**settings)) if NEW else settings
    extra = {} if NEW or cls.__name__ != "TorchaoLoraLinear" else {"get_apply_tensor_subclass": None}
    layer = cls(Int8(), "default", r=R, lora_alpha=6, **given, **extra)
    if adapters == 2:
        if NEW:
            layer.update_layer("second", 2, lora_alpha=7, config=peft.LoraConfig(**settings))
        else:
            more = dict(lora_dropout=0.0, use_rslora=False, use_dora=False, lora_bias=False) | settings
            layer.update_layer("second", 2, lora_alpha=7, **more)
        layer.set_adapter(["default", "second"])
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_("lora_" in name)
    return Net(layer)


@pytest.mark.parametrize("feature", ["plain", "two-dropped"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer_class", LIBRARIES, indirect=True)
def test_classes_for_other_libraries_give_pefts_numbers(layer_class, mode, feature):
    kind = MODES[mode]
    ours, theirs = twins(lambda: direct(layer_class, kind.adapter, **FEATURES[feature]))
    assert type(ours.fc).__mro__[2] is layer_class
    judge(ours, theirs, *operands(kind.x, 3, 23), kind.amp)
    assert paths(ours) == {("tail", ""): 1}
    lf.restore(ours)
    assert type(ours.fc) is layer_class


def test_every_class_of_a_quantised_layer_has_a_test():
    read = {place for cls in (readers.lora.Lora, readers.lora.LoraUncast) for place in places_of(cls)}
    assert read == {"lora.bnb:Linear4bit", "lora.bnb:Linear8bitLt"} | {
        f"lora.{library.file}:{library.layer}" for library in LIBRARIES.values()
    }


def places_of(reader: type[readers.Reader]) -> list[str]:
    return [place for place, cls in readers._READERS.all().items() if cls is reader]


@pytest.mark.parametrize("layer_class", LIBRARIES, indirect=True)
@pytest.mark.parametrize("amp", [nullcontext, autocast_as_on_a_gpu])
def test_masks_are_drawn_for_the_dtype_that_peft_drops_from(layer_class, amp, monkeypatch):
    """A GPU's random numbers depend on it."""
    ours, theirs = twins(lambda: direct(layer_class, torch.float32, lora_dropout=0.1))
    seen: list[torch.dtype] = []
    theirs.fc.lora_dropout["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    dropout = F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, *rest, **named: seen.append(x.dtype) or dropout(x, *rest, **named))
    x = operands(torch.bfloat16, 4)[0]
    with amp():
        ours(x)
        first = seen[:]
        theirs(x)
    assert first == seen[1:2], seen


@pytest.mark.parametrize("layer_class", ["gptq"], indirect=True)
def test_qalora_is_pefts(layer_class):
    def make() -> nn.Module:
        return direct(layer_class, torch.float32, use_qalora=True, qalora_group_size=16)

    ours, theirs = twins(make)
    x, dy = operands(torch.float32, 5)
    found, known = run(ours, ours, x, dy), run(theirs, theirs, x, dy)
    assert all(torch.equal(value, known[name]) for name, value in found.items())
    assert paths(ours) == {("original", "variant QALoraLinearVariant"): 1}


# The libraries themselves, where they are


def by_hqq() -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    return Net(hqq.HQQLinear(plain(True), settings, compute_dtype=torch.float32, device="cpu"))


def by_gptqmodel() -> nn.Module:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    if not NEW:
        pytest.skip("PEFT 0.18 goes with an older gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=4, group_size=32, sym=True, desc_act=False, in_features=K, out_features=N, bias=True,
        pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0, 0.02)
        elif name != "g_idx":
            buffer.random_(-(2**31), 2**31 - 1)
    layer.post_init()
    return Net(layer)


def by_torchao() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if not NEW:
        pytest.skip("PEFT 0.18 goes with an older torchao")
    net = Net(plain(True))
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "fc")
    return net


@pytest.mark.parametrize("make", [by_hqq, by_gptqmodel, by_torchao])
def test_other_libraries_themselves(make):
    def model() -> nn.Module:
        net = make()
        torch.manual_seed(1)
        return peft.get_peft_model(net.requires_grad_(False), lora(lora_dropout=0.1))

    ours, theirs = twins(model)
    for shape in ((6,), (2, 3)):
        judge(ours, theirs, *operands(torch.float32, *shape))
    assert paths(ours) == {("tail", ""): 2}
