"""PEFT's LoRA beside layers of bitsandbytes, which run as they are: 4 and 8 bits, on a CPU."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
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
    adapted,
    autocast,
    judge,
    layer_of,
    lora,
    operands,
    paths,
    plain,
    run,
    twins,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_fused as lf

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning", "ignore:Unmerge lora module:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed"),
]


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
