"""Which calls share their binaries: numbers that change during training never make Triton compile anew.

What decides is the key under which Triton caches a launch, which needs no GPU, but kernels that were not defined for
the interpreter: a process of its own finds them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"tokens": 8192, "scale": 2.0, "p": 0.1}
# Token counts that are served by the same tiles, as multiples of 16 and not.
CHANGES = [{"scale": 0.7}, {"scale": 1.0}, {"p": 0.2}, {"p": 0.5}, *({"tokens": m} for m in (8191, 8190, 8176, 8065))]
ROUTES, ARCHS = ("split", "thin", "single"), (80, 90, 100)
# Powers of two, their neighbours and what lies between.
TOKENS = sorted({m for power in range(14) for m in (2**power - 1, 2**power, 2**power + 1, 3 * 2**power // 2) if m})


def binaries(route: str, arch: int, tokens: int, scale: float, p: float) -> list[str]:
    """Kernel and cache key of every launch of a training step of one linear, in order."""
    import torch
    from triton.runtime import JITFunction

    from lowrank_fused.kernels.launch import record, targeting
    from lowrank_fused.routes.fused import SPLIT, THIN
    from lowrank_fused.routes.problem import Options
    from lowrank_fused.routes.single import SINGLE
    from lowrank_fused.tools.variants import binary_of

    engine = {"split": SPLIT, "thin": THIN, "single": SINGLE}[route]
    sizes = {"x": (tokens, 4096), "weight": (1024, 4096), "a": (16, 4096), "b": (1024, 16), "dy": (tokens, 1024)}
    t = {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    options = Options(scale, "none", p, True, True, True, False, False)
    with targeting(arch), record() as launches:
        _, saved = engine.forward(t["x"], t["weight"], t["a"], t["b"], None, None, seed, options)
        engine.backward(t["dy"], t["x"], t["weight"], t["a"], t["b"], None, saved, options)
    assert all(type(launch.kernel) is JITFunction for launch in launches), "something chooses tiles at run time"
    return [f"{launch.name} {binary_of(launch)}" for launch in launches]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[list[str]]]]:
    """Of every route and target: the binaries of the base call, of each change, and of each token count."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__], env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("route", ROUTES)
def test_scale_dropout_and_tokens_need_no_binary_of_their_own(route, arch, found):
    base, *changed = found[f"{route} {arch}"]["changes"]
    assert len(base) == {"split": 5, "thin": 4, "single": 4}[route]
    for change, binaries_of_it in zip(CHANGES, changed, strict=True):
        assert binaries_of_it == base, change


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("route", ROUTES)
def test_any_number_of_tokens_is_served_by_few(route, arch, found):
    """A handful for each launch, whatever lengths a training brings."""
    of_each = found[f"{route} {arch}"]["tokens"]
    assert len(of_each) == len(TOKENS)
    assert len({binary for step in of_each for binary in step}) <= 4 * len(of_each[-1])


if __name__ == "__main__":
    found_here = {
        f"{route} {arch}": {
            "changes": [binaries(route, arch, **{**BASE, **change}) for change in ({}, *CHANGES)],
            "tokens": [binaries(route, arch, **{**BASE, "tokens": tokens}) for tokens in TOKENS],
        }
        for route in ROUTES
        for arch in ARCHS
    }
    print(json.dumps(found_here))
