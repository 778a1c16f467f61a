"""Without a GPU, Triton kernels run in Triton's interpreter; the switch must be set before they are defined."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a failure is a change; `--hypothesis-profile=explore` draws new ones.
settings.register_profile("explore", deadline=None)
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

# Tests are small: what they are about would be left to eager, as it is where a test says so.
os.environ["LOWRANK_FUSED_SMALL"] = "0"

# The compiler's own pool of processes costs more than the few kernels that a test compiles; other cores have tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def hasten_interpreter() -> None:
    """Leave out what Triton's interpreter does again and again, a quarter of its time.

    At every call of a device function it looks for what to patch in triton.language, where the launch of the kernel has
    patched everything already; and for every value it makes its table of dtypes.
    """
    with contextlib.suppress(ImportError):
        import triton.language as tl
        from triton.runtime import interpreter

        if not {"_LangPatchScope", "_patch_lang", "_get_np_dtype"} <= vars(interpreter).keys():
            return
        patch = interpreter._patch_lang

        def patch_once(function: Any) -> Any:
            languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
            if languages and not any(tl.core.is_builtin(module.load) for module in languages):
                return interpreter._LangPatchScope()
            return patch(function)

        of_scalar = functools.cache(interpreter._get_np_dtype)

        def dtype_of(kind: Any) -> Any:
            scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
            return of_pointer if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

        of_pointer = interpreter._get_np_dtype(tl.pointer_type(tl.float32))
        interpreter._patch_lang, interpreter._get_np_dtype = patch_once, dtype_of


if not torch.cuda.is_available():
    hasten_interpreter()


def _why_kernels_cannot_run() -> str | None:
    """The reason why kernels run neither on a GPU nor in the interpreter here."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return None

    def version(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])

    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        return f"the interpreter of triton {triton} cannot run loops of variable length with numpy 2.4 or newer"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_kernels_cannot_run()
    if reason:
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(pytest.mark.skip(reason=reason))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage, which tests ask for, need not look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def forget_compiled_graphs() -> Iterator[None]:
    """What one test compiled must not count against the recompile limit of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN (or large integers), so that nothing an output forgot to write looks plausible."""
    empty = torch.empty

    def poison(*args, **kwargs) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", poison)
