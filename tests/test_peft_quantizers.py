"""PEFT's LoRA beside quantised layers of every library but bitsandbytes.

hqq, gptqmodel and torchao run as they are where they are installed. Where not, and for AWQ, AQLM, EETQ and INC always,
PEFT's own layer class runs on a stand-in for the library's: what a device would compute is not tested.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from base_layers import (
    FEATURES,
    MODES,
    NEW,
    K,
    N,
    Net,
    R,
    autocast_as_on_a_gpu,
    judge,
    lora,
    operands,
    paths,
    plain,
    run,
    twins,
)
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf
from lowrank_fused.peft import layers as accelerated_layers
from lowrank_fused.peft import readers

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*without `get_apply_tensor_subclass`:UserWarning")


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
