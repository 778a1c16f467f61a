"""`python -m lowrank_fused.cli`."""

from __future__ import annotations

from . import main

main()
