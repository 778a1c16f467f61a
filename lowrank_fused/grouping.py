"""Layers that are called with the same x share one pass over it: `group(model)`, `ungroup(model)`.

Attention calls q, k and v one after the other with one x, a gated MLP gate and up. The first of them to be called
computes all (`lowrank_group`); the others find their results waiting. No source text is rewritten and no module
replaced, so hooks, names and parameters stay, and every model class works whose forward calls its projections.

Who may belong together is told by the names of children of one parent. Whether they really are called with the same
tensor is watched in their first calls, so layers of cross-attention or of an unknown block stay by themselves. What
was seen applies between two steps of an optimiser: checkpointing must find a recomputed block to be what it was.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .branches import Branch, lowrank_group, too_small_to_share, why_not_one_pass
from .factors.generated import Steps
from .plain import why_not_plain

__all__ = ["GROUP", "NAMES", "Call", "Group", "GroupReport", "group", "group_of", "ungroup"]

# The attribute of a layer that holds its group; no state_dict sees it.
GROUP = "_lowrank_group"

# Names under which models call projections of one tensor.
NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)

# Results that nobody fetched before a group is taken apart, beyond a quarter of those that were.
_PATIENCE = 4


@dataclass(frozen=True)
class Call:
    """One layer's part of a call, as the engine takes it; what has to agree within a group, and what each has."""

    branch: Branch
    scale: float
    dropout_p: float
    route: str

    @property
    def shared(self) -> tuple[Any, ...]:
        """What one pass over x can only have one of."""
        return (self.scale, self.dropout_p, self.route, self.branch.a.dtype, self.branch.weight.device)


class Member(Protocol):
    """A layer that can be in a group."""

    out_features: int

    def as_branch(self, x: Tensor) -> Call | str:
        """What a call with this x computes; why it can't be shared, in words."""


@dataclass
class _Waiting:
    """Results for calls to come: with this x as it is, in this mode, of these weights and factors as they are."""

    x: weakref.ref[Tensor]
    version: int | None
    mode: tuple[Any, ...]
    ys: dict[int, tuple[Tensor, Branch, tuple[int | None, ...]]]

    def take(self, position: int, x: Tensor) -> Tensor | None:
        """The result of that member, once, if its call is the one that was foreseen."""
        if self.x() is not x or self.version != _version(x) or self.mode != _mode(x):
            return None
        y, branch, versions = self.ys.pop(position, (None, None, ()))
        return y if branch is not None and versions == _versions(branch) else None


class Group:
    """Layers below one parent, and what is known of their calls. Copies and pickles of a layer are in no group."""

    def __init__(self, names: Sequence[str], members: Sequence[nn.Module], path: str) -> None:
        self.names, self.path = tuple(names), path
        self.members = tuple(weakref.ref(member) for member in members)
        self.positions = {id(member): i for i, member in enumerate(members)}
        self.width = sum(member.out_features for member in members)  # type: ignore[misc]
        self.calls: Counter[str] = Counter()  # reason -> calls by themselves
        self.shared = self.wasted = 0
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._waiting: _Waiting | None = None
        self._together: tuple[int, ...] | None = None  # unknown before the first calls
        self._next: tuple[int, ...] | None = None  # what was found out, from the next step on
        self._step_with_graph = -1  # steps that had been taken at the last call in grad mode
        Steps.watch()

    @property
    def together(self) -> tuple[str, ...]:
        """Names of those that are called with the same x; none before the first calls."""
        return tuple(self.names[i] for i in self._together or ())

    def state(self) -> str:
        """For a report."""
        if self._together is None:
            return "not called yet" if self._next is None else "from the next optimiser step on"
        return f"share x: {', '.join(self.together)}" if self._together else "called with different inputs"

    def is_small(self, x: Tensor) -> bool:
        """Whether to compute the members one by one, because a CPU is as fast at it."""
        return too_small_to_share(x, self.width)

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What the layer's forward(x) returns, if it was or can be computed together with the others'."""
        position = self.positions.get(id(layer))
        if position is None or self.members[position]() is not layer or _is_traced(x):
            return None
        waiting = self._waiting
        if waiting is not None and (y := waiting.take(position, x)) is not None:
            if not waiting.ys:
                self._waiting = None
            return y
        self._settle()
        if self._together is None:
            self._watch(position, x)
            return None
        if position not in self._together or not self._still_together():
            return None
        return self._compute(position, x)

    def _present(self) -> set[int]:
        """Members that are in this group still; a layer may be ungrouped, regrouped, restored or gone."""
        members = (ref() for ref in self.members)
        return {i for i, member in enumerate(members) if member is not None and group_of(member) is self}

    def _still_together(self) -> bool:
        """Whether two or more are left of those that share x; the others are counted out, and one alone is let go."""
        assert self._together is not None
        present = self._present()
        if not present.issuperset(self._together):
            self._together = tuple(i for i in self._together if i in present)
        if len(self._together) > 1:
            return True
        self._together = ()
        if len(present) < 2:
            for i in present:
                self.members[i]().__dict__.pop(GROUP, None)
        return False

    def _settle(self) -> None:
        """Let what was found out apply, if no graph can be around that was made without it."""
        if self._next is not None and self._step_with_graph < Steps.taken:
            self._together, self._next = self._next, None
        if torch.is_grad_enabled():
            self._step_with_graph = Steps.taken

    def _watch(self, position: int, x: Tensor) -> None:
        """Note who is called with what; after every member was called, the largest set with one x is known."""
        if position in self._seen:
            self._seen.clear()
        self._seen[position] = weakref.ref(x)
        if self._present().issubset(self._seen):
            inputs = {i: ref() for i, ref in self._seen.items()}
            sets = [tuple(i for i in inputs if inputs[i] is x) for x in inputs.values() if x is not None]
            largest = max(sets, key=len, default=())
            self._next = largest if len(largest) > 1 else ()
            self._seen.clear()
            self._settle()

    def _compute(self, position: int, x: Tensor) -> Tensor | None:
        """Results of all, the others' left waiting."""
        if self._waiting is not None:
            self._waiting = None
            self.wasted += 1
            if self.wasted > _PATIENCE + self.shared // 4:
                self._next = ()
        assert self._together is not None
        calls: dict[int, Call] = {}
        for i in self._together:
            found = self.members[i]().as_branch(x)  # type: ignore[union-attr, operator]
            if isinstance(found, str):
                self.calls[found] += 1
                return None
            calls[i] = found
        one = calls[position]
        if reason := _why_apart(list(calls.values()), x):
            self.calls[reason] += 1
            return None
        ys = lowrank_group(
            x, [call.branch for call in calls.values()], scale=one.scale, dropout_p=one.dropout_p, route=one.route,
            label=f"{self.path}.{'+'.join(self.together)}",
        )  # fmt: skip
        self.shared += 1
        found_ys = dict(zip(calls, ys, strict=True))
        y = found_ys.pop(position)
        waiting = {i: (y_i, calls[i].branch, _versions(calls[i].branch)) for i, y_i in found_ys.items()}
        self._waiting = _Waiting(weakref.ref(x), _version(x), _mode(x), waiting)
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _why_apart(calls: list[Call], x: Tensor) -> str | None:
    if len({call.shared for call in calls}) > 1:
        return "scale, dropout, route, dtype or device differ"
    return why_not_one_pass(x, [call.branch for call in calls])


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What besides x a result is made for: gradients, autocast, thread, optimiser steps, the stream it is ready on.

    And whether that stream is being captured: a graph that read what was computed before it would read the same again
    at every replay.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    mode = (*grad, autocast, threading.get_ident(), Steps.taken)
    if not x.is_cuda:
        return mode
    return *mode, torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _version(x: Tensor) -> int | None:
    """How often x was written to; nobody counts for a tensor made in inference mode."""
    return None if x.is_inference() else x._version


def _versions(branch: Branch) -> tuple[int | None, ...]:
    """How often each tensor of a branch was written to."""
    tensors = (branch.weight, branch.a, branch.b, branch.bias)
    return tuple(_version(t) for t in tensors if t is not None)


def _is_traced(x: Tensor) -> bool:
    """Compilers and dispatch modes are to see the layers one by one."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._are_functorch_transforms_active() or why_not_plain(x) is not None or x.is_meta


def group_of(layer: nn.Module) -> Group | None:
    """The group that a layer is in."""
    return layer.__dict__.get(GROUP)


@dataclass(frozen=True)
class GroupReport:
    """Groups of a model: (class of the parent, names, how many, what is known of their calls); printable."""

    rows: tuple[tuple[str, str, int, str], ...]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return sum(row[2] for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{count:>5,} x {parent} ({names}): {state}" for parent, names, count, state in self.rows]
        return "\n".join(lines) or "no layers that could share their input"


def group(model: nn.Module) -> GroupReport:
    """Let adapted layers that are called with the same x share one pass over it, where a model has such.

        lf.group(model)         # after inject; `accelerate` does it by itself
        lf.ungroup(model)       # as before

    For layers of ours and accelerated PEFT layers below one parent whose names say that they may belong together
    (q_proj, k_proj, v_proj; gate_proj, up_proj; …). Results are those of the single layers up to the order of sums,
    with one difference: a group draws one dropout mask for all its layers, where single layers draw one each.
    Compiled graphs keep the layers single. Call it again to see in the report what the calls showed; layers that
    were added since are taken in.
    """
    for parent, path in _parents(model):
        for names in NAMES:
            children = {name: parent._modules.get(name) for name in names}
            members = {name: m for name, m in children.items() if m is not None and hasattr(m, "as_branch")}
            if len(members) < 2:
                for member in members.values():
                    member.__dict__.pop(GROUP, None)
                continue
            known = {group_of(m) for m in members.values()}
            if len(known) == 1 and (one := known.pop()) is not None and one.names == tuple(members):
                continue
            made = Group(list(members), list(members.values()), path)
            for member in members.values():
                member.__dict__[GROUP] = made
    return _report(model)


def _parents(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for path, module in model.named_modules():
        if len(module._modules) > 1:
            yield module, path


def _report(model: nn.Module) -> GroupReport:
    counts: Counter[tuple[str, str, str]] = Counter()
    for parent, _ in _parents(model):
        for found in dict.fromkeys(g for child in parent._modules.values() if child and (g := group_of(child))):
            counts[type(parent).__name__, ", ".join(found.names), found.state()] += 1
    return GroupReport(tuple((block, names, n, state) for (block, names, state), n in sorted(counts.items())))


def ungroup(model: nn.Module) -> nn.Module:
    """Take every group apart again; returns the same model."""
    for module in model.modules():
        module.__dict__.pop(GROUP, None)
    return model
