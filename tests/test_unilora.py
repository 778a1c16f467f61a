"""Uni-LoRA: factors from one vector, one gather a step, one sum a backward, PEFT's files both ways, two processes."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_fused as lf
from lowrank_fused import methods
from lowrank_fused.factors import gather as gather_ops
from lowrank_fused.inject import adapted_layers
from lowrank_fused.methods import Site
from lowrank_fused.tools.tiny_models import logits, tiny_model

CPU = torch.device("cpu")
RECIPES = ["table", "bijection"]
each_recipe = pytest.mark.parametrize("index", RECIPES)


def make_model(dtype: torch.dtype = torch.float64, **options) -> nn.Sequential:
    """Three layers of different shapes under one vector of 50 entries, and values that matter."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 12, dtype=dtype), nn.ReLU(), nn.Linear(12, 9, dtype=dtype), nn.Linear(9, 20, dtype=dtype)
    )
    settings = {"rank": 3, "theta_d_length": 50, "init_theta_d_bound": 0.5, **options}
    return lf.inject(model, method="unilora", **settings)


def theta_of(model: nn.Module) -> nn.Parameter:
    (theta,) = {id(layer.unilora_theta_d): layer.unilora_theta_d for layer in adapted_layers(model).values()}.values()
    return theta


def factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    terms = [layer.method.terms(layer, layer.matrix, layer.matrix[:0]) for layer in adapted_layers(model).values()]
    return [(t.a, t.b) for t in terms]


@each_recipe
def test_the_factors_are_as_long_as_the_vector(index):
    model = make_model(index=index)
    elements = torch.cat([factor.reshape(-1) for pair in factors(model) for factor in pair])
    torch.testing.assert_close(elements.norm(), theta_of(model).norm(), rtol=1e-12, atol=0)
    assert elements.numel() == 3 * (20 + 12 + 12 + 9 + 9 + 20)


@each_recipe
def test_a_vector_as_long_as_the_factors_is_a_permuted_lora(index):
    model = make_model(theta_d_length=246, index=index)
    elements = torch.cat([factor.reshape(-1) for pair in factors(model) for factor in pair])
    assert torch.equal(elements.sort().values, theta_of(model).sort().values)


def test_a_zero_vector_is_the_base_model():
    model = make_model()
    x = torch.randn(4, 20, dtype=torch.float64)
    with torch.no_grad():
        theta_of(model).zero_()
        found = model(x)
        with lf.disable(model):
            assert torch.equal(found, model(x))


def test_ranks_may_differ_and_layers_may_be_alone():
    model = make_model(rank_pattern={"2": 5})
    assert [tuple(a.shape) for a, _ in factors(model)] == [(3, 20), (5, 12), (3, 9)]
    x = torch.randn(4, 20, dtype=torch.float64)
    y = x
    for layer in model:
        y = layer.method.reference(y, layer.matrix, layer.bias, layer) if hasattr(layer, "method") else layer(y)
    torch.testing.assert_close(model(x), y)
    alone = lf.LowRankLinear.from_linear(nn.Linear(20, 12), method="unilora", rank=3, theta_d_length=10)
    assert alone.unilora_factors.projection.total == 96


def test_bad_options_are_refused():
    for options, said in [
        ({"theta_d_length": 0}, "theta_d_length must be an integer from 1"),
        ({"theta_d_length": 2.5}, "theta_d_length must be an integer"),
        ({"proj_seed": -1}, "proj_seed must be an integer from 0"),
        ({"init_theta_d_bound": 0.0}, "init_theta_d_bound must be positive"),
        ({"index": "hash"}, "index must be one of table, bijection"),
    ]:
        with pytest.raises(ValueError, match=said):
            lf.AdapterConfig("unilora", **options)
    with pytest.warns(UserWarning, match="more than the 246 elements"):
        make_model(theta_d_length=300)
    for seed in (2**31 + 11, 2**63 - 1):
        lf.AdapterConfig("unilora", proj_seed=seed, theta_d_length=524_288)


def test_too_many_elements_are_refused_when_they_are_used():
    weight = torch.empty(2**30, 2**30, device="meta")
    start = methods.init("unilora", weight, 4, 4.0, Site.alone(weight, 4))
    with pytest.raises(ValueError, match="8,589,934,592 elements, 2,147,483,647 are possible"):
        start.constants["unilora_factors"].projection.scale(CPU, torch.float32)


def test_copies_share_nothing_that_changes():
    model = make_model()
    twin = copy.deepcopy(model)
    ours, theirs = model[0].unilora_factors, twin[0].unilora_factors
    assert ours is model[2].unilora_factors and theirs is twin[2].unilora_factors
    assert ours == theirs and ours is not theirs and ours.generated is not theirs.generated
    assert ours != make_model(proj_seed=1)[0].unilora_factors
    assert hash(ours) == hash(theirs)
    assert len(pickle.dumps(ours)) < 400


# Work: what is launched, and when.


@pytest.fixture
def launches(monkeypatch):
    """Names of the gather kernels that ran since the last call; the interpreter runs them on the CPU."""
    from lowrank_fused.kernels.launch import record

    monkeypatch.setattr(gather_ops, "_uses_kernels", lambda like: like.dtype != torch.float64)
    with record() as log:

        def taken() -> list[str]:
            names = [launch.name for launch in log]
            log.clear()
            return names

        yield taken


@pytest.mark.triton
@pytest.mark.parametrize("options", [{}, {"index": "bijection"}, {"deterministic": False}], ids=str)
def test_one_gather_a_step_and_one_sum_a_backward(options, launches):
    model = make_model(torch.float32, **options)
    summing = "scatter_add" if options.get("deterministic") is False else "segment_sum"
    optimizer = torch.optim.SGD([theta_of(model)], lr=0.1)
    x = torch.randn(4, 20)
    for step in range(2):
        for micro_batch in range(3):
            y = checkpoint(model, x, use_reentrant=False) if micro_batch == 1 else model(x)
            assert launches() == (["gather"] if micro_batch == 0 else []), (step, micro_batch)
            y.square().sum().backward()
            assert launches() == [summing]
        optimizer.step()
        optimizer.zero_grad()
    with lf.hold_gradients(model):
        for _ in range(3):
            model(x).square().sum().backward()
        assert launches() == ["gather"]
    assert launches() == [summing]
    with torch.no_grad():
        model(x)
        model.eval()(x)
    assert launches() == []


@pytest.mark.triton
def test_every_change_of_the_vector_is_noticed(launches, tmp_path):
    model = make_model(torch.float32)
    x, theta = torch.randn(4, 20), theta_of(model)
    lf.save_adapter(model, tmp_path)
    first = model(x)
    assert launches() == ["gather"]

    def in_place():
        with torch.no_grad():
            theta.mul_(2)

    def by_an_optimizer():
        theta.grad = torch.ones_like(theta)
        torch.optim.AdamW([theta]).step()

    for change in (in_place, by_an_optimizer, lambda: lf.load_adapter(model, tmp_path)):
        before = model(x)
        change()
        after = model(x)
        assert launches() == ["gather"]
        assert not torch.equal(after, before)
    assert torch.equal(after, first)


@pytest.mark.triton
def test_layers_that_are_frozen_or_removed(launches):
    """What does not take part adds nothing to the gradient, and needs nothing else."""
    model = make_model(torch.float32)
    x, theta = torch.randn(4, 20), theta_of(model)
    model[2].enabled = False
    model[3] = model[3].original_linear()
    model(x).square().sum().backward()
    assert launches() == ["gather", "segment_sum"]
    found = theta.grad.clone()
    alone = copy.copy(model[0])
    y = alone.method.reference(x, alone.matrix, alone.bias, alone)
    (expected,) = torch.autograd.grad(model[1:](y).square().sum(), theta)
    torch.testing.assert_close(found, expected)
    theta.requires_grad_(False)
    theta.grad = None
    assert not model[0](x).requires_grad
    assert launches() == ["gather"]


# Gradients.


@each_recipe
def test_gradient_is_that_of_plain_indexing(index):
    model = make_model(index=index)
    x, theta = torch.randn(7, 20, dtype=torch.float64), theta_of(model)
    (ours,) = torch.autograd.grad(model(x).square().sum(), theta)
    total = model[0].unilora_factors.projection.total
    entries = model[0].unilora_factors.projection.entries(0, total, CPU).long()
    pairs = factors(model)
    grads = torch.autograd.grad(model(x).square().sum(), [f for pair in pairs for f in pair])
    flat = torch.cat([grad.reshape(-1) for grad in grads]) / entries.bincount()[entries].double().sqrt()
    expected = torch.zeros(50, dtype=torch.float64).index_put((entries,), flat, accumulate=True)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.triton
@each_recipe
def test_gradient_of_integers_is_exact_and_always_the_same(index, launches):
    """Powers of four as counts make every scale, product and sum exact."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    lf.inject(layers, method="unilora", rank=4, theta_d_length=64, index=index)  # 256 elements, four of each entry
    theta = theta_of(layers)
    with torch.no_grad():
        theta.copy_(2.0 * torch.randint(-1, 2, (64,)))
    upstream = [torch.randint(-3, 4, factor.shape).float() for pair in factors(layers) for factor in pair]

    def gradient() -> Tensor:
        loss = sum((factor * g).sum() for factor, g in zip(sum(factors(layers), ()), upstream, strict=True))
        return torch.autograd.grad(loss, theta)[0]

    entries = layers[0].unilora_factors.projection.entries(0, 256, CPU).long()
    flat = torch.cat([g.reshape(-1) for g in upstream])
    expected = torch.zeros(64).index_put((entries,), flat, accumulate=True) / 2
    assert torch.equal(gradient(), expected)
    assert all(torch.equal(gradient(), expected) for _ in range(3))
    assert launches().count("segment_sum") == 4


def test_a_compiled_model_needs_no_graph_break():
    model = make_model(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, theta = torch.randn(4, 20), theta_of(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        grads = [torch.autograd.grad(run(x).square().sum(), theta)[0] for run in (compiled, model)]
        torch.testing.assert_close(*grads)
        with torch.no_grad():
            theta.mul_(1.5)


@pytest.mark.triton
def test_a_compiled_layer_gathers_its_own_part(launches):
    """Nothing is remembered in a graph: all factors in every layer would be a square."""
    model = make_model(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 20)
    from lowrank_fused.kernels.launch import record

    with record() as log:
        compiled(x).square().sum().backward()
    assert [(launch.name, launch.args["count"]) for launch in log] == [("gather", n) for n in (96, 63, 87)]


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch import nn
import lowrank_fused as lf

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 20))
lf.inject(model, method="unilora", rank=3, theta_d_length=50, init_theta_d_bound=0.5)
joined, batches = model, torch.randn(3, 2, 2, 5, 20)
for parallel in (False, True):
    torch.manual_seed(1)
    with torch.no_grad():
        joined[0].unilora_theta_d.uniform_(-0.5, 0.5)
    run = nn.parallel.DistributedDataParallel(joined) if parallel else joined
    optimizer = torch.optim.AdamW([joined[0].unilora_theta_d], lr=0.05)
    for step in batches:
        for i, micro_batch in enumerate(step):
            mine = micro_batch[rank] if parallel else micro_batch.flatten(0, 1)
            if parallel and i == 0:
                with run.no_sync():
                    run(mine).square().mean().backward()
            else:
                run(mine).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(joined[0].unilora_theta_d.detach().clone(), f"{folder}/{rank}{parallel}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", TWO_PROCESSES]
    started = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root) for rank in range(2)]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    alone, *both = (torch.load(tmp_path / name) for name in ("0False.pt", "0True.pt", "1True.pt"))
    assert torch.equal(*both)
    torch.testing.assert_close(both[0], alone)
    assert (alone.abs() > 0).all()


# PEFT's files.

TARGETS = {
    "two of a kind": ["q_proj", "v_proj"],
    "two kinds in a block": ["q_proj", "down_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def of_peft(kind: str, targets: list[str], **settings) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.UniLoraConfig(r=3, theta_d_length=70, target_modules=targets, **settings)
    model = peft.get_peft_model(tiny_model(kind), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model.base_model.unilora_theta_d["default"].normal_(std=0.7)
    return model


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("save_indices", [False, True])
def test_pefts_files_are_read(targets, save_indices, tmp_path):
    theirs = of_peft("llama", targets, proj_seed=7, save_indices=save_indices, bias="unilora_only")
    theirs.save_pretrained(tmp_path)
    ours = lf.load_adapter(tiny_model("llama"), tmp_path)
    assert ours.model.layers[0].self_attn.q_proj.unilora_theta_d.numel() == 70
    base = logits(tiny_model("llama"))
    assert (logits(theirs) - base).abs().max() > 0.02
    close(logits(ours), logits(theirs))
    grads = []
    for model, theta in ((ours, theta_of(ours)), (theirs, theirs.base_model.unilora_theta_d["default"])):
        theta.requires_grad_()
        grads.append(torch.autograd.grad(logits(model).square().sum(), theta)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
def test_peft_reads_our_files(kind, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = lf.inject(tiny_model(kind), method="unilora", rank=3, theta_d_length=70, init_theta_d_bound=3, proj_seed=3)
    lf.save_adapter(model, tmp_path)
    assert list(json.loads((tmp_path / "adapter_config.json").read_text())) == sorted(
        ["base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_theta_d_bound", "modules_to_save"]
        + ["peft_type", "proj_seed", "r", "target_modules", "task_type", "theta_d_length", "unilora_dropout"]
    )
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    assert (logits(model) - logits(tiny_model(kind))).abs().max() > 0.002
    close(logits(model), logits(theirs))


def test_scales_that_peft_rounded_are_recognised(tmp_path):
    pytest.importorskip("peft")
    import peft

    config = peft.UniLoraConfig(r=3, theta_d_length=70, target_modules=["q_proj"], save_indices=True)
    peft.get_peft_model(tiny_model("llama").bfloat16(), config).save_pretrained(tmp_path)
    lf.load_adapter(tiny_model("llama"), tmp_path)


def test_saved_indices_of_another_recipe_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    of_peft("llama", ["q_proj", "v_proj"], save_indices=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.v_proj.unilora_indices_B"
    tensors[key][0, 0] = (tensors[key][0, 0] + 1) % 70
    save_file(tensors, file)
    model = tiny_model("llama")
    with pytest.raises(lf.CheckpointError, match="unilora_indices_B is not what its config gives here"):
        lf.load_adapter(model, tmp_path)
    assert not any(isinstance(module, lf.LowRankLinear) for module in model.modules())


def test_files_that_peft_cannot_read_say_so(tmp_path):
    for options in ({"index": "bijection"}, {"rank_pattern": {"0": 2}}):
        model = make_model(torch.float32, **options)
        lf.save_adapter(model, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["peft_type"] == "LOWRANK_FUSED_UNILORA"
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 9), nn.Linear(9, 20))
        x = torch.randn(4, 20)
        assert torch.equal(lf.load_adapter(fresh, tmp_path)(x), model(x))


def test_files_do_not_fit_adapters_of_another_seed(tmp_path):
    lf.save_adapter(make_model(torch.float32), tmp_path)
    with pytest.raises(lf.CheckpointError, match="seed 42.*seed 1"):
        lf.load_adapter(make_model(torch.float32, proj_seed=1), tmp_path)
