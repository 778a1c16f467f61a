"""Who is predicted, and the launches of each for layers that share one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch

from ..routes import GROUP_ROUTES, ROUTES, by_model
from ..target import Target
from ..tools.model_shapes import LinearShape
from . import alternatives
from .groups import Members
from .passes import Pass, Setting, Step, Tensors
from .recorded import recorded_group, recorded_step

__all__ = ["GROUPED", "OURS", "PROVIDERS", "Candidates", "candidates", "providers"]


class Candidates(NamedTuple):
    """Ways in which a provider may run each direction, of which it takes the fastest."""

    forward: Sequence[Sequence[Pass]]
    backward: Sequence[Sequence[Pass]]


def _one(step: Step) -> Candidates:
    return Candidates([step.forward], [step.backward])


def _each_alone(step_of: Callable[..., Step], members: Members, setting: Setting) -> Step:
    """Member after member, and autograd's additions of their input gradients."""
    steps = [step_of(member, setting) for member in members]
    adds = [alternatives.added_dx(Tensors.of(members[0], setting))] * (len(members) - 1)
    return Step([p for s in steps for p in s.forward], [*(p for s in steps for p in s.backward), *adds])


def _written_out(step_of: Callable[[Tensors, bool], Step], members: Members, setting: Setting) -> Candidates:
    def step(linear: LinearShape, setting: Setting) -> Step:
        return step_of(Tensors.of(linear, setting), setting.dropout > 0)

    return _one(_each_alone(step, members, setting))


def _addmm(members: Members, setting: Setting) -> Candidates:
    """Serves no dropout: such layers are left to PEFT's arithmetic."""
    if setting.dropout:
        return _written_out(alternatives.eager, members, setting)
    steps = [alternatives.addmm(Tensors.of(member, setting), joins=place > 0) for place, member in enumerate(members)]
    return _one(Step([p for s in steps for p in s.forward], [p for s in steps for p in s.backward]))


def _recorded(route: str, members: Members, setting: Setting) -> Candidates:
    return _one(_each_alone(partial(recorded_step, route), members, setting))


def _limit(members: Members, setting: Setting) -> Candidates:
    """All members in one pass forward and one backward: x is read once and dx written once."""
    tensors = [Tensors.of(member, setting) for member in members]
    steps = [alternatives.limit(t, setting.dropout > 0) for t in tensors]
    x_again = (len(members) - 1) * tensors[0].sizes["x"]

    def merged(passes: Sequence[Pass], written_again: int) -> Pass:
        return replace(
            passes[0],
            bytes_read=sum(p.bytes_read for p in passes) - x_again,
            bytes_written=sum(p.bytes_written for p in passes) - written_again,
            flops=sum(p.flops for p in passes),
        )

    forward, backward = ([p for s in steps for p in s[direction]] for direction in (0, 1))
    return Candidates([[merged(forward, 0)]], [[merged(backward, x_again)]])


def _in_groups(route: str, members: Members, setting: Setting) -> Candidates:
    return _one(recorded_group(route, members, setting))


def _grouped(members: Members, setting: Setting) -> Candidates:
    """The faster route, forward and backward on their own."""
    steps = [recorded_group(route, members, setting) for route in ("split", "thin")]
    return Candidates([step.forward for step in steps], [step.backward for step in steps])


def _auto(members: Members, setting: Setting) -> Candidates:
    """What is chosen where no route is asked for: for a layer by itself, or for layers that share x as one group."""
    n, r = sum(member.out_features for member in members), setting.rank * len(members)
    among = ROUTES if len(members) == 1 else GROUP_ROUTES
    sizes = (setting.tokens, n, members[0].in_features, r, torch.bfloat16, setting.dropout > 0)
    target = Target(setting.arch, has_triton=True)
    forward, backward = (by_model(d, *sizes, target, among, len(members)) for d in ("forward", "backward"))
    steps = {route: recorded_group(route, members, setting) for route in {forward, backward}}
    return Candidates([steps[forward].forward], [steps[backward].backward])


PROVIDERS: dict[str, Callable[[Members, Setting], Candidates]] = {
    "frozen": partial(_written_out, alternatives.frozen),
    "eager": partial(_written_out, alternatives.eager),
    "eager-fp32": partial(_written_out, alternatives.eager_fp32),
    "compile": partial(_written_out, alternatives.compiled),
    "addmm": _addmm,
    "lorafusion": partial(_written_out, alternatives.lorafusion),
    "thin": partial(_recorded, "thin"),
    "split": partial(_recorded, "split"),
    "single": partial(_recorded, "single"),
    "thin-grouped": partial(_in_groups, "thin"),
    "split-grouped": partial(_in_groups, "split"),
    "grouped": _grouped,
    "auto": _auto,
    "limit": _limit,
}
GROUPED = ("thin-grouped", "split-grouped", "grouped")
OURS = ("thin", "split", "single", *GROUPED, "auto")


def providers(names: Sequence[str] | None) -> list[str]:
    """These providers in their usual order; all for None. Raises ValueError for an unknown name."""
    for name in names or ():
        if name not in PROVIDERS:
            raise ValueError(f"provider must be one of {', '.join(PROVIDERS)}, got {name!r}")
    return [name for name in PROVIDERS if names is None or name in names]


@cache
def candidates(provider: str, members: Members, setting: Setting) -> Candidates:
    """The launches of this provider for these layers, which share their input."""
    return PROVIDERS[provider](members, setting)
