"""`python -m lowrank_fused.demo`: the demo with its settings on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..benchmark import parse_dtype
from ..errors import UnsupportedError
from .run import Settings, run

DEFAULT = Settings()


def main(
    snippets: Annotated[int, typer.Option(help="Snippets to learn from.")] = DEFAULT.snippets,
    held_out: Annotated[int, typer.Option(help="Snippets to judge by.")] = DEFAULT.held_out,
    batch_size: Annotated[int, typer.Option(help="Snippets in a step.")] = DEFAULT.batch_size,
    epochs: Annotated[int, typer.Option(help="Times every snippet is learned from.")] = DEFAULT.epochs,
    dropout: Annotated[float, typer.Option(help="Adapter dropout of the second, short training.")] = DEFAULT.dropout,
    dropout_steps: Annotated[int, typer.Option(help="Steps of the second training.")] = DEFAULT.dropout_steps,
    seed: Annotated[int, typer.Option(help="Of the head, of A and of the order of batches.")] = DEFAULT.seed,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16 weights; bf16 on a GPU.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the JSON.")] = DEFAULT.out,
    cache: Annotated[Path, typer.Option(help="Folder for the downloaded text.")] = DEFAULT.cache,
) -> None:
    """Fine-tune MiniLM on movie-review snippets with PEFT's LoRA and with this package, and compare them."""
    try:
        result = run(
            Settings(
                snippets=snippets,
                held_out=held_out,
                batch_size=batch_size,
                epochs=epochs,
                dropout=dropout,
                dropout_steps=dropout_steps,
                seed=seed,
                device=None if device is None else torch.device(device),
                dtype=None if dtype is None else parse_dtype(dtype),
                out=out,
                cache=cache,
            )
        )
    except (UnsupportedError, ValueError) as error:
        typer.echo(f"lowrank_fused demo: {error}", err=True)
        sys.exit(2)
    if not result.agrees:
        typer.echo("lowrank_fused demo: the two losses differ by more than rounding", err=True)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
