"""The alignment defence: features per sample, the aligned images, and the calibration of how many features to match."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.attacks.align import align, samples_of
from mmhooks.analysis.attacks.pixels import psnr
from mmhooks.analysis.attacks.victims import EndpointVictim
from mmhooks.analysis.measures.groups import groups_of
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.studies.adversarial.options import Options
from mmhooks.studies.adversarial.samples import Samples

DRAWN = (*GROUPS, "random")
DEFENCES = (*DRAWN, "all")


def feature_masks(mds: Any, k: int, n: int, *, seed: int, draw: int = 0) -> dict[str, Bool[Tensor, "n f"]]:
    """Draws ``k`` features per sample from each group and from all alive features; each ``draw`` gives others."""
    groups, _ = groups_of(mds)
    alive = mm.FeatureSet(mds.alive, len(mds.alive), name="alive", head=mds.head)
    own = 1_009 * draw + 2 * seed
    chosen = {g: samples_of(groups[g], k, n, seed=own) for g in GROUPS}
    return {**chosen, "random": samples_of(alive, k, n, seed=own + 1)}


def smallest_group_size(mds: Any) -> int:
    """Returns the number of features of the smallest group."""
    return min(len(f) for f in groups_of(mds)[0].values())


@dataclass(frozen=True)
class DefendedImages:
    """Images of all samples after one defence with one draw of features.

    Attributes:
        at: images after each recorded step, the last one included.
        nonsense, benign: typographic samples with a nonsense word, and images without a trigger; first draw only.
    """

    defence: str
    draw: int
    strong: bool  # as many features as the smallest group has
    at: dict[int, Float[Tensor, "n 3 s s2"]] = field(repr=False)
    nonsense: Tensor = field(repr=False)
    benign: Tensor = field(repr=False)
    loss: list[float]
    psnr: list[float]
    linf: list[float]

    @property
    def final(self) -> Float[Tensor, "n 3 s s2"]:
        return self.at[max(self.at)]


@dataclass(frozen=True)
class Defence:
    """Strength of the defence: the same for every group."""

    steps: int
    lr: float
    matched: int  # features of a group that every sample is aligned on
    seed: int
    progress: bool = True

    def run(
        self, model: Any, samples: Samples, mds: Any, *, repeats: int, keep: Sequence[int], untouched: Sequence[int]
    ) -> Iterator[DefendedImages]:  # fmt: skip
        """Yields the defence by every group, random features and all features, on every sample.

        Args:
            repeats: draws of features; after them comes one run with as many as the smallest group has.
            keep: steps whose images are recorded, in the first draw.
            untouched: samples whose benign image is moved as well, in the first draw.
        """
        n, strong = len(samples), smallest_group_size(mds)
        for draw in range(repeats):
            chosen: dict[str, Any] = feature_masks(mds, self.matched, n, seed=self.seed, draw=draw)
            if draw == 0:
                chosen["all"] = None  # there is only one such set
            for name, mask in chosen.items():
                yield self.run_once(
                    model, samples, name, mask, draw=draw, keep=keep if draw == 0 else (), untouched=untouched
                )
        if strong > self.matched:
            for name, mask in feature_masks(mds, strong, n, seed=self.seed).items():
                yield self.run_once(model, samples, name, mask, strong=True)

    def run_once(
        self, model: Any, s: Samples, name: str, mask: Tensor | None, *, draw: int = 0, strong: bool = False,
        keep: Sequence[int] = (), untouched: Sequence[int] = (),
    ) -> DefendedImages:  # fmt: skip
        first = draw == 0 and not strong
        typed, plain = (list(s.typed), list(untouched)) if first else ([], [])
        n, m = len(s), len(typed)
        images = torch.cat([s.attack, s.controls["nonsense"][:m], s.base[plain]])
        owner = [*range(n), *typed, *plain]
        label = f"defence on {name}" + (f", draw {draw + 1}" if draw else ", strong" if strong else "")
        made = align(
            model, images, s.partner[owner], None if mask is None else mask[owner], steps=self.steps, lr=self.lr,
            keep=keep, progress=self.progress, label=label,
        )  # fmt: skip
        at = {k: p[:n] for k, p in made.kept.items()} | {self.steps: made.images[:n]}
        return DefendedImages(
            name,
            draw,
            strong,
            at,
            made.images[n : n + m],
            made.images[n + m :],
            made.history[:, :n].mean(1).tolist(),
            psnr(made.images[:n], s.attack).tolist(),
            made.linf[:n].tolist(),
        )


def check_matched(matched: int | None, mds: Any) -> None:
    """Refuses more features per sample than the smallest group has."""
    if matched and matched > smallest_group_size(mds):
        raise mm.errors.MMHooksError(
            f"--matched: expected at most {smallest_group_size(mds)}, got {matched}: the smallest group has no more features"
        )


def calibrate(model: Any, mds: Any, evaluations: Sequence[Any], options: Options) -> dict[str, Any]:
    """Runs :func:`find_matched_count` with the free victims, on samples of another seed.

    An endpoint's answers cost money: where there are other victims, it is only asked about the reported samples.
    """
    free = [b for b in evaluations if not isinstance(b.victim, EndpointVictim)]
    return find_matched_count(
        model, mds, free or evaluations, steps=options.steps, lr=options.lr, seed=options.seed + 1,
        progress=not options.quiet,
    )  # fmt: skip


def run_defences(
    defence: Defence,
    model: Any,
    samples: Samples,
    mds: Any,
    evaluations: Sequence[Any],
    untouched: Sequence[int],
    *,
    repeats: int,
) -> tuple[list[dict[str, Any]], dict[str, DefendedImages]]:
    """Runs every defence and evaluates every victim before and after it.

    Returns:
        Loss, PSNR and L∞ of every defence and draw; and by defence the first draw, whose images the figures show
        and whose benign images the cost is measured on.
    """
    steps = defence.steps
    keep = sorted({max(1, steps // 4), max(1, steps // 2), steps})
    numbers: list[dict[str, Any]] = []
    first: dict[str, DefendedImages] = {}
    for evaluation in evaluations:
        evaluation.evaluate_baselines()
    for made in defence.run(model, samples, mds, repeats=repeats, keep=keep, untouched=untouched):
        for evaluation in evaluations:
            evaluation.evaluate_defence(made)
        numbers.append(
            {
                "defence": made.defence,
                "draw": made.draw,
                "strong": made.strong,
                "loss": made.loss,
                "psnr": finite_mean(made.psnr),
                "linf": finite_mean(made.linf),
            }
        )
        if made.draw == 0 and not made.strong:
            first[made.defence] = made
    return numbers, first


def find_matched_count(
    model: Any, mds: Any, evaluations: Sequence[Any], *, steps: int, lr: float, seed: int, progress: bool
) -> dict[str, Any]:
    """Finds how many *random* features leave half of what the attack gains over benign images.

    A defence that stops everything cannot distinguish groups, nor can one that stops nothing. No group is used here.
    The share left is (aligned − benign) / (unaligned − benign), with the rates of all victims added up. The counts
    2, 4, 8 … are tried until less than a quarter is left or the smallest group has no more features; the count whose
    share is nearest to one half is chosen, the smaller one on a tie.

    Returns:
        ``matched`` (the count), ``n``, and ``tried``: rates by victim and the share left, per count.
    """
    samples, most = evaluations[0].samples, smallest_group_size(mds)
    rates = {b.victim.name: {"benign": success_rate(b.hits("benign", samples.partner)),
                             "unaligned": success_rate(b.hits("unaligned", samples.attack))} for b in evaluations}  # fmt: skip
    low, high = (sum(r[c] for r in rates.values()) for c in ("benign", "unaligned"))
    tried: dict[int, dict[str, Any]] = {}
    for k in sorted({min(2**i, most) for i in range(1, most.bit_length() + 1)}) if high > low else ():
        made = Defence(steps, lr, k, seed, progress).run_once(
            model, samples, "random", feature_masks(mds, k, len(samples), seed=seed)["random"]
        )
        got = {b.victim.name: success_rate(b.hits(f"random {k}", made.final)) for b in evaluations}
        tried[k] = {"rates": got, "left": (sum(got.values()) - low) / (high - low)}
        if tried[k]["left"] < 0.25:
            break
    return {
        "matched": min(tried, key=lambda k: abs(tried[k]["left"] - 0.5)) if tried else most,
        "rule": "half of the attack's gain is left by random features" if tried
        else "the attack gains nothing on these samples: as many features as the smallest group has",
        "n": len(samples), "seed": seed, "rates": rates, "tried": {str(k): v for k, v in tried.items()},
    }  # fmt: skip


def success_rate(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def finite_mean(values: Sequence[float]) -> float | None:
    """Returns the mean of the finite values: an image that did not change has no PSNR."""
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else None
