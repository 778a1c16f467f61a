"""torch.compile around accelerated PEFT models: one graph, no breaks, and no new graph for a number that changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank_fused as lf

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**config) -> nn.Module:
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64,
    )  # fmt: skip
    config = {"r": 4, "target_modules": TARGETS, **config}
    return moved(peft.get_peft_model(transformers.LlamaForCausalLM(shape), peft.LoraConfig(**config)))


def moved(model: nn.Module) -> nn.Module:
    """Every trained tensor away from its start, where B is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def step(function, model: nn.Module, tokens: int = 8) -> dict[str, Tensor]:
    """Loss and gradients, from the same random numbers in every call."""
    model.zero_grad()
    ids = torch.arange(2 * tokens).view(2, tokens) % 64
    torch.manual_seed(5)
    loss = function(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_graph_that_no_number_makes_anew(dropout):
    """Token count, seed and scale change; the second call on is served by the graph of the first."""
    model = llama(lora_dropout=dropout)
    report = lf.accelerate(model)
    assert report.of_path("fused") == 7
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same(step(compiled, model), step(model, model))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (12, 20, 9):
            assert_same(step(compiled, model, tokens), step(model, model, tokens))
        before = step(compiled, model)["loss"]
        torch.manual_seed(99)
        ids = torch.arange(16).view(2, 8) % 64
        other_mask = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        assert torch.equal(before, other_mask) == (dropout == 0.0)
        for scale in (3.0, 0.7):
            for layer in model.modules():
                if hasattr(layer, "set_scale"):
                    layer.set_scale("default", scale)
            expected = step(model, model)
            assert not torch.equal(expected["loss"], before)
            assert_same(step(compiled, model), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_default_compiler_agrees(dropout):
    """With random numbers that it takes from where eager code does."""
    model = llama(lora_dropout=dropout)
    lf.accelerate(model)
    with torch._inductor.config.patch(fallback_random=True):
        assert_same(step(torch.compile(model, fullgraph=True), model), step(model, model))


@pytest.mark.parametrize("dropout", ["fused", "torch"])
def test_accelerated_after_it_was_compiled(dropout):
    """The swap is noticed: one new graph, which is PEFT's numbers as before and still whole."""
    model = llama(lora_dropout=0.1)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_same(step(compiled, model), step(twin, twin))
    assert counter.frame_count == 1
    lf.accelerate(model, dropout=dropout)
    found = step(compiled, model)
    assert counter.frame_count == 2
    assert_same(found, step(model, model))
    if dropout == "torch":
        assert_same(found, step(twin, twin))
    lf.restore(model)
    assert_same(step(compiled, model), step(twin, twin))


CONFIGS = {
    "lora": ("LoraConfig", {"r": 4, "lora_dropout": 0.1}),
    "lora with its own bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "total_step": 10, "lora_dropout": 0.1}),
    "vera": ("VeraConfig", {"r": 4, "vera_dropout": 0.1}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 4}),
    "unilora": ("UniLoraConfig", {"r": 4, "theta_d_length": 40}),
    "peanut": ("PeanutConfig", {"r": 4, "depth": 1}),
    "miss": ("MissConfig", {"r": 4, "miss_dropout": 0.1}),
    "tinylora": ("TinyLoraConfig", {"r": 2, "u": 8}),
}


class Two(nn.Module):
    """Two layers of different widths, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_compiles_to_one_graph(name):
    kind, options = CONFIGS[name]
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    torch.manual_seed(0)
    model = moved(peft.get_peft_model(Two(), getattr(peft, kind)(target_modules=["first", "second"], **options)))
    report = lf.accelerate(model)
    assert report.of_path("fused") == 2, str(report)
    x = torch.randn(5, 12)

    def run(function) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        y = function(x)
        y.square().sum().backward()
        return {"loss": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    expected = {name: value.clone() for name, value in run(model).items()}
    assert len(expected) > 1
    assert_same(run(torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


def test_several_adapters_and_tensor_scales_compile():
    model = llama()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    moved(model)
    lf.accelerate(model)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling = {name: torch.tensor(value) for name, value in layer.scaling.items()}
    assert_same(step(torch.compile(model, backend="aot_eager", fullgraph=True), model), step(model, model))
    assert {row.path for row in lf.explain(model).rows} == {"fused"}
