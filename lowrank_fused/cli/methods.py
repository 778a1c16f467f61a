"""`lowrank-fused methods`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .. import methods
from ..tools.footprint import count_in_model, method_facts
from ..tools.tables import show_counts, show_methods
from .common import JsonFlag, ModelOption, TargetsOption, TracebackFlag, err, in_a_sentence, out

__all__ = ["methods_command"]


def methods_command(
    model: ModelOption = None,
    targets: TargetsOption = "all",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank; each method has its own default.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="Only this one; may be repeated.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="A method's own option as name=value; may be repeated."),
    ] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """The methods: formula, what trains, bytes kept for backward; with --model how many parameters train in
    it.

    Counts come from the model class itself, built without weights.

    Examples:

      lowrank-fused methods

      lowrank-fused methods --model llama-3.1-8b --rank 16

      lowrank-fused methods --model roberta-base --targets qv --method loldu --rank 768
    """
    with in_a_sentence(traceback), err.status("counting"):
        names = method or list(methods.registry())
        facts = [method_facts(name) for name in names]
        chosen = _options(option)
        counts = [count_in_model(model, name, targets, rank, **chosen) for name in names] if model else []
    if as_json:
        content = {"methods": [asdict(fact) for fact in facts], "counts": [asdict(count) for count in counts]}
        print(json.dumps(content, indent=1, default=str))
    elif counts:
        show_counts(counts, out)
    else:
        show_methods(facts, out)


def _options(texts: list[str] | None) -> dict[str, Any]:
    """name=value pairs; a value is JSON where it can be (true, 0.5), else text."""
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option must be name=value, got {text!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
