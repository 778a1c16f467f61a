"""Sharded, replicated and offloaded models: accelerated, they train as PEFT's do under the same wrapper.

Two processes on gloo run all cases, each twice, by PEFT and accelerated; the tests look at what they left behind.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lowrank_fused as lf
from lowrank_fused.grouping import group_of

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, VOCABULARY = 10, 4, 31
TARGETS = r".*(q|v|down)_proj"
LAYERS, DECODERS = 6, 2
TOLERANCE = 1e-5  # of an fp32 loss: the order of sums alone differs


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def peft_model(method: str = "lora", dtype: torch.dtype = torch.float32) -> PeftModel:
    config: Any = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.1)
    if method == "lora without dropout":
        config.lora_dropout = 0.0
    elif method == "dora":
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=True)
    elif method == "peanut":
        config = peft.PeanutConfig(r=4, target_modules=TARGETS, depth=1)
    return get_peft_model(llama().to(dtype), config).train()


def rows(rank: int, steps: int) -> Iterator[dict[str, Tensor]]:
    """Counting up from random numbers, others in each process."""
    g = torch.Generator().manual_seed(10 + rank)
    for _ in range(steps):
        ids = (torch.randint(0, VOCABULARY, (BATCH, 1), generator=g) + torch.arange(11)) % VOCABULARY
        yield {"input_ids": ids, "labels": ids}


def shared_by_groups(model: nn.Module) -> int:
    """How often q and v were computed from one read of x, in all decoder layers together."""
    groups = {id(group): group for module in model.modules() if (group := group_of(module)) is not None}
    return sum(group.shared for group in groups.values())


def calls_of(model: nn.Module) -> dict[str, int]:
    """ "path: reason" -> calls of all layers together."""
    calls: Counter[str] = Counter()
    for row in lf.explain(model).rows:
        calls[f"{row.path}: {row.reason}"] += row.calls or 0
    return dict(calls)


# Ways to wrap a model


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def ddp_with_an_unused_parameter(model: nn.Module) -> nn.Module:
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    return ddp(model, find_unused_parameters=True)


def checkpointed(model: nn.Module, wrap: Callable[..., nn.Module], *, use_reentrant: bool, **options: Any) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return wrap(model, **options)


def fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    """One unit per decoder layer."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def fsdp2_in_bf16(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return fsdp2(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp2_with_units_for_factors(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            fully_shard(module)
    return fsdp2(model)


def fsdp1(model: nn.Module, *, by_peft: bool, use_orig_params: bool) -> nn.Module:
    """Units of PEFT's policy, one per trainable leaf and decoder layer, or of decoder layers alone."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    layers = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    policy = fsdp_auto_wrap_policy(model) if by_peft else layers
    # Without a device FSDP1 looks for a GPU.
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


@dataclass(frozen=True)
class Case:
    """How a model is made and wrapped, what our layers do then, and how close the courses are.

    `path` may go on with the beginning of the reason. `fails` is the error that PyTorch or PEFT raises by itself.
    `shares` is how many forwards of a decoder layer q and v share.
    """

    wrap: Callable[[Any], nn.Module]
    path: str = "fused: "
    method: str = "lora"
    dtype: torch.dtype = torch.float32
    forwards: int = STEPS
    after: bool = False
    accumulates: bool = False
    tolerance: float = TOLERANCE
    fails: str = ""
    shares: int = 0


PATIENCE = timedelta(seconds=60)  # with the other process, when it failed
BF16 = 2**-8  # one rounding of a number near 1
RECOMPUTED = 2 * STEPS
OWN_UNITS = "original: the adapter holds a FullyShardedDataParallel"
NEEDS_WHOLE = "original: depends on a base weight"
GROUPED = {"method": "lora without dropout", "shares": STEPS - 1}  # found out in the first step
CASES = {
    "ddp": Case(ddp),
    "ddp, q and v share x": Case(ddp, **GROUPED),
    "ddp, accelerated after": Case(ddp, after=True),
    "ddp, unused parameters": Case(ddp_with_an_unused_parameter),
    "ddp, static graph": Case(functools.partial(ddp, static_graph=True)),
    "ddp, checkpointed": Case(functools.partial(checkpointed, wrap=ddp, use_reentrant=False), forwards=RECOMPUTED),
    "ddp, checkpointed reentrant": Case(
        functools.partial(checkpointed, wrap=ddp, use_reentrant=True, static_graph=True), forwards=RECOMPUTED
    ),
    "ddp, no_sync": Case(ddp, accumulates=True),
    "ddp, no_sync, dora": Case(ddp, method="dora", accumulates=True),
    "ddp, no_sync, peanut": Case(ddp, method="peanut", accumulates=True, shares=STEPS - 2),
    "fsdp2": Case(fsdp2),
    "fsdp2, q and v share x": Case(fsdp2, **GROUPED),
    "fsdp2, checkpointed, q and v share x": Case(
        functools.partial(checkpointed, wrap=fsdp2, use_reentrant=False),
        forwards=RECOMPUTED,
        method="lora without dropout",
        shares=2 * (STEPS - 1),
    ),
    "fsdp2, accelerated after": Case(fsdp2, after=True),
    "fsdp2, checkpointed": Case(functools.partial(checkpointed, wrap=fsdp2, use_reentrant=False), forwards=RECOMPUTED),
    "fsdp2, checkpointed reentrant": Case(
        functools.partial(checkpointed, wrap=fsdp2, use_reentrant=True), forwards=RECOMPUTED
    ),
    "fsdp2, dora": Case(fsdp2, method="dora"),
    "fsdp2, peanut": Case(fsdp2, method="peanut", shares=STEPS - 1),
    "fsdp2, fp32 adapters on bf16": Case(fsdp2, dtype=torch.bfloat16, tolerance=BF16),
    "fsdp2, mixed precision": Case(fsdp2_in_bf16, tolerance=BF16),
    "fsdp2, factors apart": Case(fsdp2_with_units_for_factors, "original: a hook on FSDPLinear of the adapter"),
    "fsdp1, PEFT's units": Case(functools.partial(fsdp1, by_peft=True, use_orig_params=True), OWN_UNITS),
    "fsdp1, PEFT's units, flat": Case(functools.partial(fsdp1, by_peft=True, use_orig_params=False), OWN_UNITS),
    "fsdp1, PEFT's units, bf16": Case(
        functools.partial(fsdp1, by_peft=True, use_orig_params=True), OWN_UNITS, dtype=torch.bfloat16
    ),
    "fsdp1, decoder layers": Case(functools.partial(fsdp1, by_peft=False, use_orig_params=True), "tail: "),
    "fsdp1, decoder layers, dora": Case(
        functools.partial(fsdp1, by_peft=False, use_orig_params=True), NEEDS_WHOLE, method="dora"
    ),
    "fsdp1, decoder layers, flat": Case(
        functools.partial(fsdp1, by_peft=False, use_orig_params=False), fails="uniform `requires_grad`"
    ),
    "fsdp1, decoder layers, bf16": Case(
        functools.partial(fsdp1, by_peft=False, use_orig_params=True), dtype=torch.bfloat16, fails="uniform dtype"
    ),
    "fsdp1, PEFT's units, dora": Case(
        functools.partial(fsdp1, by_peft=True, use_orig_params=True), method="dora", fails="IndexError"
    ),
}


# What the two processes do


def train(model: nn.Module, case: Case, rank: int) -> list[float]:
    """The losses of this process."""
    torch.manual_seed(7 + rank)
    # Not Adam, which doesn't mind a gradient that is wrong by a factor.
    rate = 1.0 if case.method == "peanut" else 0.1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    losses = []
    for step, batch in enumerate(rows(rank, STEPS)):
        waits = case.accumulates and step % 2 == 0
        with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            loss = model(**batch).loss
            loss.backward()
        if not waits:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter as a whole, by PEFT's name."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    sharded = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if sharded else contextlib.nullcontext():
        found = {}
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
            if "lora_" in name or "peanut_" in name:
                found[name] = whole.detach().clone()
    return found


def course(case: Case, rank: int, *, accelerated: bool) -> dict[str, Any]:
    """Losses, adapters and calls of one training; or its error."""
    try:
        model = peft_model(case.method, case.dtype)
        if accelerated and not case.after:
            lf.accelerate(model, dropout="torch", strict=True)
        wrapped = case.wrap(model)
        if accelerated and case.after:
            lf.accelerate(wrapped, dropout="torch")
        losses = train(wrapped, case, rank)
        calls = calls_of(wrapped) if accelerated else {}
        shared = shared_by_groups(wrapped)
        return {"losses": losses, "adapters": whole_adapters(wrapped), "calls": calls, "shared": shared, "error": ""}
    except Exception:
        return {"error": traceback.format_exc()}


def evaluated_after_edits(method: str, *, accelerated: bool) -> list[float]:
    """Loss of a sharded model at first, and each time its shards have been changed without an optimiser."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model = peft_model(method).eval()
    if accelerated:
        lf.accelerate(model)
    fsdp2(model)
    batch = next(rows(0, 1))

    def loss() -> float:
        """In a forward that is differentiated, since nothing is remembered of others."""
        value = model(**batch).loss
        value.backward()
        model.zero_grad()
        return value.item()

    losses = [loss()]
    g = torch.Generator().manual_seed(3)
    full = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=full)
    for name, value in state.items():
        if "lora_" in name or "peanut_" in name:
            state[name] = value + 0.3 * torch.randn(value.shape, generator=g)
    set_model_state_dict(model, state, options=full)
    losses.append(loss())
    for factor in (1.5, 0.3, 3.0, 0.4, 2.0):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.to_local().mul_(factor)
        losses.append(loss())
    return losses


EDITED = ("lora", "dora", "peanut")


def one_process(rank: int, folder: Path) -> None:
    """Run every case and leave the results in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE)
    known = [name for name, case in CASES.items() if case.method != "peanut" or hasattr(peft, "PeanutConfig")]
    results: dict[str, Any] = {
        name: [course(CASES[name], rank, accelerated=accelerated) for accelerated in (False, True)] for name in known
    }
    for method in EDITED:
        if method != "peanut" or hasattr(peft, "PeanutConfig"):
            results[f"edited {method}"] = [evaluated_after_edits(method, accelerated=a) for a in (False, True)]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process left; they run once, whichever worker of the test session asks first."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = base.parent / "distributed" if shared else tmp_path_factory.mktemp("distributed")
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "log").exists():
            (folder / "log").write_text(run_both(folder))
    files = [folder / f"{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), (folder / "log").read_text()[-6000:]
    return [torch.load(file) for file in files]


def run_both(folder: Path) -> str:
    """Run both processes, forks of one fresh interpreter that imports everything, and return what they printed."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=280
    )
    return done.stdout + done.stderr


# What they have to have found


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fails])
def test_trains_as_peft_does(name, results):
    case = CASES[name]
    if case.method == "peanut" and not hasattr(peft, "PeanutConfig"):
        pytest.skip(f"PEFT {peft.__version__} has no PEANuT")
    for of_rank in results:
        theirs, ours = of_rank[name]
        assert not theirs["error"], theirs["error"]
        assert not ours["error"], ours["error"]
        assert len(theirs["losses"]) == len(ours["losses"]) == STEPS
        assert sum(theirs["losses"][-3:]) < sum(theirs["losses"][:3]) - 0.2
        worst = max(abs(a - b) for a, b in zip(theirs["losses"], ours["losses"], strict=True))
        assert worst < case.tolerance
        ((path, calls),) = ours["calls"].items()
        assert path.startswith(case.path)
        assert calls == case.forwards * LAYERS
        assert ours["shared"] == case.shares * DECODERS and theirs["shared"] == 0
        assert len(ours["adapters"]) >= 2 * LAYERS
        assert ours["adapters"].keys() == theirs["adapters"].keys()
        if case.tolerance == TOLERANCE:
            for adapter, expected in theirs["adapters"].items():
                assert (ours["adapters"][adapter] - expected).norm() < TOLERANCE * expected.norm(), adapter
    first, second = (of_rank[name][1] for of_rank in results)
    assert first["losses"] != second["losses"]
    torch.testing.assert_close(first["adapters"], second["adapters"], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fails])
def test_fails_in_pytorch_with_or_without_us(name, results):
    for of_rank in results:
        theirs, ours = of_rank[name]
        assert CASES[name].fails in theirs["error"]
        assert CASES[name].fails in ours["error"]


@pytest.mark.parametrize("method", EDITED)
def test_nothing_is_remembered_of_shards(method, results):
    """A loaded state, or an edit of the shards in place, is seen by the next forward of what depends on the factors."""
    if method == "peanut" and not hasattr(peft, "PeanutConfig"):
        pytest.skip(f"PEFT {peft.__version__} has no PEANuT")
    for of_rank in results:
        theirs, ours = of_rank[f"edited {method}"]
        assert min(abs(a - b) for a, b in zip(theirs, theirs[1:], strict=False)) > 20 * TOLERANCE
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


# Weights that wait elsewhere until a hook of Accelerate's fetches them


def offloaded_to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """By a device map that leaves the second decoder layer on disk; hooks on everything."""
    places = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "rotary_emb": "cpu"}
    device_map = {f"base_model.model.model.{name}": place for name, place in places.items()}
    device_map["base_model.model.lm_head"] = "cpu"
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


HOOKED = "original: a hook on Linear of the adapter"
OFFLOADS = {
    "cpu": (offloaded_to_cpu, {HOOKED: STEPS * LAYERS}),
    "disk": (offloaded_to_disk, {HOOKED: STEPS * LAYERS}),
    "device map": (dispatched, {HOOKED: STEPS * LAYERS}),
}


def go(model: nn.Module) -> list[float]:
    """Train what is not offloaded; evaluate where everything is."""
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_meta]
    if trained:
        return train(model, Case(nn.Identity), 0)
    torch.manual_seed(7)
    with torch.no_grad():
        return [model(**batch).loss.item() for batch in rows(0, STEPS)]


@pytest.mark.parametrize("after", [False, True], ids=["accelerated before", "accelerated after"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_offloaded_adapters_are_left_to_peft(name, after, tmp_path):
    """Nothing of ours reads a weight that is not there; a hook that a layer had before us may even keep us out."""
    offload, expected = OFFLOADS[name]
    theirs = go(offload(peft_model(), tmp_path / "theirs"))
    model = peft_model()
    if not after:
        lf.accelerate(model, dropout="torch", strict=True)
    model = offload(model, tmp_path / "ours")
    if after:
        lf.accelerate(model, dropout="torch")
    assert go(model) == theirs
    assert calls_of(model) == expected or (after and name == "device map" and calls_of(model) == {})
    lf.restore(model)
    assert model(**next(rows(0, 1))).loss.isfinite()  # whatever the hooks have kept of our layers


def test_base_behind_hooks_computes_itself():
    """transformers' `device_map` hooks the base layers before PEFT wraps them."""

    def hooked() -> PeftModel:
        base = accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.1)).train()

    theirs, model = go(hooked()), hooked()
    report = lf.accelerate(model, dropout="torch", strict=True)
    assert report.of_path("tail") == LAYERS
    assert go(model) == pytest.approx(theirs, abs=TOLERANCE)
    ((path, calls),) = calls_of(model).items()
    assert path.startswith("tail: ")
    assert calls == STEPS * LAYERS


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    pair = [fork.Process(target=one_process, args=(rank, Path(sys.argv[1])), daemon=True) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
