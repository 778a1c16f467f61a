"""What pytest-benchmark's JSON says of the machine: GPU, clocks, driver and versions beside its own facts."""

from __future__ import annotations

from typing import Any

from lowrank_fused.tools.doctor import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Called once a run, when its machine is described."""
    machine_info["lowrank_fused"] = environment()
