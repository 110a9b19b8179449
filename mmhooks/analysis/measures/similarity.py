"""EmbedSim and WinRate of both sides with their contrasts between groups, and what they vary by over families of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.analysis.measures.embed_sim import EmbedSimResult, embed_sim_of, top_similarity
from mmhooks.analysis.measures.mds import MDSResult
from mmhooks.analysis.measures.monosemanticity import (
    GroupContrast,
    textual_monosemanticity,
    visual_monosemanticity,
)
from mmhooks.analysis.measures.samples import Samples, mean_cosine, random_samples
from mmhooks.analysis.measures.top_activating import TopActivating
from mmhooks.analysis.measures.win_rate import WinRateResult, win_rate_of
from mmhooks.analysis.statistics.hypothesis_tests import PermutationTest, permutation_test
from mmhooks.analysis.statistics.jackknife import jackknife_error
from mmhooks.analysis.statistics.two_way import two_way

# Random samples of WinRate while groups are left out: their 130,816 pairs are sorted once per group and side.
FEW = 512
# Times m: top samples kept, so that lists stay full when a twentieth of the families is left out.
CANDIDATES = 2


@dataclass(frozen=True)
class SimilarityMeasures:
    """EmbedSim and WinRate by side; contrasts and permutation tests by name, "visual" and "textual".

    ``family_errors``: standard errors over families of the means and contrasts, by name; empty without families.
    """

    embed_sim: dict[str, EmbedSimResult]
    win_rate: dict[str, WinRateResult]
    contrasts: dict[str, GroupContrast]
    permutations: dict[str, PermutationTest]
    family_errors: dict[str, float] = field(default_factory=dict)


def similarity(
    samples: Mapping[str, Samples], scores: MDSResult, *, min_samples: int, seed: int
) -> SimilarityMeasures:
    """Computes EmbedSim and WinRate of every feature, and both contrasts of the groups of ``scores``."""
    sim = {str(side): embed_sim_of(s, min_samples=min_samples, seed=seed) for side, s in samples.items()}
    wins = {str(side): win_rate_of(s, min_samples=min_samples, seed=seed) for side, s in samples.items()}
    imgd, textd, _ = scores.groups
    contrasts, permutations = {}, {}
    if "image" in sim:
        contrasts["visual"] = visual_monosemanticity(sim["image"], imgd, textd, seed=seed)
        permutations["visual"] = permutation_test(sim["image"].values, imgd, textd, seed=seed)
    if "text" in sim:
        contrasts["textual"] = textual_monosemanticity(sim["text"], imgd, textd, seed=seed)
        permutations["textual"] = permutation_test(sim["text"].values, textd, imgd, seed=seed)
    return SimilarityMeasures(sim, wins, contrasts, permutations)


def similarity_of_families(
    samples: Mapping[str, Samples],
    scores: MDSResult,
    groups: Int[Tensor, " n"],
    left_out: Sequence[MDSResult],
    *,
    m: int,
    min_samples: int,
    seed: int,
) -> SimilarityMeasures:
    """Computes :func:`similarity` of the first ``m`` samples, with intervals over features and families.

    Args:
        samples: by side, with ``CANDIDATES * m`` top samples per feature, one per family.
        groups: of families, one number per sample. left_out: MDS with each group left out, in order; the contrasts are
            between its ImgD and TextD, so that the groups vary too.
    """
    everything = torch.ones(len(groups), dtype=torch.bool)
    chosen = {side: samples_without(s, everything, m, seed=seed) for side, s in samples.items()}
    found = similarity(chosen, scores, min_samples=min_samples, seed=seed)
    errors = _family_errors(samples, groups, left_out, m=m, min_samples=min_samples, seed=seed)
    k = len(left_out)
    return replace(
        found,
        embed_sim={side: _widened(r, errors[f"EmbedSim {side}"], k) for side, r in found.embed_sim.items()},
        win_rate={side: _widened(r, errors[f"WinRate {side}"], k) for side, r in found.win_rate.items()},
        contrasts={name: _widened(c, errors[name], k) for name, c in found.contrasts.items()},
        family_errors=errors,
    )


def samples_without(samples: Samples, keep: Bool[Tensor, " all"], m: int, *, seed: int = 0) -> Samples:
    """Takes the first ``m`` top samples of each feature, and the random ones, among the samples in ``keep``.

    Equal to collecting the samples from the kept ones alone wherever at least ``m`` candidates are left, or all
    samples that activate the feature were candidates.
    """
    usable = keep[samples.numbers]
    top = samples.top
    there = (top.indices >= 0) & usable[top.indices.clamp_min(0)]
    order = (~there).long().argsort(dim=1, stable=True)[:, :m]
    count = there.sum(1).clamp_max(m)
    listed = torch.arange(order.shape[1]) < count[:, None]
    indices = torch.where(listed, top.indices.gather(1, order), -1)
    values = torch.where(listed, top.values.gather(1, order), 0)
    pool = samples.pool[usable[samples.pool]]
    return Samples(
        samples.unit,
        samples.numbers,
        TopActivating(indices, values, count, int(keep.sum())),
        pool,
        mean_cosine(samples.unit[pool]),
        len(pool),
        lambda features: pool[random_samples(len(pool), m, features, seed)],
    )


def _family_errors(
    samples: Mapping[str, Samples],
    groups: Int[Tensor, " n"],
    left_out: Sequence[MDSResult],
    *,
    m: int,
    min_samples: int,
    seed: int,
) -> dict[str, float]:
    rows: list[dict[str, float]] = []
    for group, scores in enumerate(left_out):
        imgd, textd, _ = scores.groups
        row: dict[str, float] = {}
        for side, of_side in samples.items():
            rest = samples_without(of_side, groups != group, m, seed=seed)
            sim = (top_similarity(rest, min_samples) - rest.s_minus).double() / abs(rest.s_minus)
            row[f"EmbedSim {side}"] = float(sim.nanmean())
            few = replace(rest, pool=rest.pool[:FEW])
            row[f"WinRate {side}"] = win_rate_of(few, min_samples=min_samples, seed=seed).estimate.value
            gap = float(sim[imgd.mask].nanmean() - sim[textd.mask].nanmean())
            row["visual" if side == "image" else "textual"] = gap if side == "image" else -gap
        if len(samples) == 2:
            row["WinRate gap"] = row["WinRate image"] - row["WinRate text"]
        rows.append(row)
    table = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    return dict(zip(rows[0], jackknife_error(table).tolist(), strict=True))


R = TypeVar("R", EmbedSimResult, WinRateResult, GroupContrast)


def _widened(result: R, error: float, groups: int) -> R:
    return replace(result, estimate=two_way(result.estimate, error, groups=groups))
