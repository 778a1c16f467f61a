"""`lowrank-fused doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..tools.doctor import diagnose
from ..tools.tables import show_diagnosis
from .common import CHECK_FAILED, NO_GPU, JsonFlag, TracebackFlag, err, in_a_sentence, out

__all__ = ["doctor"]


def doctor(
    as_json: JsonFlag = False,
    check: Annotated[bool, typer.Option(help="Compute a small layer by every route, against float64.")] = True,
    need_gpu: Annotated[bool, typer.Option("--need-gpu", help="Exit with 3 where the kernels cannot run.")] = False,
    traceback: TracebackFlag = False,
) -> None:
    """What is installed here, which routes can run, and why the others cannot.

    Examples:

      lowrank-fused doctor

      lowrank-fused doctor --json > machine.json

      lowrank-fused doctor --need-gpu && python train.py
    """
    with in_a_sentence(traceback), err.status("looking around"):
        diagnosis = diagnose(self_check=check)
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=1))
    else:
        show_diagnosis(diagnosis, out)
    if not diagnosis.works:
        raise typer.Exit(CHECK_FAILED)
    if need_gpu and not diagnosis.environment["gpus"]:
        err.print("no CUDA device here", style="red")
        raise typer.Exit(NO_GPU)
