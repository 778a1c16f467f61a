"""What RAC-LoRA (arXiv 2410.08305) adds to a training loop: the next link of its chain.

for step, batch in enumerate(batches, start=1):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 500 == 0:
        redraw(model, optimizer)
"""

from __future__ import annotations

import torch
from torch import nn

from .. import methods
from ..inject import adapted_layers, merge

__all__ = ["redraw"]


@torch.no_grad()
def redraw(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put every adapter into its weight for good, draw the frozen factors anew and start the trained ones at zero.

    The model computes what it computed before, up to one rounding of the sum to the weight's dtype: in a 16-bit weight
    updates below that rounding are lost, so the chain wants float32 weights, as the paper's analysis does. If one layer
    can't be merged, none is changed. What `remove` and `disable` go back to is the new weight, and a saved adapter is
    the last link only: save the model's weights beside it.

    Args:
        model: a model with adapters of method "raclora".
        optimizer: its state for the trained factors, which describes the link that ended, is dropped.
    """
    layers = [layer for layer in adapted_layers(model).values() if layer.method.name == "raclora"]
    if not layers:
        raise ValueError("the model's adapters are not of method 'raclora'")
    fresh = [methods.init("raclora", layer.matrix, layer.rank, layer.alpha, None, side=layer.side) for layer in layers]
    merge(model)
    for layer, start in zip(layers, fresh, strict=True):
        for name, value in {**start.parameters, **start.frozen}.items():
            tensor = layer.adapter_tensors()[name]
            tensor.copy_(value)
            if optimizer is not None:
                optimizer.state.pop(tensor, None)
        layer.forget_unmerged()
