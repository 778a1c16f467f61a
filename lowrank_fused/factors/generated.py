"""Factors that are functions of trained tensors: computed once until these change, differentiated once per backward.

NEAT's σ(A W) or Uni-LoRA's θ[index] would otherwise be computed again by every micro-batch and every checkpoint
recompute, although they change only when the optimiser has stepped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import failure_of
from ..flat_gradient import hand_over

__all__ = ["Generated", "Steps", "evaluated", "named"]


class Steps:
    """How many steps all optimisers have taken: some write parameters behind the back of PyTorch's version counter."""

    taken = 0
    watched = False

    @classmethod
    def watch(cls) -> None:
        """Count from now on (a hook, so that importing the package leaves PyTorch as it was)."""
        if not cls.watched:
            register_optimizer_step_post_hook(lambda *_: cls._count())
            cls.watched = True

    @classmethod
    def _count(cls) -> None:
        cls.taken += 1


@dataclass
class _Graph:
    """One evaluation: the outputs with their graph, the leaves under it, and gradients that wait for them."""

    outputs: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    label: str | None = None
    held: list[Tensor | None] = field(default_factory=list)
    holding: bool = False

    def add(self, grads: tuple[Tensor | None, ...]) -> None:
        """Add to the held gradients: out of place, since autograd may hand the same tensor to others."""
        before = self.held or [None] * len(grads)
        self.held = [held if grad is None else grad for held, grad in zip(before, grads, strict=True)]
        places = enumerate(zip(before, grads, strict=True))
        pairs = [(i, held, grad) for i, (held, grad) in places if held is not None and grad is not None]
        if pairs:
            sums = torch._foreach_add([held for _, held, _ in pairs], [grad for _, _, grad in pairs])
            for (i, *_), total in zip(pairs, sums, strict=True):
                self.held[i] = total

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs that have gradients, and these; nothing is held any more."""
        pairs = [(out, grad) for out, grad in zip(self.outputs, self.held, strict=False) if grad is not None]
        self.held = []
        return [out for out, _ in pairs], [grad for _, grad in pairs]


class _Pullback(torch.autograd.Function):
    """Hands out the values of a _Graph; its backward runs that graph, as often as the autograd engine calls it.

    Nothing goes through save_for_backward: checkpointing may then enter with a value at hand or without, and a second
    backward through the same values (the next micro-batch) finds nothing freed.
    """

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        return tuple(out.detach() for out in graph.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        graph.add(grads)
        wanted = [source for source, needed in zip(graph.sources, ctx.needs_input_grad[1:], strict=True) if needed]
        found: list[Tensor | None] = [None] * len(wanted)
        if not graph.holding:
            outputs, ready = graph.take()
            if outputs:
                pull_back = partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
                found = list(named(graph.label, pull_back, outputs, wanted, ready))
        given = iter(found)
        return (None, *(next(given) if needed else None for needed in ctx.needs_input_grad[1:]))


class Generated:
    """`function(*sources) -> tensors`, remembered until a source changes.

    A source has changed when it is another tensor, when PyTorch's counter says that it was written to (optimiser step,
    load, in-place edit), when its memory moved, or when any optimiser has stepped since. Writes through `.data` outside
    an optimiser are invisible to all of these; call `forget` after them.

    However often the values are used, one backward pulls their summed gradient back to the sources once. Between
    `hold` and `release` it waits, so that several backwards share one. In a compiled or captured graph nothing is
    remembered: a replay has to compute what its sources hold by then. Nor is it where parameters are sharded by
    `fully_shard`.

    `label` names the layer in the error of a launch that fails.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], label: str | None = None) -> None:
        self.function, self.label = function, label
        self.evaluations = 0
        self._key: tuple | None = None
        self._sources: tuple[Tensor, ...] = ()
        self._graph: _Graph | None = None
        self._values: tuple[Tensor, ...] = ()
        self._holding = False

    def __call__(self, *sources: Tensor) -> tuple[Tensor, ...]:
        """The values, with gradients flowing to those sources that require them."""
        if _must_not_remember(sources):
            return evaluated(self.function, *sources)
        Steps.watch()
        key = tuple((s._version, s.data_ptr(), s.requires_grad, s.dtype) for s in sources) + (Steps.taken,)
        same = len(sources) == len(self._sources) and all(a is b for a, b in zip(sources, self._sources, strict=True))
        if not same or key != self._key:
            if self._graph is not None and self._graph.held:
                raise RuntimeError("a trained tensor changed while gradients of factors made from it are being held")
            self._evaluate(sources)
            self._sources, self._key = sources, key
        return self._values

    def remembers(self, *sources: Tensor) -> bool:
        """Whether a call keeps its values; a method may have something cheaper to do where it does not."""
        return not _must_not_remember(sources)

    def _evaluate(self, sources: tuple[Tensor, ...]) -> None:
        """Outside of whatever mode, autocast or checkpoint the caller is in: the values outlive it."""
        self.evaluations += 1
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged),
        ):
            outputs = tuple(named(self.label, evaluated, self.function, *sources))
            self._graph = _Graph(outputs, sources, self.label, holding=self._holding)
            if any(out.requires_grad for out in outputs):
                self._values = _Pullback.apply(self._graph, *sources)
                for out, value in zip(outputs, self._values, strict=True):
                    hand_over(out, value)
            else:
                self._values = outputs

    def hold(self) -> None:
        """Let gradients wait from now on."""
        self._holding = True
        if self._graph is not None:
            self._graph.holding = True

    def release(self, *, discard: bool = False) -> None:
        """Accumulate the gradients that waited into the sources' `.grad`, or drop them; later ones don't wait."""
        self._holding = False
        if self._graph is None:
            return
        self._graph.holding = False
        outputs, grads = self._graph.take()
        if outputs and not discard:
            torch.autograd.backward(outputs, grads, retain_graph=True)

    def forget(self) -> None:
        """Evaluate again at the next call."""
        self._key, self._sources, self._graph, self._values = None, (), None, ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle starts with nothing remembered."""
        return {"function": self.function, "label": self.label}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def named(label: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), which makes factors or pulls their gradients back, with the layer's name if it fails."""
    try:
        return function(*arguments)
    except Exception as error:
        failure = failure_of("making its factors", error, label, "off")
        if failure is error:
            raise
        raise failure from error


def evaluated(function: Callable[..., Any], *tensors: Tensor, **constants: Any) -> Any:
    """function(*tensors, **constants), autocast off: factors keep the dtype of what they are made from."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return function(*tensors, **constants)
    with torch.autocast(device, enabled=False):
        return function(*tensors, **constants)


def _must_not_remember(sources: tuple[Tensor, ...]) -> bool:
    if torch.compiler.is_compiling() or any(s.is_meta or s.is_inference() for s in sources):
        return True
    if _gathers_shards():
        return True
    return sources[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _gathers_shards() -> bool:
    """Whether a module of this process went through `fully_shard`.

    Its parameters are then gathered anew for every forward: the same tensors, perhaps the same memory, other values,
    and PyTorch's counter is told not to count.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
