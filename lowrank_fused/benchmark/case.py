"""One thing to measure: a layer's shape, the tokens, the adapter; and random operands of that shape."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["DTYPES", "Case", "Operands", "dtype_name", "parse_dtype"]

AnyCase = TypeVar("AnyCase", bound="Case")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_dtype(name: str) -> torch.dtype:
    """fp32, fp16 or bf16 as a torch dtype. Raises ValueError for any other name."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype: fp32, fp16, bf16; torch's own for any other."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Case:
    """A frozen linear [out_features, in_features] with an adapter of `rank`, fed `tokens` rows of `dtype`."""

    in_features: int
    out_features: int
    tokens: int
    rank: int = 16
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bias: bool = False
    label: str = ""
    what: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "tokens", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        widest = min(self.in_features, self.out_features)
        if self.rank > widest:
            raise ValueError(f"rank must be at most min(in, out) = {widest} of this layer, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    def with_tokens(self: AnyCase, tokens: int) -> AnyCase:
        """The same layer with another number of rows."""
        return replace(self, tokens=tokens)

    def title(self) -> str:
        """One line for a person: `q_proj 4096 -> 4096, 2048 tokens, rank 16, dropout 0.1, bf16`."""
        shape = f"{self.in_features} -> {self.out_features}"
        return (
            f"{self.label + ' ' if self.label else ''}{shape}, {self.tokens} tokens, rank {self.rank}, "
            f"dropout {self.dropout:g}, {dtype_name(self.dtype)}"
        )

    def flops(self, mode: str) -> int:
        """Multiply-adds that the mathematics needs, times two; the backward makes dx, dA and dB."""
        base = 2 * self.tokens * self.in_features * self.out_features
        thin = 2 * self.tokens * self.rank * (self.in_features + self.out_features)
        forward, backward = base + thin, base + 2 * thin
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def bytes(self, mode: str) -> int:
        """What must move at least: x, W and dy read, y and dx written, in each direction for itself."""
        x, y = self.tokens * self.in_features, self.tokens * self.out_features
        weight = self.in_features * self.out_features
        forward, backward = x + weight + y, y + weight + 2 * x
        elements = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
        return elements * self.dtype.itemsize


@dataclass
class Operands:
    """x [M, K], weight [N, K], a [R, K], b [N, R], bias [N] or None, dy [M, N]; x, a and b are leaves."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    dy: Tensor
    scale: float = 2.0

    @classmethod
    def random(cls, case: Case, adapter_dtype: torch.dtype | None = None, seed: int = 0) -> Operands:
        """Normal operands of the sizes that a network in training shows: x, y and the low-rank term near 1.

        Drawn in fp32 on the case's device and rounded, so that every dtype starts from the same values.
        """
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int, std: float, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=case.device).mul_(std).to(dtype)

        adapter = adapter_dtype or case.dtype
        m, k, n, r = case.tokens, case.in_features, case.out_features, case.rank
        return cls(
            x=normal(m, k, std=1.0).requires_grad_(),
            weight=normal(n, k, std=k**-0.5),
            a=normal(r, k, std=k**-0.5, dtype=adapter).requires_grad_(),
            b=normal(n, r, std=0.5 * r**-0.5, dtype=adapter).requires_grad_(),
            bias=normal(n, std=1.0) if case.bias else None,
            dy=normal(m, n, std=1.0),
        )

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.x.device

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gradients are taken for, in this order: x, a, b."""
        return self.x, self.a, self.b

    def parameters(self) -> list[Tensor]:
        """What exists whether or not a backward follows, so that keeping it costs nothing."""
        return [t for t in (self.weight, self.a, self.b, self.bias) if t is not None]
