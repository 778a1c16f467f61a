"""Goal lines: what a GPU must show, should show, and cannot exceed. Set beforehand from a traffic model.

bf16, rank 16, forward plus backward, GPU time. `must`: thin kernels at 90 % of bandwidth around library GEMMs, to which
adding to their output costs 3 %. `aim`: Triton's GEMMs at 97 % of the library's. `stretch`: at par with it. `ceiling`:
everything read and written once. A prediction never takes the place of a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["GOAL_LINES", "GoalLine", "goal_lines"]

Line = tuple[float, float]  # without dropout, and with dropout 0.1


@dataclass(frozen=True)
class GoalLine:
    """One ratio and its lines.

    `baseline` is a provider, `scope` linears of a Llama-3-8B block with commas between them, or "block". Against
    "frozen" the ratio is our time over the baseline's, to be low; against others it is the speed-up over the baseline.
    """

    baseline: str
    scope: str
    must: Line
    aim: Line
    stretch: Line
    ceiling: Line
    gpu: str = "H100"
    least_tokens: int = 4096

    @property
    def lower_is_better(self) -> bool:
        """Whether the ratio is a price."""
        return self.baseline == "frozen"

    def lines(self, dropout: bool) -> dict[str, float]:
        """The lines by name, the least demanding first."""
        named = {"must": self.must, "aim": self.aim, "stretch": self.stretch, "ceiling": self.ceiling}
        return {name: line[dropout] for name, line in named.items()}

    def standing(self, measured: float | None, dropout: bool) -> str:
        """The most demanding line that a measured ratio reaches; "not measured" for None, "below must" for none."""
        if measured is None:
            return "not measured"
        sign = -1 if self.lower_is_better else 1
        reached = [name for name, line in self.lines(dropout).items() if sign * measured >= sign * line]
        return reached[-1] if reached else "below must"


GOAL_LINES: Sequence[GoalLine] = (
    GoalLine("frozen", "q_proj, o_proj", (1.21, 1.22), (1.14, 1.15), (1.11, 1.11), (1.01, 1.01)),
    GoalLine("frozen", "gate_proj, up_proj", (1.13, 1.14), (1.09, 1.09), (1.06, 1.06), (1.01, 1.01)),
    GoalLine("frozen", "down_proj", (1.16, 1.16), (1.12, 1.12), (1.08, 1.08), (1.01, 1.01)),
    GoalLine("frozen", "k_proj, v_proj", (1.53, 1.55), (1.37, 1.38), (1.32, 1.32), (1.03, 1.03)),
    GoalLine("frozen", "block", (1.12, 1.12), (1.075, 1.08), (1.045, 1.045), (1.0, 1.0)),
    GoalLine("eager", "q_proj, o_proj", (1.25, 1.38), (1.33, 1.46), (1.37, 1.51), (1.50, 1.66)),
    GoalLine("eager", "gate_proj, up_proj", (1.22, 1.26), (1.26, 1.30), (1.30, 1.35), (1.37, 1.41)),
    GoalLine("eager", "down_proj", (1.11, 1.24), (1.15, 1.29), (1.19, 1.33), (1.28, 1.44)),
    GoalLine("eager", "k_proj, v_proj", (1.37, 1.77), (1.54, 1.98), (1.59, 2.05), (2.04, 2.66)),
    GoalLine("eager", "block", (1.25, 1.35), (1.30, 1.40), (1.34, 1.44), (1.41, 1.53)),
    GoalLine("eager-fp32", "block", (1.49, 1.67), (1.55, 1.74), (1.60, 1.80), (1.69, 1.90)),
    GoalLine("compile", "block", (1.20, 1.26), (1.25, 1.31), (1.29, 1.35), (1.36, 1.43)),
    GoalLine("three-gemm", "block", (1.09, 1.35), (1.14, 1.40), (1.17, 1.44), (1.24, 1.53)),
    GoalLine("lorafusion", "block", (1.01, 1.06), (1.05, 1.10), (1.08, 1.13), (1.14, 1.20)),
    GoalLine("eager", "block", (1.28, 1.38), (1.35, 1.47), (1.40, 1.53), (1.52, 1.66), least_tokens=1024),
    GoalLine("eager", "block", (1.12, 1.18), (1.16, 1.22), (1.20, 1.26), (1.23, 1.29), gpu="A100"),
)


def goal_lines(gpu: str, tokens: int) -> list[GoalLine]:
    """The goals of this GPU that so many tokens are judged by; one for few tokens yields to one for more."""
    able = [goal for goal in GOAL_LINES if goal.gpu == gpu and goal.least_tokens <= tokens]
    most = {(goal.baseline, goal.scope): goal for goal in sorted(able, key=lambda goal: goal.least_tokens)}
    return [goal for goal in able if most[goal.baseline, goal.scope] is goal]
