"""`python -m lowrank_fused.demo`: the demo with its settings on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from ..benchmark import parse_dtype
from ..errors import UnsupportedError
from .comparison import Settings, run

DEFAULT = Settings()
FAILED, USAGE, NO_GPU = 1, 2, 3


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
    """Fine-tune MiniLM on movie-review snippets with PEFT's LoRA, the same accelerated, and our own; compare them."""
    try:
        settings = Settings(
            snippets=snippets,
            held_out=held_out,
            batch_size=batch_size,
            epochs=epochs,
            dropout=dropout,
            dropout_steps=dropout_steps,
            seed=seed,
            device=None if device is None else parse_device(device),
            dtype=None if dtype is None else parse_dtype(dtype),
            out=out,
            cache=cache,
        )
        if settings.device is not None and settings.device.type == "cuda" and not torch.cuda.is_available():
            stop(NO_GPU, "no CUDA device here; leave --device out to use the CPU")
        result = run(settings)
    except ValueError as error:
        stop(USAGE, str(error))
    except UnsupportedError as error:
        stop(FAILED, str(error))
    if not result.agrees:
        stop(FAILED, "the losses of the trainings differ by more than rounding explains")


def parse_device(name: str) -> torch.device:
    """A torch device; ValueError for a name that is none."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error


def stop(status: int, message: str) -> NoReturn:
    """End the command with a sentence on stderr."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
