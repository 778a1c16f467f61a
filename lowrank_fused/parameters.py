"""What trains: counts of a model's trainable parameters, method by method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .inject import adapted_layers, injection_of, unwrap

__all__ = ["ParameterReport", "ParameterRow", "trainable_parameters"]


@dataclass(frozen=True)
class ParameterRow:
    """One kind of trained tensors: a method's, or those of the base model (biases, modules_to_save)."""

    kind: str
    layers: int
    rank: str
    trainable: int
    frozen: int


@dataclass(frozen=True)
class ParameterReport:
    """Counts of elements; a tensor that several layers share counts once.

    `total` is the whole model with adapters, `base` the same without what the methods added, `skipped` the
    linear layers that "all-linear" left out, with the reason.
    """

    rows: tuple[ParameterRow, ...]
    trainable: int
    base: int
    total: int
    skipped: dict[str, str]

    @property
    def percent(self) -> float:
        """Trainable share of the base model's size in percent."""
        return 100.0 * self.trainable / self.base if self.base else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "percent": self.percent}

    def __str__(self) -> str:
        lines = [f"{'what':<16}{'layers':>8}{'rank':>10}{'trainable':>16}{'frozen':>16}"]
        lines += [f"{r.kind:<16}{r.layers:>8}{r.rank:>10}{r.trainable:>16,}{r.frozen:>16,}" for r in self.rows]
        lines.append(f"{self.trainable:,} of {self.base:,} base parameters train ({self.percent:.4f} %)")
        lines += [f"not adapted: {path}: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def trainable_parameters(model: nn.Module) -> ParameterReport:
    """Count what trains in a model with adapters, per method and in the base model; prints as a table."""
    model = unwrap(model)
    layers = adapted_layers(model)
    rows, seen = [], set()
    for name in sorted({layer.method.name for layer in layers.values()}):
        of_method = [layer for layer in layers.values() if layer.method.name == name]
        counts = {True: 0, False: 0}
        for tensor in (t for layer in of_method for t in layer.adapter_tensors().values()):
            if id(tensor) not in seen:
                counts[tensor.requires_grad] += tensor.numel()
                seen.add(id(tensor))
        ranks = sorted({layer.rank for layer in of_method})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        rows.append(ParameterRow(name, len(of_method), shown, counts[True], counts[False]))
    base = [p for p in model.parameters() if id(p) not in seen]
    trained = [p for p in base if p.requires_grad]
    if trained:
        rows.append(ParameterRow("base model", len(trained), "", sum(p.numel() for p in trained), 0))
    record = injection_of(model)
    return ParameterReport(
        rows=tuple(rows),
        trainable=sum(row.trainable for row in rows),
        base=sum(p.numel() for p in base),
        total=sum(p.numel() for p in model.parameters()),
        skipped=dict(record.skipped) if record else {},
    )
