"""Helpers for the training loop: learning rates of A and B apart, and one pull-back for several backwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .inject import adapted_layers, unwrap

__all__ = ["hold_gradients", "parameter_groups"]


@contextlib.contextmanager
def hold_gradients(model: nn.Module) -> Iterator[None]:
    """Pull gradients of generated factors back once for all backwards in here, instead of once for each.

        with lf.hold_gradients(model):
            for batch in micro_batches:
                model(**batch).loss.backward()
        optimizer.step()

    NEAT's and Uni-LoRA's factors are functions of what is trained. Their gradients add up in here, and reach the
    trained parameters' `.grad` at the end; after an exception they are dropped. Other methods are not affected.

    Under DistributedDataParallel use it inside `no_sync()`, that is for all micro-batches but the last, whose own
    backward has to be the one that DDP sees.
    """
    caches = list({id(one): one for layer in adapted_layers(model).values() for one in layer.caches()}.values())
    for one in caches:
        one.hold()
    try:
        yield
    except BaseException:
        for one in caches:
            one.release(discard=True)
        raise
    for one in caches:
        one.release()


def parameter_groups(
    model: nn.Module, lr: float, *, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser in which output-side factors learn `ratio` times as fast (LoRA+).

        torch.optim.AdamW(lf.parameter_groups(model, lr=2e-4, ratio=16))

    Wide layers want a larger rate for B than for A (Hayou et al., 2024, arXiv 2402.12354), from either start (arXiv
    2406.08447). A trained matrix with a layer's out_features as its first dimension is output-side; everything else
    that requires a gradient learns at `lr`: A, cores, vectors, biases, heads.

    Raises ValueError for a rate or ratio that is not positive, and for a model without adapters.
    """
    if not lr > 0 or not ratio > 0:
        raise ValueError(f"lr and ratio must be positive, got lr={lr!r} and ratio={ratio!r}")
    model = unwrap(model)
    output_side = {
        id(tensor)
        for layer in adapted_layers(model).values()
        for tensor in (getattr(layer, name) for name in layer.trained_names)
        if tensor.dim() == 2 and tensor.shape[0] == layer.out_features and tensor.shape[1] != layer.in_features
    }
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in output_side].append(parameter)
    return [
        {"params": parameters, "lr": lr * (ratio if faster else 1.0), "weight_decay": weight_decay}
        for faster, parameters in groups.items()
        if parameters
    ]
