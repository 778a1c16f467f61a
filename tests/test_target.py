"""What is known of a machine, asked for eagerly and inside torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from lowrank_fused import target
from lowrank_fused.target import CPU, Target, target_of

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pretends that there is an H100; yields the questions that were put to it."""
    questions: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        questions.append(index)
        return 9, 0

    monkeypatch.setattr(target, "_targets", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    yield questions


def test_a_gpu_is_asked_once(asked: list[int]) -> None:
    assert target_of(DEVICE) == target_of(DEVICE) == Target(90, target.HAS_TRITON, "NVIDIA H100 80GB HBM3")
    assert asked == [0]


def test_old_gpus_run_no_kernels(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not target_of(DEVICE).has_triton


def test_the_cpu_is_no_target() -> None:
    assert target_of(torch.device("cpu")) is CPU


@pytest.mark.parametrize("known", [True, False])
def test_compiled_without_a_break_or_a_warning(asked: list[int], known: bool) -> None:
    def arch_added(x: torch.Tensor) -> torch.Tensor:
        return x + target_of(DEVICE).arch

    if known:
        target_of(DEVICE)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(arch_added, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)).item() == 90
