"""What is measured: layers of one size once, with all tokens, ranks and dropouts asked for; the routes that can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, product

import torch

from ..benchmark import Case
from ..roofline.groups import groups as sharing_x
from ..roofline.groups import label
from ..routes import GROUP_ROUTES, MAX_THIN_RANK, unavailable
from ..tools.model_shapes import LinearShape
from .group import GroupCase

__all__ = ["DIRECTIONS", "ROUTES", "cases_for", "routes_by_direction"]

DIRECTIONS = ("forward", "backward")

# Those that "auto" may take. Backward, `single` is `split`.
ROUTES = {"forward": ("addmm", "thin", "split", "single"), "backward": ("addmm", "thin", "split")}


def cases_for(
    linears: Sequence[LinearShape],
    tokens: Sequence[int],
    ranks: Sequence[int],
    dropouts: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    *,
    groups: bool = True,
) -> list[Case]:
    """A case for every size of these layers, number of tokens, rank and dropout; named after all layers of its size.

    With `groups` also one for those that share x, as long as their ranks together are of thin kernels.
    A table knows dropout or none, whatever its probability, and nothing of a bias: neither changes the order of routes.
    Raises ValueError for sizes that are none, and for two probabilities above 0.
    """
    if len({p for p in dropouts if p}) > 1:
        raise ValueError(f"a table tells dropout from none, not one probability from another, got {list(dropouts)}")
    by_size: dict[tuple[int, int], list[str]] = {}
    for linear in linears:
        by_size.setdefault((linear.in_features, linear.out_features), []).append(linear.name)
    shared = [members for members in sharing_x(linears) if groups and len(members) > 1]
    settings = product(dict.fromkeys(tokens), dict.fromkeys(ranks), dict.fromkeys(dropouts))
    cases: list[Case] = []
    for m, r, p in settings:
        common = (m, r, p, dtype, device)
        for (k, n), names in by_size.items():
            cases.append(Case(k, n, *common, label=", ".join(dict.fromkeys(filter(None, names)))))
        for members in shared:
            if r * len(members) <= MAX_THIN_RANK:
                sizes = tuple(member.out_features for member in members)
                k = members[0].in_features
                cases.append(GroupCase(k, sum(sizes), *common, label=label(members), members=sizes))
    return cases


def routes_by_direction(case: Case) -> Mapping[str, tuple[str, ...]]:
    """The routes that are measured forward and backward: those that can run this case here."""
    served = GROUP_ROUTES if isinstance(case, GroupCase) else tuple(chain(*ROUTES.values()))
    return {
        direction: tuple(r for r in routes if r in served and unavailable(r, case.device, case.dtype) is None)
        for direction, routes in ROUTES.items()
    }
