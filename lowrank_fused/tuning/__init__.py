"""Measuring which route and which tiles are fastest for one's own layers on one's own GPU: `lowrank-fused tune`.

    store = Store(user_path(gpu), "sm_90", provenance(device))
    for case in cases_for(linears, tokens=[8192], ranks=[16], dropouts=[0.0], dtype=torch.bfloat16, device=device):
        for outcome in tune([case], store, Measuring.on(device), routes_by_direction(case)):
            ...

Everything is written down as soon as it is measured, so that a run that was stopped goes on where it was, and what it
had measured until then is used: by processes that start later, and in this one after `kernels.measured.forget()`.
"""

from __future__ import annotations

from .group import GroupCase
from .measure import Measuring
from .plan import cases_for, routes_by_direction
from .rule import NOISE, Verdict, verdict
from .run import Outcome, tune
from .shipped import TARGETS, shipped_table
from .store import Store, dump, provenance

__all__ = [
    "NOISE",
    "TARGETS",
    "GroupCase",
    "Measuring",
    "Outcome",
    "Store",
    "Verdict",
    "cases_for",
    "dump",
    "provenance",
    "routes_by_direction",
    "shipped_table",
    "tune",
    "verdict",
]
