"""EVA (Paischer et al., 2024, arXiv 2410.07170): start LoRA from the directions in which a layer's inputs vary.

    A = the r leading right singular vectors of the layer's inputs (less their mean),    B = 0

One pass over some batches, an incremental SVD for each distinct input, ranks redistributed to where a direction
explains more of its layer's variance. W and the output at the start stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..adaptable import as_matrix
from ..config import AdapterConfig
from ..errors import UnsupportedError
from ..initializers.incremental_svd import IncrementalSVD
from ..inject import adapted_layers, disable, inject_with, injection_of, remove, unwrap
from ..layers import LowRankLinear
from ..methods import Site

__all__ = ["counted_tokens", "initialize_eva"]

_METHODS = ("lora", "dora")
_IGNORED_LABEL = -100


def initialize_eva(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    keep: Callable[[Any], Tensor | None] | None = None,
    rho: float = 2.0,
    tau: float = 0.99,
    center: bool = True,
    whiten: bool = False,
    adjust_scaling: bool = True,
) -> dict[str, int]:
    """Set the A's of a LoRA model to the leading directions of what its layers see, the B's to zero.

        lf.inject(model, method="lora", rank=16)
        lf.initialize_eva(model, (batch for batch, _ in zip(loader, range(100))))

    To be called before anything is trained and before the optimiser is made: layers whose rank changes get new
    parameters, and those that end with rank 0 lose their adapter. The base model is run in evaluation mode without
    gradients, once over the batches (the first twice, to see which layers share an input), until all directions
    that will be used have settled.

    Args:
        model: a model with adapters of LoRA or DoRA from `inject`, none of them residual (PiSSA) or merged.
        batches: what `forward` takes; give as many as it takes to settle, tens to hundreds.
        forward: (model, batch) -> anything. The default calls model(**batch), model(*batch) or model(batch), with
            tensors moved to the model's device.
        keep: batch -> booleans [...] of the tokens that count, or None for all. The default, `counted_tokens`, leaves
            out padding and ignored labels. A layer whose input has other leading dimensions counts all of its own.
        rho: the largest rank is rho times the layer's; 1 keeps all ranks. The sum of all ranks never changes.
        tau: a direction has settled when its |cosine| to that after the batch before is at least tau.
        center: subtract the inputs' mean, as PEFT and the published code do; without it the mean itself is usually
            the leading direction.
        whiten: divide each row of A by the root of its singular value.
        adjust_scaling: change alpha with the rank, so that alpha / rank stays.

    Returns path -> rank, with 0 for layers that lost their adapter. Warns if directions had not settled when the
    batches ended, and about layers that saw no token, which keep their start. Raises ValueError for a bad value, no
    batches, or fewer tokens than directions, UnsupportedError for other adapters; the model is then unchanged.
    """
    if not rho >= 1 or not 0 <= tau <= 1:
        raise ValueError(f"rho must be at least 1 and tau in [0, 1], got rho={rho!r} and tau={tau!r}")
    model = unwrap(model)
    layers = _lora_layers(model)
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise ValueError("there are no batches to look at")
    run, kept = forward or _call, keep or counted_tokens
    with _evaluating(model), torch.no_grad(), disable(model):
        search = _Search(layers, _leaders(layers, lambda: run(model, first)), rho, tau, center)
        for batch in itertools.chain([first], stream):
            mask = kept(batch)
            with _watched(layers, lambda path, x, mask=mask: search.see(path, x, mask)):  # type: ignore[misc]
                run(model, batch)
            if search.settle():
                break
    factors = search.factors(whiten)
    if search.unsettled:
        warnings.warn(
            f"directions of {len(search.unsettled)} inputs had not settled to tau={tau} when the batches ended, for "
            f"example at {search.unsettled[0]}; give more batches",
            stacklevel=2,
        )
    _install(model, layers, factors, adjust_scaling)
    return {path: len(factors[path]) if path in factors else layer.rank for path, layer in layers.items()}


def counted_tokens(batch: Any) -> Tensor | None:
    """Which tokens of a batch count: those of its attention_mask whose label, where each has one, is not -100."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("attention_mask", batch.get("input_ids")), Tensor):
        return None
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        mask = mask & (labels != _IGNORED_LABEL).to(mask.device)
    return mask


class _Search:
    """The directions of every distinct input, and how many of them each layer gets."""

    def __init__(
        self, layers: dict[str, LowRankLinear], leader_of: dict[str, str], rho: float, tau: float, center: bool
    ) -> None:
        self.leader_of, self.tau = leader_of, tau
        self.budget = {path: layer.rank for path, layer in layers.items()}
        self.largest = {path: min(round(layer.rank * rho), layer.in_features) for path, layer in layers.items()}
        self.found = {
            leader: IncrementalSVD(max(self.largest[p] for p in layers if leader_of[p] == leader), center=center)
            for leader in dict.fromkeys(leader_of.values())
        }
        self.unsettled: list[str] = list(self.found)

    def see(self, path: str, x: Tensor, mask: Tensor | None) -> None:
        """Take in the input of a layer, unless another layer stands for it or it has settled."""
        if path in self.unsettled:
            counts = mask is not None and mask.shape == x.shape[:-1]
            self.found[path].update(x[mask.to(x.device)] if counts and mask is not None else x.reshape(-1, x.shape[-1]))

    def settle(self) -> bool:
        """Look again at which directions are needed and which of those still move; True if none does."""
        ranks = self.ranks()
        self.unsettled = []
        for leader, svd in self.found.items():
            needed = max((ranks.get(p, 0) for p, its in self.leader_of.items() if its == leader), default=0)
            settled = svd.similarity[:needed]
            if len(settled) < needed or (settled < self.tau).any():
                self.unsettled.append(leader)
        return not self.unsettled

    def ranks(self) -> dict[str, int]:
        """The best (layer, direction) pairs by explained variance, as many as there are ranks to give away."""
        seen = [path for path, leader in self.leader_of.items() if self.found[leader].rows]
        if not seen:
            return {}
        shares = [self.found[self.leader_of[path]].ratios[: self.largest[path]] for path in seen]
        owners = torch.repeat_interleave(torch.arange(len(seen)), torch.tensor([len(share) for share in shares]))
        best = torch.cat([share.cpu() for share in shares]).argsort(descending=True, stable=True)
        counts = owners[best[: sum(self.budget[path] for path in seen)]].bincount(minlength=len(seen))
        return dict(zip(seen, counts.tolist(), strict=True))

    def factors(self, whiten: bool) -> dict[str, Tensor]:
        """path -> A [rank, in] of every layer that saw a token."""
        ranks = self.ranks()
        unseen = [path for path in self.leader_of if path not in ranks]
        if unseen:
            warnings.warn(f"no token reached {len(unseen)} layers, which keep their start: {unseen[0]}", stacklevel=3)
        if sum(ranks.values()) < sum(self.budget[path] for path in ranks):
            few = min(svd.rows for svd in self.found.values() if svd.rows)
            raise ValueError(f"{few} tokens are too few for the directions asked for; give more batches")
        found = {}
        for path, rank in ranks.items():
            svd = self.found[self.leader_of[path]]
            a = svd.components[:rank]
            found[path] = a / _positive(svd.values[:rank, None]).sqrt() if whiten else a
        return found


def _positive(values: Tensor) -> Tensor:
    """Singular values as far as they mean anything: directions without variance must not become infinite."""
    return values.clamp_min(torch.finfo(values.dtype).eps * float(values.max() if values.numel() else 1.0))


def _lora_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    layers = adapted_layers(model)
    if injection_of(model) is None:
        raise ValueError("these layers were not put here by lowrank_fused.inject, so their config is not known")
    for path, layer in layers.items():
        if layer.method.name not in _METHODS or layer.residual:
            kind = "a residual start" if layer.residual else f"method {layer.method.name!r}"
            raise UnsupportedError(f"{path} has {kind}; EVA starts {' and '.join(_METHODS)} beside an untouched weight")
        if layer.merged:
            raise UnsupportedError("the model's adapters are merged; call lowrank_fused.unmerge(model) first")
    return layers


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _watched(layers: dict[str, LowRankLinear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(path, x) before each call of a layer."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(path, args[0] if args else kwargs["x"])

    handles = [layer.register_forward_pre_hook(hook(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leaders(layers: dict[str, LowRankLinear], run: Callable[[], Any]) -> dict[str, str]:
    """path -> the first layer that gets the very same tensors: q for q, k and v."""
    calls: dict[str, list[int]] = {path: [] for path in layers}
    alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    numbers = itertools.count()

    def see(path: str, x: Tensor) -> None:
        known = alive.get(id(x))
        if known is None or known[0]() is not x:
            known = alive[id(x)] = weakref.ref(x), next(numbers)
        calls[path].append(known[1])

    with _watched(layers, see):
        run()
    leaders: dict[Any, str] = {}
    return {path: leaders.setdefault(tuple(inputs) or path, path) for path, inputs in calls.items()}


def _call(model: nn.Module, batch: Any) -> Any:
    batch = _moved(batch, next(iter(adapted_layers(model).values())).weight.device)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _install(
    model: nn.Module, layers: dict[str, LowRankLinear], factors: dict[str, Tensor], adjust_scaling: bool
) -> None:
    if all(len(a) == layers[path].rank for path, a in factors.items()):
        with torch.no_grad():
            for path, a in factors.items():
                layers[path].get_parameter("lora_A").copy_(a)
                layers[path].get_parameter("lora_B").zero_()
        return
    record = injection_of(model)
    assert record is not None
    config = _with_ranks(record.config, layers, factors, adjust_scaling)

    def make(linear: nn.Module, config: AdapterConfig, path: str, site: Site) -> LowRankLinear:
        rank, alpha = methods.resolve(config.method, config.rank_of(path), config.alpha_of(path))
        start = methods.init(config.method, as_matrix(linear), rank, alpha, site, **config.options)
        if path in factors:
            start.parameters["lora_A"] = factors[path]
            start.parameters["lora_B"] = torch.zeros_like(start.parameters["lora_B"])
        return LowRankLinear(linear, config, start, rank=rank, alpha=alpha)

    inject_with(remove(model), config, make)


def _with_ranks(
    config: AdapterConfig, layers: dict[str, LowRankLinear], factors: dict[str, Tensor], adjust_scaling: bool
) -> AdapterConfig:
    """The config with each layer's new rank and alpha, and without the layers that have none left."""
    ranks = {path: len(factors[path]) if path in factors else layer.rank for path, layer in layers.items()}
    alphas = {
        path: layers[path].alpha * (rank / layers[path].rank if adjust_scaling else 1) for path, rank in ranks.items()
    }
    # The first pattern that matches the end of a path wins, so longer paths come before their ends.
    kept = sorted((path for path, rank in ranks.items() if rank), key=len, reverse=True)
    values = config.to_dict()
    if len(kept) < len(ranks):
        values["target_modules"] = kept
    values["rank_pattern"] = {re.escape(path): ranks[path] for path in kept}
    values["alpha_pattern"] = {re.escape(path): alphas[path] for path in kept}
    return AdapterConfig(**values)
