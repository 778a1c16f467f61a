"""The gradient of tensors that are parts of one, written where it belongs by whoever computes it.

Factors gathered from one vector are consecutive parts of one tensor. Were their gradients tensors of their own, these
would have to be put together before they can be summed back: one more launch, and a copy of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FlatGradient", "Place", "hand_over", "place_of"]


class FlatGradient:
    """Room for the gradients of consecutive tensors, which exists while they are on their way.

    Every part is given away once until `take`. Whoever asks again, a second use of the factor or a micro-batch whose
    predecessor's gradients are being held, gets None and makes a tensor of its own.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """For gradients of these, which are marked: `place_of` knows where theirs belong."""
        self.shapes = [tensor.shape for tensor in tensors]
        self.sizes = [tensor.numel() for tensor in tensors]
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        self._free: set[int] = set()
        self._parts: list[Tensor] = []
        self._flat: Tensor | None = None
        self._forget()
        for i, tensor in enumerate(tensors):
            tensor._gradient_place = Place(self, i)  # type: ignore[attr-defined]

    def part(self, i: int) -> Tensor | None:
        """Where to write the i-th gradient, or None if that was given away."""
        try:
            self._free.remove(i)
        except KeyError:
            return None
        if self._flat is None:
            self._parts, self._flat = self._room()
        return self._parts[i]

    def take(self, grads: Sequence[Tensor | None]) -> Tensor:
        """All gradients one after the other, zeros for None; those in their places are not copied."""
        parts, flat, free = self._parts, self._flat, self._free
        self._forget()
        back = [False] * len(grads)
        if flat is not None:
            back = [grad is not None and _is_same(grad, part) for grad, part in zip(grads, parts, strict=True)]
        if flat is None or any(i not in free and not came for i, came in enumerate(back)):
            # Somebody may still hold what was given away and did not come back: leave it as it is.
            parts, flat = self._room()
            back = [False] * len(grads)
        if absent := [part for part, grad in zip(parts, grads, strict=True) if grad is None]:
            torch._foreach_zero_(absent)
        others = [(p, g) for p, g, came in zip(parts, grads, back, strict=True) if g is not None and not came]
        if others:
            torch._foreach_copy_([part for part, _ in others], [grad for _, grad in others])
        return flat

    def _room(self) -> tuple[list[Tensor], Tensor]:
        flat = torch.empty(sum(self.sizes), dtype=self.dtype, device=self.device)
        pieces = zip(flat.split(self.sizes), self.shapes, strict=True)
        return [piece.view(shape) for piece, shape in pieces], flat

    def _forget(self) -> None:
        self._free, self._parts, self._flat = set(range(len(self.shapes))), [], None


class Place(NamedTuple):
    """Where the gradient of one tensor belongs."""

    gradient: FlatGradient
    number: int

    def __call__(self) -> Tensor | None:
        """A tensor to write it to, if there still is one."""
        return self.gradient.part(self.number)


def place_of(tensor: Tensor) -> Place | None:
    """Where the gradient of this tensor belongs; None for a plain one."""
    return None if torch.compiler.is_compiling() else getattr(tensor, "_gradient_place", None)


def hand_over(source: Tensor, target: Tensor) -> None:
    """Have the gradient of `target` written where that of `source`, of the same shape, belongs."""
    place = place_of(source)
    if place is not None:
        target._gradient_place = place  # type: ignore[attr-defined]


def _is_same(grad: Tensor, part: Tensor) -> bool:
    return grad.data_ptr() == part.data_ptr() and grad.shape == part.shape and grad.is_contiguous()
