"""The alignment defence: features per sample, and the aligned images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.attacks.align import align
from mmhooks.analysis.attacks.pixels import psnr
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.studies.adversarial.dictionaries import Dictionary, feature_masks, smallest_group_size
from mmhooks.studies.adversarial.samples import Samples

DRAWN = (*GROUPS, "random")
DEFENCES = (*DRAWN, "all")


@dataclass(frozen=True)
class DefendedImages:
    """Images of all samples after one defence with one draw of features.

    Attributes:
        at: images after each recorded step, the last one included.
        nonsense, benign: typographic samples with a nonsense word, and images without a trigger; first draw only.
    """

    defence: str
    draw: int
    paper_point: bool  # as many features as the smallest group has, at the learning rate of the paper's point
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
    """Strength of the defence: the same for every group of a dictionary.

    Attributes:
        matched: features of a group that every sample is aligned on.
        paper_lr: learning rate of the paper's operating point, with as many features as the smallest group has; None:
            that point is left out.
        first: also measures what only the first dictionary is asked: all features, nonsense words, curves.
    """

    steps: int
    lr: float
    matched: int
    seed: int
    paper_lr: float | None = None
    first: bool = True
    progress: bool = True

    def run(
        self, model: Any, samples: Samples, one: Dictionary, *, repeats: int, keep: Sequence[int],
        untouched: Sequence[int],
    ) -> Iterator[DefendedImages]:  # fmt: skip
        """Yields the defence by every group, random features and all features, on every sample.

        Args:
            repeats: draws of features; after them comes one run at the paper's operating point.
            keep: steps whose images are recorded, in the first draw.
            untouched: samples whose benign image is moved as well, in the first draw.
        """
        n = len(samples)
        for draw in range(repeats):
            chosen: dict[str, Any] = feature_masks(one.mds, self.matched, n, seed=self.seed, draw=draw)
            if draw == 0 and self.first:
                chosen["all"] = None  # there is only one such set
            for name, mask in chosen.items():
                yield self.run_once(
                    model,
                    samples,
                    one.site,
                    name,
                    mask,
                    draw=draw,
                    keep=keep if draw == 0 else (),
                    untouched=untouched,
                )
        if self.paper_lr is not None:
            weak = replace(self, lr=self.paper_lr)
            masks = feature_masks(one.mds, smallest_group_size(one.mds), n, seed=self.seed)
            for name, mask in masks.items():
                yield weak.run_once(model, samples, one.site, name, mask, paper_point=True)

    def run_once(
        self, model: Any, s: Samples, site: str, name: str, mask: Tensor | None, *, draw: int = 0,
        paper_point: bool = False, keep: Sequence[int] = (), untouched: Sequence[int] = (),
    ) -> DefendedImages:  # fmt: skip
        controls = self.first and draw == 0 and not paper_point
        typed, plain = (list(s.typed), list(untouched)) if controls else ([], [])
        n, m = len(s), len(typed)
        images = torch.cat([s.attack, s.controls["nonsense"][:m], s.base[plain]])
        owner = [*range(n), *typed, *plain]
        label = f"defence on {name}" + (
            f", draw {draw + 1}" if draw else ", paper's point" if paper_point else ""
        )
        made = align(
            model, images, s.partner[owner], None if mask is None else mask[owner], site=site, steps=self.steps,
            lr=self.lr, keep=keep, progress=self.progress, label=label,
        )  # fmt: skip
        at = {k: p[:n] for k, p in made.kept.items()} | {self.steps: made.images[:n]}
        return DefendedImages(
            name,
            draw,
            paper_point,
            at,
            made.images[n : n + m],
            made.images[n + m :],
            made.history[:, :n].mean(1).tolist(),
            psnr(made.images[:n], s.attack).tolist(),
            made.linf[:n].tolist(),
        )


def run_defences(
    defence: Defence,
    model: Any,
    samples: Samples,
    one: Dictionary,
    evaluations: Sequence[Any],
    untouched: Sequence[int] = (),
    *,
    repeats: int,
) -> tuple[list[dict[str, Any]], dict[str, DefendedImages]]:
    """Runs every defence on one dictionary and evaluates every victim after it.

    Returns:
        Loss, PSNR and L∞ of every defence and draw; and by defence the first draw, whose images the figures show
        and whose benign images the cost is measured on.
    """
    steps = defence.steps
    keep = sorted({max(1, steps // 4), max(1, steps // 2), steps}) if defence.first else ()
    numbers: list[dict[str, Any]] = []
    first: dict[str, DefendedImages] = {}
    for made in defence.run(model, samples, one, repeats=repeats, keep=keep, untouched=untouched):
        for evaluation in evaluations:
            evaluation.evaluate_defence(made)
        numbers.append(
            {
                "defence": made.defence,
                "draw": made.draw,
                "paper_point": made.paper_point,
                "loss": made.loss,
                "psnr": finite_mean(made.psnr),
                "linf": finite_mean(made.linf),
            }
        )
        if made.draw == 0 and not made.paper_point:
            first[made.defence] = made
    return numbers, first


def finite_mean(values: Sequence[float]) -> float | None:
    """Returns the mean of the finite values: an image that did not change has no PSNR."""
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else None
