"""Helpers for the training loop: learning rates of A and B apart, and one pull-back for several backwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..inject import adapted_layers, unwrap
from ..layers import LowRankLinear

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
    2406.08447). Output-side is a trained tensor that the layer's B is made of and its A is not; everything else that
    requires a gradient learns at `lr`: A, cores, gates, vectors (to which PEFT's create_loraplus_optimizer gives the
    larger rate too), biases, heads, and what both factors are made of.

    Raises ValueError for a rate or ratio that is not positive, and for a model without adapters.
    """
    if not lr > 0 or not ratio > 0:
        raise ValueError(f"lr and ratio must be positive, got lr={lr!r} and ratio={ratio!r}")
    model = unwrap(model)
    of_a: set[int] = set()
    of_b: set[int] = set()
    for layer in adapted_layers(model).values():
        of_a |= _made_of(layer, "a")
        of_b |= _made_of(layer, "b")
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in of_b - of_a].append(parameter)
    return [
        {"params": parameters, "lr": lr * (ratio if faster else 1.0), "weight_decay": weight_decay}
        for faster, parameters in groups.items()
        if parameters
    ]


def _made_of(layer: LowRankLinear, factor: str) -> set[int]:
    """Ids of the trained tensors that a factor of the layer's Terms depends on, as autograd sees it."""
    trained = [t for t in (getattr(layer, name) for name in layer.trained_names) if t.requires_grad]
    devices = [layer.weight.device] if layer.weight.is_cuda else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        terms = layer.method.terms(layer, layer.matrix, layer.weight.new_zeros(0, layer.in_features))
        value = getattr(terms, factor)
        if not trained or not value.requires_grad:
            return set()
        found = torch.autograd.grad(value, trained, torch.zeros_like(value), allow_unused=True)
    return {id(tensor) for tensor, grad in zip(trained, found, strict=True) if grad is not None}
