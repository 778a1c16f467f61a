"""The tables that ship with the package: what was measured, and beside it what the model chooses for known models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from lowrank_fused.kernels.tables import Row, Table, read, shipped_path

from ..routes import by_model, priors
from ..target import Target
from ..tools.model_shapes import MODELS, build, linear_shapes
from .store import key_of

__all__ = ["TARGETS", "shipped_table"]

TARGETS = (80, 89, 90, 100, 120)

_TOKENS, _RANKS = (8192, 1024), (16, 64)


def shipped_table(arch: int, *more: Table) -> Table:
    """The table for compute capability `arch`: measured rows of the one that ships and of `more`, the latter first.

    Where nothing was measured there is what the model chooses for the linears of the models that the package knows, so
    that a change of the model is seen, and says what a measurement would be compared with. Such rows decide nothing.
    """
    table = Table(f"sm_{arch}", None)
    known: set[str] = set()
    for other in (*more, *([read(shipped_path(arch))] if shipped_path(arch).is_file() else [])):
        if other.target != table.target:
            raise ValueError(f"rows for {table.target} cannot come from a table for {other.target}")
        found = other.measured()
        for rows, own in ((found.routes, table.routes), (found.tiles, table.tiles)):
            for row in rows:
                if key_of(row) not in known:
                    known.add(key_of(row))
                    own.append({**row, "by": _place(table, found.provenance[row["by"]])})
    by = _place(table, {"kind": "model", "assumptions": priors(arch)})
    table.routes.extend({**row, "by": by} for row in _by_model(arch) if key_of(row) not in known)
    return table


def _place(table: Table, source: dict[str, object]) -> int:
    """The index of a provenance, added where it is new."""
    if source not in table.provenance:
        table.provenance.append(source)
    return table.provenance.index(source)


def _by_model(arch: int) -> Iterator[Row]:
    """Rows for every size of layer that a known model has."""
    target = Target(arch, has_triton=True)
    for k, n in _sizes():
        for m in _TOKENS:
            for r in _RANKS:
                for dropout in (False, True):
                    for direction in ("forward", "backward"):
                        sizes = {"tokens": m, "n": n, "k": k, "rank": r, "dtype": "bf16", "dropout": dropout}
                        route = by_model(direction, m, n, k, r, torch.bfloat16, dropout, target)
                        yield {"direction": direction, **sizes, "route": route}


@cache
def _sizes() -> list[tuple[int, int]]:
    """In and out features."""
    shapes = (shape for name in MODELS for shape in linear_shapes(build(name)))
    return sorted({(shape.in_features, shape.out_features) for shape in shapes})
