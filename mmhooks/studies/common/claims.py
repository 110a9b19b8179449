"""Statements of the paper compared with measured numbers: the same, different, or undecided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmhooks.report import Estimate, interval, signed

Verdict = Literal["same", "differs", "open"]


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, with what was measured here."""

    verdict: Verdict
    claim: str
    measured: str

    def sentence(self) -> str:
        lead = {"same": "As in the paper", "differs": "Differs from the paper", "open": "Undecided"}[
            self.verdict
        ]
        return f"{lead}: {self.claim} Here: {self.measured}"


def verdict_of_outcome(outcome: str) -> Verdict:
    """Returns the verdict on a claim of the paper by the outcome of its primary hypothesis."""
    verdicts: dict[str, Verdict] = {"shown": "same", "opposite": "differs", "undecided": "open"}
    return verdicts[outcome]


def difference(a: Estimate, b: Estimate) -> Estimate:
    """Returns ``a - b`` of independent estimates; half-widths add in quadrature."""
    down = math.hypot(a.value - a.low, b.high - b.value)
    up = math.hypot(a.high - a.value, b.value - b.low)
    value = a.value - b.value
    n = None if a.n is None or b.n is None else min(a.n, b.n)
    return Estimate(value, value - down, value + up, n)


def magnitude(a: Estimate) -> Estimate:
    """Returns the absolute value; an interval that contains zero starts at zero."""
    if a.value >= 0:
        return Estimate(a.value, max(a.low, 0.0), a.high, a.n)
    return Estimate(-a.value, max(-a.high, 0.0), -a.low, a.n)


def agreement(measured: Estimate, paper: float) -> Verdict:
    """Returns whether ``measured`` has the sign of ``paper``; undecided where the interval contains zero."""
    side = measured.side()
    if side == "undecided" or paper == 0:
        return "open"
    return "same" if (side == "above") == (paper > 0) else "differs"


def difference_note(e: Estimate) -> str:
    return f"(difference {signed(e.value)}, 95 % interval {interval(e)})"


def joined_by_and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
