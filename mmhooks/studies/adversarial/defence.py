"""The defence: which features a sample is aligned on, the aligned pictures, and how many features make it half work."""

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


def masks(mds: Any, k: int, n: int, *, seed: int, draw: int = 0) -> dict[str, Bool[Tensor, "n f"]]:
    """For each group and for random features ``k`` of them for every sample; another ``draw``, other features."""
    groups, _ = groups_of(mds)
    alive = mm.FeatureSet(mds.alive, len(mds.alive), name="alive", head=mds.head)
    own = 1_009 * draw + 2 * seed
    chosen = {g: samples_of(groups[g], k, n, seed=own) for g in GROUPS}
    return {**chosen, "random": samples_of(alive, k, n, seed=own + 1)}


def smallest(mds: Any) -> int:
    """As many features as every group has."""
    return min(len(f) for f in groups_of(mds)[0].values())


@dataclass(frozen=True)
class Made:
    """Pictures of all samples after one defence with one draw of features: after each step kept, the last too.

    The twins with a nonsense word and pictures without a trigger only go along in the first draw.
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
    """How hard pictures are moved: the same for every group."""

    steps: int
    lr: float
    matched: int  # features of a group that every sample is aligned on
    seed: int
    progress: bool = True

    def run(
        self, model: Any, samples: Samples, mds: Any, *, repeats: int, keep: Sequence[int], untouched: Sequence[int]
    ) -> Iterator[Made]:  # fmt: skip
        """Every group, random and all features on every sample, ``repeats`` times with other features; then once with
        as many as the smallest group has. ``untouched``: samples whose benign picture is moved as well."""
        n, strong = len(samples), smallest(mds)
        for draw in range(repeats):
            chosen: dict[str, Any] = masks(mds, self.matched, n, seed=self.seed, draw=draw)
            if draw == 0:
                chosen["all"] = None  # one draw is all there is
            for name, mask in chosen.items():
                yield self.one(
                    model, samples, name, mask, draw=draw, keep=keep if draw == 0 else (), untouched=untouched
                )
        if strong > self.matched:
            for name, mask in masks(mds, strong, n, seed=self.seed).items():
                yield self.one(model, samples, name, mask, strong=True)

    def one(
        self, model: Any, s: Samples, name: str, mask: Tensor | None, *, draw: int = 0, strong: bool = False,
        keep: Sequence[int] = (), untouched: Sequence[int] = (),
    ) -> Made:  # fmt: skip
        more = draw == 0 and not strong
        typed, plain = (list(s.typed), list(untouched)) if more else ([], [])
        n, m = len(s), len(typed)
        pictures = torch.cat([s.attack, s.controls["nonsense"][:m], s.base[plain]])
        owner = [*range(n), *typed, *plain]
        label = f"defence on {name}" + (f", draw {draw + 1}" if draw else ", strong" if strong else "")
        made = align(
            model, pictures, s.partner[owner], None if mask is None else mask[owner], steps=self.steps, lr=self.lr,
            keep=keep, progress=self.progress, label=label,
        )  # fmt: skip
        at = {k: p[:n] for k, p in made.kept.items()} | {self.steps: made.pictures[:n]}
        return Made(
            name,
            draw,
            strong,
            at,
            made.pictures[n : n + m],
            made.pictures[n + m :],
            made.history[:, :n].mean(1).tolist(),
            psnr(made.pictures[:n], s.attack).tolist(),
            made.linf[:n].tolist(),
        )


def check_matched(matched: int | None, mds: Any) -> None:
    """Refuses more features a sample than every group has."""
    if matched and matched > smallest(mds):
        raise mm.errors.MMHooksError(f"--matched {matched}: the smallest group has {smallest(mds)} features")


def calibrated(model: Any, mds: Any, benches: Sequence[Any], options: Options) -> dict[str, Any]:
    """:func:`half_way` on samples of another seed. An endpoint's answers cost something: where there are other
    victims, it is only asked about the samples that are reported."""
    free = [b for b in benches if not isinstance(b.victim, EndpointVictim)]
    return half_way(
        model, mds, free or benches, steps=options.steps, lr=options.lr, seed=options.seed + 1,
        progress=not options.quiet,
    )  # fmt: skip


def defend(
    defence: Defence,
    model: Any,
    samples: Samples,
    mds: Any,
    benches: Sequence[Any],
    untouched: Sequence[int],
    *,
    repeats: int,
) -> tuple[list[dict[str, Any]], dict[str, Made]]:
    """Asks every victim before and after every defence; the benches keep the answers.

    Returns:
        Numbers of every defence and draw, and by defence the first draw, whose pictures are shown, and described
        where they carry no trigger.
    """
    steps = defence.steps
    keep = sorted({max(1, steps // 4), max(1, steps // 2), steps})
    numbers: list[dict[str, Any]] = []
    first: dict[str, Made] = {}
    for bench in benches:
        bench.untreated()
    for made in defence.run(model, samples, mds, repeats=repeats, keep=keep, untouched=untouched):
        for bench in benches:
            bench.defended(made)
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


def half_way(
    model: Any, mds: Any, benches: Sequence[Any], *, steps: int, lr: float, seed: int, progress: bool
) -> dict[str, Any]:
    """How many *random* features leave half of what an attack gains over benign pictures, on samples of their own.

    A defence that stops everything cannot tell groups apart, nor can one that stops nothing. No group is looked at.
    The share left is (aligned − benign) / (unaligned − benign), rates of all victims added up. Of 2, 4, 8 … features,
    until less than a quarter is left or the smallest group has no more, the count whose share is nearest to one half
    is chosen, the smaller one of two.

    Returns:
        ``matched`` (the count), ``n``, ``tried``: for each count its rates by victim and the share left.
    """
    samples, most = benches[0].samples, smallest(mds)
    rates = {b.victim.name: {"benign": share(b.hits("benign", samples.partner)),
                             "unaligned": share(b.hits("unaligned", samples.attack))} for b in benches}  # fmt: skip
    low, high = (sum(r[c] for r in rates.values()) for c in ("benign", "unaligned"))
    tried: dict[int, dict[str, Any]] = {}
    for k in sorted({min(2**i, most) for i in range(1, most.bit_length() + 1)}) if high > low else ():
        made = Defence(steps, lr, k, seed, progress).one(
            model, samples, "random", masks(mds, k, len(samples), seed=seed)["random"]
        )
        got = {b.victim.name: share(b.hits(f"random {k}", made.final)) for b in benches}
        tried[k] = {"rates": got, "left": (sum(got.values()) - low) / (high - low)}
        if tried[k]["left"] < 0.25:
            break
    return {
        "matched": min(tried, key=lambda k: abs(tried[k]["left"] - 0.5)) if tried else most,
        "rule": "half of the attack's gain is left by random features" if tried
        else "the attack gains nothing on these samples: as many features as the smallest group has",
        "n": len(samples), "seed": seed, "rates": rates, "tried": {str(k): v for k, v in tried.items()},
    }  # fmt: skip


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def finite_mean(values: Sequence[float]) -> float | None:
    """Of what is finite: a picture that did not change has no PSNR."""
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else None
