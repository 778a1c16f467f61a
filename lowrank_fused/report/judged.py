"""Goal lines beside what was measured; a line without a measurement says so and stays empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..benchmark import Row
from ..roofline.goals import GoalLine, goal_lines
from .results import OURS, Results, best_clock, same_case

__all__ = ["Judgement", "judge"]

# Sizes (in, out) of the layers that goals name; of a block those that tell it from others.
SCOPES = {
    "q_proj, o_proj": (4096, 4096),
    "gate_proj, up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
    "k_proj, v_proj": (4096, 1024),
    "block": (4096, 14336),
    "4096 -> 4096": (4096, 4096),
    "5120 -> 5120": (5120, 5120),
    "8192 -> 8192": (8192, 8192),
}
TOKENS = (8192, 4096, 2048, 1024)
DROPOUTS = (0.0, 0.1)
RANK = 16
# The goal's "addmm" is the form of other trainers; the route of that name is ours, and measured beside it.
MEASURED_AS = {"addmm": "three-gemm"}
NAMES = {
    "addmm": "three GEMMs (unsloth, axolotl)",
    "eager-fp32": "PEFT, fp32 adapters",
    "eager-fp8": "PEFT on a linear in fp8",
    "eager": "PEFT",
}


@dataclass(frozen=True)
class Judgement:
    """A goal at one number of tokens and one dropout, and the ratio that was measured, if one was."""

    goal: GoalLine
    tokens: int
    dropout: float
    measured: float | None
    provider: str | None

    @property
    def standing(self) -> str:
        """The most demanding line reached."""
        return self.goal.standing(self.measured, self.dropout > 0)

    @property
    def against(self) -> str:
        """The baseline, for a person, and what its lines suppose."""
        name = NAMES.get(self.goal.baseline, self.goal.baseline)
        return f"{name}; {self.goal.note}" if self.goal.note else name


def judge(results: Results) -> list[Judgement]:
    """Every goal of this GPU, for the largest number of tokens and for the least that has goals of its own.

    Without a known GPU there are none: goals are ratios of arithmetic to bandwidth, and no two GPUs share them.
    """
    if results.gpu is None:
        return []
    found: list[Judgement] = []
    for tokens in _tokens(results):
        for goal in goal_lines(results.gpu.name, tokens):
            for dropout in DROPOUTS:
                measured, provider = _measured(results, goal, tokens, dropout)
                found.append(Judgement(goal, tokens, dropout, measured, provider))
    return found


def _tokens(results: Results) -> list[int]:
    """Numbers of tokens that were measured and have goals; the usual one where none was."""
    seen = {row.tokens for row in results.measured if row.what in ("layer", "block")}
    return [tokens for tokens in TOKENS if tokens in seen] or [TOKENS[0]]


def _measured(results: Results, goal: GoalLine, tokens: int, dropout: float) -> tuple[float | None, str | None]:
    """The ratio from rows of one case and one clock, and which provider of ours it is of."""
    if not goal.offered:
        return None, None
    what, (k, n) = ("block" if goal.scope == "block" else "layer"), SCOPES[goal.scope]
    wanted = (what, k, n, tokens, RANK, dropout, "bf16", "both")
    rows = [
        row
        for row in results.measured
        if (row.what, row.in_features, row.out_features, row.tokens, row.rank, row.dropout, row.dtype, row.mode)
        == wanted
    ]
    for of_case in same_case(rows).values():
        times = {row.provider: row for row in best_clock(of_case)}
        suffix = "-fp32" if goal.baseline.endswith("-fp32") else ""
        ours = next((times[name + suffix] for name in OURS if name + suffix in times), None)
        baseline = times.get(MEASURED_AS.get(goal.baseline, goal.baseline))
        if ours is not None and baseline is not None:
            return _ratio(ours, baseline, goal), ours.provider
    return None, None


def _ratio(ours: Row, baseline: Row, goal: GoalLine) -> float | None:
    """Paired where the row has it, of medians otherwise."""
    if goal.baseline == "frozen" and ours.overhead is not None:
        return ours.overhead
    if goal.baseline in ("eager", "eager-fp32") and ours.speedup is not None:
        return ours.speedup
    if not ours.ms_p50 or not baseline.ms_p50:
        return None
    return ours.ms_p50 / baseline.ms_p50 if goal.lower_is_better else baseline.ms_p50 / ours.ms_p50


def reached(judgements: Sequence[Judgement]) -> str:
    """One sentence: how many goals were measured, how many of those reach "must", how many are not offered."""
    measured = [j for j in judgements if j.measured is not None]
    good = [j for j in measured if j.standing != "below must"]
    told = f"{len(measured)} of {len(judgements)} goal lines measured, {len(good)} of these reach must or better"
    absent = sum(not j.goal.offered for j in judgements)
    return f"{told}, {absent} for what this package does not offer" if absent else told
