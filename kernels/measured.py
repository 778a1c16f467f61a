"""What was measured decides: routes and tiles from tuned tables, looked up by what a call knows.

The user's rows come before shipped ones. Only measured rows count: one whose provenance is a model says what the model
chose when its file was written, and asking the model itself is never worse. Files are read once, by the first call on a
GPU. One that cannot be used is an error that names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from .tables import DTYPES, Row, Table, bucket, read, shipped_path, user_path

__all__ = [
    "Lookup",
    "Probe",
    "Tuned",
    "forget",
    "gpu_name",
    "lookup_of",
    "measured_route",
    "probing",
    "tables_for",
    "tuned_tile",
]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Size = int | tuple[int, ...]


class Tuned(NamedTuple):
    """A tile that a kernel may take, with what its launch is told besides: how many programs share a row (`split`)."""

    tile: Any
    split: int = 1

    def fields(self) -> dict[str, Any]:
        """As a row holds it; only what differs from program to program."""
        return {**asdict(self.tile), "split": self.split}


class Lookup:
    """Measured rows of several tables, the first of them first, by what a call knows."""

    def __init__(self, tables: Sequence[Table] = ()) -> None:
        self.routes: dict[Hashable, str] = {}
        self.tiles: dict[Hashable, dict[str, Any]] = {}
        self.resolved: dict[Hashable, Tuned | None] = {}
        for table in map(Table.measured, tables):
            for row in table.routes:
                sizes = (row["tokens"], _size(row["n"]), row["k"], _size(row["rank"]))
                self.routes.setdefault((row["direction"], *sizes, row["dtype"], row["dropout"]), row["route"])
            for row in table.tiles:
                self.tiles.setdefault((row["kernel"], row["tokens"], *_tile_key(row)), row["tile"])

    def tile(
        self, kernel: str, tokens: int, key: tuple[Hashable, ...], among: Callable[[], Iterable[Tuned]]
    ) -> Tuned | None:
        """The one `among` these that a row names, or None: a tile that is not among them is refused."""
        if not self.tiles:
            return None
        full = (kernel, bucket(max(tokens, 1)), *key)
        if full not in self.resolved:
            row = self.tiles.get(full)
            self.resolved[full] = next((t for t in among() if t.fields() == row), None) if row else None
        return self.resolved[full]


def _size(value: int | list[int]) -> Size:
    return tuple(value) if isinstance(value, list) else value


def _tile_key(row: Row) -> tuple[Hashable, ...]:
    return row["n"], row["k"], row["rank"], row["dtype"], row["variant"]


_lookups: dict[tuple[int, str], Lookup] = {}


def lookup_of(arch: int, gpu: str) -> Lookup:
    """What the tables say for a GPU, read once. Raises ValueError for a file that cannot be used."""
    found = _lookups.get((arch, gpu))
    if found is None:
        found = _lookups[arch, gpu] = Lookup(tables_for(arch, gpu))
    return found


def tables_for(arch: int, gpu: str) -> list[Table]:
    """The user's table, if it is of this GPU, and the one that ships."""
    path = user_path(gpu)
    if not arch or path is None:
        return []
    found = []
    if gpu and path.is_file() and (table := read(path)).gpu == gpu:
        found.append(table)
    if shipped_path(arch).is_file():
        found.append(read(shipped_path(arch)))
    return found


def forget() -> None:
    """Read tables anew when they are next needed."""
    _lookups.clear()


def measured_route(
    direction: str, m: int, n: Size, k: int, r: Size, dtype: torch.dtype, dropout: bool, arch: int, gpu: str
) -> str | None:
    """The route that was measured fastest for x [m, k], W [n, k] and rank r; None where nothing was measured.

    For linears that share x, n and r are tuples.
    """
    routes = lookup_of(arch, gpu).routes
    return routes.get((direction, bucket(max(m, 1)), n, k, r, _NAMES.get(dtype), dropout)) if routes else None


_gpu_names: dict[int, str] = {}


def gpu_name(device: torch.device) -> str:
    """The name of a CUDA device, empty for any other."""
    if device.type != "cuda":
        return ""
    number = torch.cuda.current_device() if device.index is None else device.index
    if number not in _gpu_names:
        _gpu_names[number] = torch.cuda.get_device_name(number)
    return _gpu_names[number]


def tuned_tile(
    kernel: str,
    x: torch.Tensor,
    arch: int,
    sizes: tuple[int, int, int],
    variant: str,
    among: Callable[[], Iterable[Tuned]],
) -> Tuned | None:
    """The tile that was measured fastest for a kernel on x [M, …], with N, K, R in `sizes`; None where none was.

    Tables say nothing of layers whose sizes are no multiples of 16, of which not every tile is inspected. `among` are
    the tiles that the kernel's own rule may return for such operands. `variant` tells apart what sizes and dtype do
    not.
    """
    n, k, _ = sizes
    if (n | k) % 16:
        return None
    lookup = lookup_of(arch, gpu_name(x.device))
    return lookup.tile(kernel, x.shape[0], (*sizes, _NAMES.get(x.dtype), variant), among)


class Probe(Lookup):
    """Gives the kernels named the tiles asked for, and takes down who looked up what.

    `seen` holds for every key of a tile what it was chosen among.
    """

    def __init__(self, forced: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.forced = forced
        self.seen: dict[tuple[Hashable, ...], list[Tuned]] = {}

    def tile(
        self, kernel: str, tokens: int, key: tuple[Hashable, ...], among: Callable[[], Iterable[Tuned]]
    ) -> Tuned | None:
        """The forced tile, if it is among these."""
        candidates = list(among())
        self.seen[(kernel, bucket(tokens), *key)] = candidates
        return next((t for t in candidates if t.fields() == self.forced.get(kernel)), None)


@contextlib.contextmanager
def probing(arch: int, gpu: str, forced: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[Probe]:
    """Tables of this GPU put aside for a `Probe`: for tuning, and for comparing with the model's own choices."""
    before = _lookups.get((arch, gpu))
    probe = Probe(forced or {})
    _lookups[arch, gpu] = probe
    try:
        yield probe
    finally:
        if before is None:
            _lookups.pop((arch, gpu), None)
        else:
            _lookups[arch, gpu] = before
