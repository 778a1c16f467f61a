"""What commands share: two consoles, exit statuses, common options, errors told in a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from ..errors import LowRankFusedError, UnsupportedError
from ..tools.model_shapes import MODELS, LinearShape

__all__ = [
    "CHECK_FAILED",
    "EXIT_CODES",
    "NO_GPU",
    "OK",
    "USAGE",
    "JsonFlag",
    "ModelOption",
    "TargetsOption",
    "TracebackFlag",
    "err",
    "in_a_sentence",
    "out",
    "parse_shape",
]

OK, CHECK_FAILED, USAGE, NO_GPU = 0, 1, 2, 3
EXIT_CODES = (
    "Exit status: 0 all well; 1 a check failed (a provider is not accurate, the installation does not work, "
    "the demo cannot run); 2 a mistake in the command; 3 a GPU is needed and none is there."
)

out, err = Console(), Console(stderr=True)

ModelOption = Annotated[str | None, typer.Option("--model", help=f"A model by name: {', '.join(MODELS)}.")]
TargetsOption = Annotated[
    str,
    typer.Option("--targets", help="Linears to adapt: all, qv, or module names with commas, as q_proj,v_proj."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
TracebackFlag = Annotated[bool, typer.Option("--traceback", help="On an error, show where in the code it came from.")]


@contextlib.contextmanager
def in_a_sentence(traceback: bool, unsupported: int = USAGE) -> Iterator[None]:
    """Turn the package's errors into one line on stderr and an exit status."""
    try:
        yield
    except (ValueError, TypeError, LowRankFusedError, ImportError) as error:
        if traceback:
            raise
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(unsupported if isinstance(error, UnsupportedError) else USAGE) from None


def parse_shape(text: str) -> LinearShape:
    """Sizes of a layer from "1024x4096", in x out features."""
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"a shape must be in x out features such as 1024x4096, got {text!r}")
    return LinearShape("", int(sizes[0]), int(sizes[1]), bias=False, count=1)
