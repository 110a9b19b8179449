"""What a study decides before it runs: its primary hypotheses, Holm's correction over them, and one rule for verdicts.

A study names its :class:`Primary` hypotheses in its code. :func:`decide` corrects their p-values together; whatever
else is tested is *exploratory*, keeps its own p and gets no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.results import Estimate, Result
from mmhooks.analysis.statistics.equivalence import ALTERNATIVES, Alternative
from mmhooks.errors import MMHooksError, ShapeMismatch

LEVEL = 0.05
Outcome = Literal["shown", "opposite", "undecided"]


@dataclass(frozen=True)
class Primary:
    """A hypothesis that was chosen before the run.

    Attributes:
        name: unique in its study. alternative: the direction that the claim has, or "two-sided" if it has none.
        margin: for a claim of "no effect" (two-sided) or "keeps" ("less"): the largest effect that still counts as
            none, in the unit of the estimate. None: a claim that there is an effect.
    """

    name: str
    alternative: Alternative = "two-sided"
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.alternative not in ALTERNATIVES:
            raise MMHooksError(
                f"primary {self.name!r}: expected an alternative of {', '.join(ALTERNATIVES)}, got {self.alternative!r}"
            )
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin > 0):
            raise ShapeMismatch(f"primary {self.name!r}: expected a positive margin, got {self.margin}")


@dataclass(frozen=True)
class Measured:
    """What the run found for one hypothesis.

    Attributes:
        p: against no effect, *two-sided* for a claim of an effect; of :func:`~.equivalence.equivalence` or
            :func:`~.equivalence.noninferiority` for a claim with a margin.
        detectable: the smallest effect (with a margin: the smallest margin) detected at 80 % power.
    """

    estimate: Estimate
    p: float
    detectable: float


@dataclass(frozen=True)
class Decision(Result):
    """A hypothesis, what was found, and the verdict after correction."""

    name: str
    alternative: Alternative
    margin: float | None
    estimate: Estimate
    p: float
    adjusted: float
    detectable: float
    outcome: Outcome


def holm(p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Adjusts p-values so that calling those below alpha keeps the chance of *any* false one below alpha (Holm 1979).

    NaN (not tested) stays NaN, but counts as a hypothesis: it was chosen before the run.

    >>> holm(torch.tensor([0.01, 0.04, 0.03]))
    tensor([0.0300, 0.0600, 0.0600], dtype=torch.float64)
    """
    p = p.double()
    n, order = len(p), p.nan_to_num(nan=2.0).argsort(stable=True)
    factors = torch.arange(n, 0, -1, dtype=torch.float64)
    adjusted = torch.empty_like(p)
    adjusted[order] = (p[order].nan_to_num(nan=1.0) * factors).cummax(0).values.clamp_max(1.0) if n else p
    return torch.where(p.isnan(), torch.nan, adjusted)


def decide(
    primaries: Sequence[Primary], found: Mapping[str, Measured], *, level: float = LEVEL
) -> dict[str, Decision]:
    """Corrects the primaries' p-values by Holm and gives each its verdict.

    Raises:
        MMHooksError: two primaries of one name, one that was not measured (give p = NaN where it could not be), or a
            measurement of no primary: it is exploratory.

    >>> one = Measured(Estimate(.2, .1, .3), .004, .15)
    >>> decide([Primary("moves", "greater")], {"moves": one})["moves"].outcome
    'shown'
    """
    names = [p.name for p in primaries]
    if len(set(names)) < len(names) or set(names) != set(found):
        raise MMHooksError(
            f"primaries: expected one measurement of each of {', '.join(names)}, got {', '.join(found) or 'none'}; "
            "whatever was not named before the run is exploratory"
        )
    adjusted = holm(torch.tensor([found[n].p for n in names], dtype=torch.float64)).tolist()
    return {
        p.name: Decision(
            p.name, p.alternative, p.margin, found[p.name].estimate, found[p.name].p, q, found[p.name].detectable,
            outcome_of(p, found[p.name].estimate, q, level=level),
        )
        for p, q in zip(primaries, adjusted, strict=True)
    }  # fmt: skip


def outcome_of(primary: Primary, estimate: Estimate, adjusted: float, *, level: float = LEVEL) -> Outcome:
    """Returns the verdict: shown, the opposite of a directed claim, or undecided.

    >>> outcome_of(Primary("moves", "greater"), Estimate(-.2, -.3, -.1), .001)
    'opposite'
    >>> outcome_of(Primary("keeps", "less", margin=.05), Estimate(.01, -.02, .04), .2)
    'undecided'
    """
    if math.isnan(adjusted) or adjusted >= level:
        return "undecided"
    if primary.margin is not None or primary.alternative == "two-sided":
        return "shown"
    return "shown" if (estimate.value > 0) == (primary.alternative == "greater") else "opposite"


def verdict_text(decision: Decision, *, digits: int = 3, scale: float = 1.0, unit: str = "") -> str:
    """Writes a decision in one clause: the verdict, the estimate with its interval, p after Holm, and the power line.

    Args:
        scale: factor on the numbers shown, 100 for points. unit: written after them, with its leading space.

    >>> found = decide([Primary("moves", "greater")], {"moves": Measured(Estimate(.02, -.1, .1), .6, .15)})
    >>> verdict_text(found["moves"], digits=2)
    'undecided: +0.02 [-0.10, +0.10], p 0.600 (Holm); 80 % power from 0.15'
    """
    d = decision
    said = {"shown": "shown", "opposite": "the opposite is shown", "undecided": "undecided"}[d.outcome]
    if d.margin is not None:
        bound = f"{scale * d.margin:.{digits}f}{unit}"
        inside = f"within ±{bound}" if d.alternative == "two-sided" else f"by less than {bound}"
        said = f"shown to stay {inside}" if d.outcome == "shown" else f"not shown to stay {inside}"
    e = d.estimate
    between = f" [{scale * e.low:+.{digits}f}, {scale * e.high:+.{digits}f}]" if e.has_interval else ""
    line = f"{said}: {scale * e.value:+.{digits}f}{between}{unit}, {_p_text(d.adjusted)} (Holm)"
    if d.outcome != "undecided":
        return line
    return f"{line}; {power_text(d.detectable, digits=digits, scale=scale, unit=unit, margin=d.margin is not None)}"


def power_text(
    detectable: float, *, digits: int = 3, scale: float = 1.0, unit: str = "", margin: bool = False
) -> str:
    """Writes the power line that stands beside "undecided" and "does not differ".

    >>> power_text(0.043, digits=1, scale=100.0, unit=" points"), power_text(math.inf)
    ('80 % power from 4.3 points', 'too few samples to decide at all')
    """
    if math.isnan(detectable):
        return "power unknown"
    if math.isinf(detectable):
        return "too few samples to decide at all"
    what = "80 % power for a margin of" if margin else "80 % power from"
    return f"{what} {scale * detectable:.{digits}f}{unit}"


def _p_text(p: float) -> str:
    if math.isnan(p):
        return "not tested"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"
