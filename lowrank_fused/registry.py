"""Named things that are found, not listed: importing a package's files registers what they define."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Generic, TypeVar

__all__ = ["Registry", "did_you_mean"]

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name if one is near, and all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(choices)}"


class Registry(Generic[T]):
    """Name -> thing, filled on first use by importing every public module of `package`."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._things: dict[str, T] = {}
        self._discovered = False

    def add(self, name: str, thing: T) -> T:
        """Register `thing`; a second definition of a name raises ValueError, whichever file comes first."""
        if name in self._things:
            both = f"{self._things[name]!r} and {thing!r}"
            raise ValueError(f"{self.kind} {name!r} is defined twice, as {both}; rename one of them")
        self._things[name] = thing
        return thing

    def all(self) -> dict[str, T]:
        """Every registered thing by name, in alphabetical order (a copy)."""
        if not self._discovered:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{self.package}.{module.name}")
            self._discovered = True
        return dict(sorted(self._things.items()))

    def get(self, name: str) -> T:
        """The thing of that name; an unknown name raises ValueError with the nearest one."""
        things = self.all()
        if name not in things:
            raise ValueError(f"unknown {self.kind} {name!r}; {did_you_mean(str(name), things)}")
        return things[name]
