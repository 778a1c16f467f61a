"""The tuner: case by case, routes forward and backward, then the tiles of the kernels that won."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_fused.kernels.tables import Row, bucket

from ..benchmark import Case, dtype_name
from ..routes import GROUP_ROUTES, ROUTES, by_model
from ..target import target_of
from .group import GroupCase
from .measure import Launched, Measuring
from .plan import DIRECTIONS
from .rule import NOISE, verdict
from .store import Store

__all__ = ["FLOOR", "Outcome", "tune"]

FLOOR = "addmm"


@dataclass(frozen=True)
class Outcome:
    """One decision: `what` is forward, backward or a kernel; before is the model's choice, after the table's.

    Microseconds are None for a choice that got no number. `again` says that an earlier run had measured it.
    """

    case: Case
    what: str
    before: str
    before_us: float | None
    after: str
    after_us: float
    again: bool

    @property
    def gain(self) -> float | None:
        """Time before over time after."""
        return None if self.before_us is None else self.before_us / self.after_us


def tune(
    cases: Sequence[Case],
    store: Store,
    measuring: Measuring,
    routes: Mapping[str, tuple[str, ...]],
    *,
    tiles: bool = True,
    noise: float = NOISE,
) -> Iterator[Outcome]:
    """Measure what is not in the store yet, write each result down at once, and tell it.

    `routes` are the contestants by direction. A case in which no route gets a number leaves no row; why is in
    `measuring.refused`.
    """
    for case in cases:
        yield from _routes(case, store, measuring, routes, noise)
        if tiles:
            for direction in DIRECTIONS:
                row = store.find(_about(case, direction))
                if row is not None and row["route"] in ("thin", "split", "single"):
                    yield from _tiles(case, row["route"], direction, store, measuring, noise)


def _routes(
    case: Case, store: Store, measuring: Measuring, routes: Mapping[str, tuple[str, ...]], noise: float
) -> Iterator[Outcome]:
    known = {direction: store.find(_about(case, direction)) for direction in routes}
    left = {direction: several for direction, several in routes.items() if known[direction] is None}
    times = measuring.routes(case, left) if left else {}
    for direction in routes:
        row = known[direction]
        if row is None and times[direction]:
            model = _by_model(case, direction)
            found = verdict(times[direction], model, FLOOR, noise)
            numbers = {"us": found.us[found.winner], "model": model, "model_us": found.us.get(model)}
            numbers["addmm_us"] = found.us.get(FLOOR)
            row = store.put({**_about(case, direction), "route": found.winner, **_rounded(numbers)})
        if row is not None:
            again = known[direction] is not None
            yield Outcome(case, direction, row["model"], row["model_us"], row["route"], row["us"], again)


def _about(case: Case, direction: str) -> Row:
    """The key of a row of routes."""
    n: Any = case.out_features
    rank: Any = case.rank
    if isinstance(case, GroupCase):
        n, rank = list(case.members), [case.rank] * len(case.members)
    sizes = {"tokens": bucket(case.tokens), "n": n, "k": case.in_features, "rank": rank}
    return {"direction": direction, **sizes, "dtype": dtype_name(case.dtype), "dropout": case.dropout > 0}


def _by_model(case: Case, direction: Any) -> str:
    """What is chosen where nothing was measured."""
    members, among = (len(case.members), GROUP_ROUTES) if isinstance(case, GroupCase) else (1, ROUTES)
    sizes = (case.tokens, case.out_features, case.in_features, case.rank * members, case.dtype, case.dropout > 0)
    return by_model(direction, *sizes, target_of(case.device), among, members)


def _tiles(
    case: Case, route: str, direction: str, store: Store, measuring: Measuring, noise: float
) -> Iterator[Outcome]:
    for launched in measuring.launches(case, route, direction):
        names = ("kernel", "tokens", "n", "k", "rank", "dtype", "variant")
        about = dict(zip(names, launched.key, strict=True))
        row = store.find(about)
        again = row is not None
        if row is None:
            row = _measured_tile(case, route, direction, launched, measuring, noise)
            if row is None:
                continue
            row = store.put({**about, **row})
        yield Outcome(case, launched.kernel, row["model"], row["model_us"], _shape(row["tile"]), row["us"], again)


def _measured_tile(
    case: Case, route: str, direction: str, launched: Launched, measuring: Measuring, noise: float
) -> Row | None:
    """What a row says besides what it is about; None if nothing could be timed."""
    times = measuring.tiles(case, route, direction, launched)
    model = str(launched.candidates.index(launched.model))
    while times:
        found = verdict(times, model, noise=noise)
        tile = launched.candidates[int(found.winner)]
        # With the model's own tile the route has passed already.
        if found.winner == model or measuring.accurate(case, route, launched, tile):
            numbers = {"us": found.us[found.winner], "model": _shape(launched.model.fields())}
            return {"tile": tile.fields(), **_rounded({**numbers, "model_us": found.us.get(model)})}
        del times[found.winner]
    return None


def _shape(tile: Mapping[str, Any]) -> str:
    """A tile in a word: 128x256x64 w8 s3, and how many programs share a row if several do."""
    blocks = "x".join(str(tile[f"block_{axis}"]) for axis in "mnk")
    shared = f" /{tile['split']}" if tile["split"] > 1 else ""
    return f"{blocks} w{tile['num_warps']} s{tile['num_stages']}{shared}"


def _rounded(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits: more is noise that makes differences between files hard to read."""
    return {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in numbers.items()}
