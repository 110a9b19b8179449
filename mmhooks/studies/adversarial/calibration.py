"""How strong the defence is: set on samples of another seed, by random features alone, at two operating points.

The share of the attack's gain that a defence leaves is (aligned − benign) / (unaligned − benign), with the rates of all
victims added up. Half: as few features that random ones leave half of it. The paper's: as many features as the smallest
group has, as weakly that random ones leave the paper's 79 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import mmhooks as mm
from mmhooks.analysis.attacks.victims import EndpointVictim
from mmhooks.studies.adversarial.defence import Defence
from mmhooks.studies.adversarial.dictionaries import Dictionary, feature_masks, smallest_group_size
from mmhooks.studies.adversarial.options import Options

K = TypeVar("K")

HALF = 0.5
PAPER_LEFT = 0.79  # (65 − 10) / (80 − 10), Table 8: random features against no alignment
WEAKEST = 6  # times that the learning rate is halved at most


def check_matched(matched: int | None, one: Dictionary) -> None:
    """Refuses more features per sample than the smallest group has."""
    if matched and matched > smallest_group_size(one.mds):
        raise mm.errors.MMHooksError(
            f"--matched: expected at most {smallest_group_size(one.mds)}, got {matched}: the smallest group of {one.name} "
            "has no more features"
        )


class Trial:
    """Random features on the calibration's samples, and the share of the attack's gain that they leave.

    An endpoint's answers cost money: where there are other victims, it is only asked about the reported samples.
    """

    def __init__(self, model: Any, evaluations: Sequence[Any], options: Options) -> None:
        free = [b for b in evaluations if not isinstance(b.victim, EndpointVictim)]
        self.model, self.options = model, options
        self.evaluations = free or list(evaluations)
        self.samples, self.seed = evaluations[0].samples, options.seed + 1
        self.rates = {
            b.victim.name: {
                "benign": success_rate(b.hits("benign", self.samples.partner)),
                "unaligned": success_rate(b.hits("unaligned", self.samples.attack)),
            }
            for b in self.evaluations
        }
        self.low, self.high = (sum(r[c] for r in self.rates.values()) for c in ("benign", "unaligned"))

    @property
    def gains(self) -> bool:
        """Whether the attack gains anything over benign images."""
        return self.high > self.low

    def left(self, one: Dictionary, k: int, lr: float) -> dict[str, Any]:
        """Aligns the samples on ``k`` random features each; returns rates by victim and the share left."""
        mask = feature_masks(one.mds, k, len(self.samples), seed=self.seed)["random"]
        made = Defence(
            self.options.steps, lr, k, self.seed, first=False, progress=not self.options.quiet
        ).run_once(self.model, self.samples, one.site, "random", mask)
        got = {b.victim.name: success_rate(b.hits(f"random {k}", made.final)) for b in self.evaluations}
        return {"rates": got, "left": (sum(got.values()) - self.low) / (self.high - self.low)}


def calibrate(trial: Trial, one: Dictionary, *, paper_point: bool) -> dict[str, Any]:
    """Finds both operating points of a dictionary: ``matched`` and, where asked for, ``paper_point``.

    The number of features is doubled until less than a quarter of the gain is left, or the smallest group has no more;
    the count whose share is nearest to one half is taken, the smaller one on a tie. Then the learning rate is halved
    until the paper's share is left, and one between the last two is tried; the nearest is taken.
    """
    o, most = trial.options, smallest_group_size(one.mds)
    found: dict[str, Any] = {"n": len(trial.samples), "seed": trial.seed, "rates": trial.rates, "tried": {}}
    if o.matched is not None:
        found |= {"matched": o.matched, "rule": "set by --matched"}
    elif not trial.gains:
        rule = "the attack gains nothing on these samples: as many features as the smallest group has"
        found |= {"matched": most, "rule": rule}
    else:
        tried: dict[int, dict[str, Any]] = {}
        for k in sorted({min(2**i, most) for i in range(most.bit_length() + 1)}):
            tried[k] = trial.left(one, k, o.lr)
            if tried[k]["left"] < HALF / 2:
                break
        found |= {
            "matched": nearest(tried, HALF),
            "rule": "half of the attack's gain is left by random features",
            "tried": {str(k): v for k, v in tried.items()},
        }
    found["paper_point"] = paper_rate(trial, one) if paper_point and trial.gains else None
    return found


def paper_rate(trial: Trial, one: Dictionary) -> dict[str, Any]:
    """Finds the learning rate at which random features, as many as the smallest group has, leave the paper's share."""
    k, lr = smallest_group_size(one.mds), trial.options.lr
    tried: dict[float, dict[str, Any]] = {}
    for step in range(1, WEAKEST + 1):
        tried[lr / 2**step] = trial.left(one, k, lr / 2**step)
        if tried[lr / 2**step]["left"] >= PAPER_LEFT:
            if step > 1:
                tried[lr / 2 ** (step - 0.5)] = trial.left(one, k, lr / 2 ** (step - 0.5))
            break
    best = nearest(tried, PAPER_LEFT)
    return {
        "lr": best,
        "features": k,
        "left": tried[best]["left"],
        "tried": [{"lr": rate, **tried[rate]} for rate in sorted(tried, reverse=True)],
    }


def nearest(tried: Mapping[K, Mapping[str, Any]], wanted: float) -> K:
    """Returns what left the share nearest to ``wanted``; of two, the one that was tried first."""
    return min(tried, key=lambda k: abs(tried[k]["left"] - wanted))


def success_rate(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
