"""Discrimination and drift: what masking does to the separation of the classes, apart from where all samples move.

The probability of the own gender falls for women and rises for men when all samples drift towards "man", with the
classes as far apart as before. So each mask has four numbers: the change of the own probability (the paper's), of
the area under the curve and of d' (separation, blind to drift), and of the mean probability of "woman" (drift).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.interventions.masked_classification import CosineLabels, Masked
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.analysis.results import plain
from mmhooks.analysis.statistics.controls import NoControl, activation_mass, size_matched, weight_matched
from mmhooks.analysis.statistics.leave_out import leave_one_cluster_out
from mmhooks.analysis.statistics.measured import against_many_sets
from mmhooks.analysis.statistics.power import detectable_mean
from mmhooks.analysis.statistics.primaries import Measured, Primary, decide, verdict_text
from mmhooks.errors import ShapeMismatch
from mmhooks.utils.indexing import number_labels

MEASURES = {
    "own": "own gender's probability",
    "auc": "AUC",
    "dprime": "d'",
    "drift": "probability of “woman”",
}
PRIMARY_DRAWS = 10  # times as many random sets: the smallest p of 2,000 is .001, which survives Holm over six
FAMILY_DRAWS = 200  # random sets whose mean a group is compared with while families are left out
OWN = {"image": "ImgD", "text": "TextD"}

# Chosen before the run. Negative: masking lowers it.
BEYOND_RANDOM = tuple(
    Primary(f"{arm}: {group} lowers the {MEASURES[m]} more than random sets", "less")
    for arm, group in (("images", "ImgD"), ("implicit texts", "TextD"))
    for m in ("own", "auc")
)
TABLE_7 = (
    Primary("images: women lose more than men without ImgD", "greater"),
    Primary("implicit texts: men lose more than women without TextD", "less"),
)
PRIMARIES = (*BEYOND_RANDOM, *TABLE_7)


@dataclass(frozen=True)
class Arm:
    """Samples of one kind with their classes (0 woman, 1 man) and families, ready to be masked."""

    name: str
    side: str
    samples: Masked
    y: Int[Tensor, " n"]
    families: Int[Tensor, " n"]

    @classmethod
    def of(
        cls, name: str, side: str, head: Any, x: Float[Tensor, "n d"], y: Int[Tensor, " n"], families: Sequence[Any]
    ) -> Arm:  # fmt: skip
        return cls(name, side, Masked(head, x), y, number_labels(list(families)))


def auc(score: np.ndarray, y: np.ndarray) -> float:
    """Computes the chance that a random woman scores higher than a random man, ties half; NaN without one of them.

    >>> auc(np.array([3.0, 1.0, 2.0]), np.array([0, 1, 0]))
    1.0
    """
    from scipy.stats import rankdata

    women = y == 0
    n, m = int(women.sum()), int((~women).sum())
    if not n or not m:
        return math.nan
    return float((rankdata(score)[women].sum() - n * (n + 1) / 2) / (n * m))


def dprime(score: np.ndarray, y: np.ndarray) -> float:
    """Computes the difference of the classes' mean scores over their pooled standard deviation."""
    one, other = score[y == 0], score[y == 1]
    if min(len(one), len(other)) < 2:
        return math.nan
    spread = math.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2)
    return float((one.mean() - other.mean()) / spread) if spread > 0 else math.nan


def numbers(woman: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Computes the four measures from each sample's probability of "woman"; AUC and d' of its log-odds, and drift with
    both classes weighted equally."""
    clipped = woman.clip(1e-12, 1 - 1e-12)
    score = np.log(clipped / (1 - clipped))
    both = [woman[y == c].mean() if (y == c).any() else math.nan for c in (0, 1)]
    own = np.where(y == 0, woman, 1 - woman)
    return {
        "own": float(own.mean()),
        "auc": auc(score, y),
        "dprime": dprime(score, y),
        "drift": float(sum(both) / 2),
    }


def discrimination(
    arms: Sequence[Arm], mds: Any, labels: CosineLabels, *, seed: int, draws: int
) -> dict[str, Any]:
    """Measures every arm under every group, against random sets of its size and of its mass, and decides the primaries.

    Args:
        draws: random sets of alive features outside the group, of its size, and where there are any of its mass as well;
            the primaries get ten times as many.
    """
    out: dict[str, Any] = {"arms": {}}
    found: dict[str, Measured] = {}
    by_name = {p.name: p for p in PRIMARIES}
    for arm in arms:
        y = arm.y.numpy()

        def woman(mask: Any, arm: Arm = arm) -> np.ndarray:
            return labels(arm.samples.vectors(mask))[:, 0].numpy()

        before, groups = woman(None), {}
        base = numbers(before, y)
        for name, group in zip(GROUPS, mds.groups, strict=True):
            if not len(group):
                continue
            after = woman(group)
            values = {m: v - base[m] for m, v in numbers(after, y).items()}
            own = name == OWN[arm.side]
            sets = _sets(group, mds.alive, seed, draws * PRIMARY_DRAWS if own else draws)
            drawn = [woman(s) for s in sets]
            random = [{m: v - base[m] for m, v in numbers(w, y).items()} for w in drawn]
            cell: dict[str, Any] = {
                "change": {m: _change(m, before, after, arm) for m in MEASURES},
                "random": {m: _against(m, values[m], [r[m] for r in random]) for m in MEASURES}
                if sets
                else None,
                "mass": _mass_matched(arm, group, mds, values, base, woman, y, seed, draws),
            }
            if own:
                for m in ("own", "auc"):
                    primary = by_name.get(
                        f"{arm.name}: {name} lowers the {MEASURES[m]} more than random sets"
                    )
                    if primary:
                        found[primary.name] = (
                            _beyond_random(primary, m, after, drawn, arm) if sets else _UNKNOWN
                        )
                for primary in TABLE_7:
                    if primary.name.startswith(f"{arm.name}: "):
                        found[primary.name] = _women_less_men(before, after, arm)
            groups[name] = cell
        out["arms"][arm.name] = {
            "n": len(y), "families": len(arm.families.unique()), "base": base, "groups": groups,
        }  # fmt: skip
    decided = decide([p for p in PRIMARIES if p.name in found], found)
    out["primaries"] = {
        n: {**d.to_json(), "sentence": verdict_text(d, digits=1, scale=100.0, unit=" points")}
        for n, d in decided.items()
    }
    return plain(out)


def _beyond_random(
    primary: Primary, measure: str, after: np.ndarray, drawn: Sequence[np.ndarray], arm: Arm
) -> Measured:
    """Tests a group's effect against random sets, which must hold over sets of features *and* over families of samples.

    The rank among random sets says that these samples tell the group from other sets, not that other families would. So
    p is the larger of the rank's and that of the difference to the mean of random sets with families left out in turn;
    the interval is over families.
    """
    y = arm.y.numpy()
    by_rank = against_many_sets(primary, numbers(after, y)[measure], [numbers(w, y)[measure] for w in drawn])
    few = drawn[:FAMILY_DRAWS]

    def difference(kept: Tensor) -> float:
        at = kept.numpy()
        random = [numbers(w[at], y[at])[measure] for w in few]
        return numbers(after[at], y[at])[measure] - float(np.mean(random))

    found = leave_one_cluster_out(difference, arm.families)
    p = max(by_rank.p, found.p()) if not math.isnan(found.p()) else math.nan
    detectable = max(by_rank.detectable, detectable_mean(found.error, found.df))
    return Measured(found.mean, p, detectable)


_UNKNOWN = Measured(leave_one_cluster_out(lambda kept: math.nan, torch.arange(2)).mean, math.nan, math.inf)


def _sets(group: Any, alive: Any, seed: int, draws: int) -> Sequence[Any]:
    """Returns random sets outside the group; none where fewer features are left than it has."""
    try:
        return size_matched(group, draws=draws, seed=seed, alive=alive, disjoint=True)
    except ShapeMismatch:
        return ()


def _against(measure: str, value: float, drawn: list[float]) -> dict[str, Any]:
    m = against_many_sets(Primary(measure), value, drawn)
    return {"mean": float(np.mean(drawn)), "difference": m.estimate, "p": m.p, "detectable": m.detectable}


def _mass_matched(
    arm: Arm, group: Any, mds: Any, values: Any, base: Any, woman: Any, y: np.ndarray, seed: int, draws: int
) -> dict[str, Any]:
    try:
        made = weight_matched(
            group, activation_mass(arm.samples.latents), draws=draws, seed=seed, alive=mds.alive
        )
    except (NoControl, ShapeMismatch) as fault:
        return {"none": str(fault)}
    random = [{m: v - base[m] for m, v in numbers(woman(s), y).items()} for s in made.sets]
    return {
        "ratio": made.ratio, "overlap": made.overlap,
        **{m: _against(m, values[m], [r[m] for r in random]) for m in MEASURES},
    }  # fmt: skip


def _change(measure: str, before: np.ndarray, after: np.ndarray, arm: Arm) -> dict[str, Any]:
    """Returns the change of one measure, its interval and p over families, and the smallest one detectable."""
    y = arm.y.numpy()

    def change(kept: Tensor) -> float:
        at = kept.numpy()
        return numbers(after[at], y[at])[measure] - numbers(before[at], y[at])[measure]

    found = leave_one_cluster_out(change, arm.families)
    return {"estimate": found.mean, "p": found.p(), "detectable": detectable_mean(found.error, found.df)}


def _women_less_men(before: np.ndarray, after: np.ndarray, arm: Arm) -> Measured:
    y = arm.y.numpy()
    drop = np.where(y == 0, before - after, after - before)  # of the own gender's probability

    def difference(kept: Tensor) -> float:
        at = kept.numpy()
        sides = [drop[at][y[at] == c] for c in (0, 1)]
        return float(sides[0].mean() - sides[1].mean()) if all(len(s) for s in sides) else math.nan

    found = leave_one_cluster_out(difference, arm.families)
    return Measured(found.mean, found.p(), detectable_mean(found.error, found.df))
