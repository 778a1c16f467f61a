"""An accelerated model and a copy that is PEFT's alone, taken through the same calls: no difference may show."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_fused.peft import accelerate, explain
from lowrank_fused.peft.layers import Accelerated, state_of

from .tiny_models import logits

__all__ = ["Twins", "move", "same_state"]

# What PEFT's layers say about their adapters.
_ABOUT_ADAPTERS = ("active_adapters", "merged_adapters", "disable_adapters", "scaling", "r", "lora_alpha")


def move(model: nn.Module, seed: int = 1, size: float = 0.2) -> None:
    """Take what is trained away from the start, where adapters do nothing, as steps of training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


class Twins:
    """`ours` is the model, accelerated; `peft` the copy of it that was not; `run(model)` an output to compare."""

    def __init__(self, model: nn.Module, run: Callable[[Any], Tensor] = logits, **settings: Any) -> None:
        self.ours: Any = model
        self.peft: Any = copy.deepcopy(model)
        self.run = run
        self.report = accelerate(self.ours, **{"dropout": "torch", **settings})
        self._let_groups_form()

    def _let_groups_form(self) -> None:
        """Two passes without gradients: what the first shows of shared inputs applies in the second."""
        for model in (self.ours, self.peft):
            training = [module.training for module in model.modules()]
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                for _ in range(2):
                    self.run(model.eval())
            for module, mode in zip(model.modules(), training, strict=True):
                module.training = mode
        for module in self.ours.modules():
            if isinstance(module, Accelerated):
                state_of(module).calls.clear()

    def do(self, call: Callable[[Any], Any], *, raises: type[Exception] | None = None) -> tuple[Any, Any]:
        """What a call returns for each; what it raises, and what it warns of, must be the same."""
        results, error = self._results_and_error(call)
        assert error[0] is (raises or type(None)), error
        return results

    def attempt(self, call: Callable[[Any], Any]) -> bool:
        """Whether the call works, for both or for neither: with the same error."""
        return self._results_and_error(call)[1][0] is type(None)

    def _results_and_error(self, call: Callable[[Any], Any]) -> tuple[tuple[Any, Any], tuple[type, str]]:
        results, said = [], []
        for model in (self.ours, self.peft):
            torch.manual_seed(7)
            value, error = None, None
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
                # torch 2.14 and later, of a script of its own that the first forward-mode derivative compiles.
                warnings.filterwarnings("ignore", r"`torch\.jit\.script`", FutureWarning, r"torch\.jit\._script$")
                try:
                    value = call(model)
                except Exception as exception:
                    error = exception
            results.append(value)
            said.append(((type(error), str(error)), sorted({f"{w.category.__name__}: {w.message}" for w in caught})))
        assert said[0] == said[1], said
        return (results[0], results[1]), said[0][0]

    def each(self, call: Callable[[Any], Any]) -> None:
        """As `do`, for calls whose result is of no interest."""
        self.do(call)

    @contextlib.contextmanager
    def inside(self, context: Callable[[Any], Any]) -> Iterator[None]:
        """A context manager of PEFT around both."""
        with context(self.ours), context(self.peft):
            yield

    def replace(self, call: Callable[[Any], Any]) -> None:
        """Go on with what a call returns."""
        self.ours, self.peft = self.do(call)

    def check(self, *, trains: bool = True) -> set[str]:
        """Compare states, outputs in eval and train mode and gradients; the paths that these calls took."""
        same_state(self.ours, self.peft)
        before = self.calls()
        for training in (False, True) if trains else (False,):
            self.each(partial(nn.Module.train, mode=training))
            ours, theirs = self.do(partial(self._outcome, training=training))
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                _close(name, ours[name], value, rtol=1e-4, atol=1e-5)
        return set(self.calls() - before)

    def _outcome(self, model: Any, training: bool) -> dict[str, Tensor]:
        """The output, and gradients of what is trained."""
        y = self.run(model)
        found = {"y": y.detach()}
        if training and y.requires_grad:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(y.square().sum(), list(trained.values()), allow_unused=True)
            found |= {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}
        return found

    def calls(self) -> Counter[str]:
        """How often each path was taken so far, "original: reason" for those that were left to PEFT."""
        found: Counter[str] = Counter()
        if any(isinstance(module, Accelerated) for module in self.ours.modules()):
            for row in explain(self.ours).rows:
                found[f"{row.path}: {row.reason}" if row.reason else row.path] += row.calls or 0
        return found


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """The same modules, parameters, flags and values; only classes differ, ours by being derived."""
    assert repr(ours) == repr(theirs)
    for (name, mine), (other, its) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert (name, mine.training) == (other, its.training)
        cls = type(mine).__mro__[2] if isinstance(mine, Accelerated) else type(mine)
        assert (cls.__module__, cls.__qualname__) == (type(its).__module__, type(its).__qualname__)
        for what in _ABOUT_ADAPTERS:
            if what in its.__dict__ or isinstance(getattr(type(its), what, None), property):
                assert getattr(mine, what) == getattr(its, what), (name, what)
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert flags[0] == flags[1]
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys()
    for name, value in its.items():
        _close(name, mine[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)


def _close(name: str, ours: Tensor, theirs: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda message: f"{name}: {message}")
