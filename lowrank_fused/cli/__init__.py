"""The command `lowrank-fused`, one file per subcommand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from ..demo.__main__ import main as demo
from .bench import bench
from .common import EXIT_CODES
from .doctor import doctor
from .inspect import inspect
from .methods import methods_command
from .report import report
from .reproduce import reproduce_command
from .roofline import roofline
from .tune import tune

__all__ = ["app", "main"]

COMMANDS: dict[str, Callable[..., Any]] = {
    "doctor": doctor,
    "methods": methods_command,
    "bench": bench,
    "inspect": inspect,
    "roofline": roofline,
    "tune": tune,
    "report": report,
    "demo": demo,
    "reproduce": reproduce_command,
}

app = typer.Typer(
    name="lowrank-fused",
    help="Kernels for fine-tuning with LoRA-family adapters: look at this machine, at the methods, measure.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for name, command in COMMANDS.items():
    app.command(name, epilog=EXIT_CODES)(command)


def main() -> None:
    """Entry point of `lowrank-fused`."""
    app()
