"""Measures of one model of the modality study: MDS and groups, EmbedSim, WinRate, monosemanticity, top samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.measures.all_measures import Measures
from mmhooks.analysis.measures.embed_sim import EmbedSimResult
from mmhooks.analysis.measures.mds import GROUPS, MDSResult
from mmhooks.analysis.measures.monosemanticity import textual_monosemanticity, visual_monosemanticity
from mmhooks.analysis.results import correlation
from mmhooks.analysis.statistics.intervals import bootstrap, bootstrap_difference
from mmhooks.report import Estimate
from mmhooks.studies.common.cards import TOP, FeatureExample, distinct_top_texts, top_rows
from mmhooks.studies.common.encode import SITES, Encoded


@dataclass(frozen=True)
class StudyModel:
    """One of the four models of the study: an encoded model, and the head on it, if any."""

    name: str
    encoded: Encoded
    head: Any = None  # None: the embedding's own coordinates

    @property
    def kind(self) -> Literal["abs", "relu"]:
        """Which values count as activation: coordinates are signed, latents are not."""
        return "abs" if self.head is None else "relu"

    @torch.no_grad()
    def latents(self, side: str, rows: Any) -> Float[Tensor, "n k"]:
        """Returns the head's latents of the pairs in ``rows``; without a head, their embeddings."""
        x = self.encoded.vectors(side, rows)
        return x if self.head is None else self.head.encode(self.head.prepare(x))


# -- measures --------------------------------------------------------------------------------------------------


def measure_model(
    s: StudyModel,
    embeddings: dict[str, Tensor],
    heldout: Sequence[int],
    *,
    top_m: int,
    seed: int,
    draws: int,
) -> tuple[dict[str, Any], Measures]:
    """Measures one model: returns the numbers of Tables 1 and 2 and Figure 1 as JSON, and all its measures.

    Args:
        embeddings: by side, another model's embeddings of all pairs, which give the similarity of samples.
        heldout: rows of pairs that no training saw, on which the scores are computed again.
    """
    store = s.encoded.store
    found = mm.measure(
        store, head=s.head, image=SITES[0], text=SITES[1], embeddings=embeddings, kind=s.kind, m=top_m, seed=seed,
        progress=False,
    )  # fmt: skip
    again = mm.mds(store.rows(list(heldout)), head=s.head or "", image=SITES[0], text=SITES[1], kind=s.kind)
    mds, sims, wins = found.mds, found.embed_sim, found.win_rate
    groups: dict[str, Any] = dict(zip(GROUPS, mds.groups, strict=True))
    summary = {
        "n_features": len(mds.R),
        "alive": int((~mds.dead).sum()),
        "dead": int(mds.dead.sum()),
        "rare": int(mds.rare.sum()),
        "kind": s.kind,
        "head": "" if s.head is None else s.head.id,
        "mds": _scores(mds, again, seed),
        "embed_sim": {k: mean_of(v.values, seed).to_json() for k, v in sims.items()}
        | {
            "excluded": {k: v.excluded for k, v in sims.items()},
            "compared": {k: v.pairs_compared for k, v in sims.items()},
            "s_minus": {k: finite(v.s_minus) for k, v in sims.items()},
            "difference": {k: mean_of(v.s_plus - v.s_minus, seed).to_json() for k, v in sims.items()},
            "paper": {k: mean_of(v.paper, seed).to_json() for k, v in sims.items()},
        },
        "win_rate": {k: mean_of(v.values, seed).to_json() for k, v in wins.items()}
        | {"gap": mean_difference(wins["image"].values, wins["text"].values, seed).to_json()},
        "monosemanticity": _monosemanticity(sims, groups, seed, draws),
        "groups": {
            g: {
                "size": len(members),
                "embed_sim": {k: mean_of(v.values[members.indices], seed).to_json() for k, v in sims.items()},
            }
            for g, members in groups.items()
        },
    }
    return summary, found


def _scores(mds: MDSResult, again: MDSResult, seed: int) -> dict[str, Any]:
    """Returns the scores of all features, mean and spread of the alive ones, and their correlation with two controls."""
    alive = mds.R[~mds.dead]
    spread = float(alive.std(unbiased=False))
    error = 1.96 / math.sqrt(2 * max(len(alive) - 1, 1))
    return {
        "mu": mean_of(alive, seed).to_json(),
        "sigma": Estimate(spread, spread * (1 - error), spread * (1 + error), len(alive)).to_json(),
        "scores": [None if math.isnan(x) else round(x, 6) for x in mds.R.tolist()],
        "ratio_of_means": finite(mds.ratio_of_means[~mds.dead].mean()),
        "shuffled_r": finite(mds.shuffled_r),
        "heldout_r": finite(correlation(mds.R, again.R)),
    }


def _monosemanticity(
    sims: dict[str, EmbedSimResult], groups: Mapping[str, mm.FeatureSet], seed: int, draws: int
) -> dict[str, Any]:
    """Returns Table 2, with the same difference between random groups of the same sizes as control."""
    imgd, textd, out = groups["ImgD"], groups["TextD"], {}
    for side, contrast in (("image", visual_monosemanticity), ("text", textual_monosemanticity)):
        found = contrast(sims[side], imgd, textd, draws=draws, seed=seed)
        out[side] = found.estimate.to_json()
        out[f"random_{side}"] = found.control.to_json()
    return out


def finite(x: Any) -> float | None:
    value = float(x)
    return value if math.isfinite(value) else None


def mean_of(values: Float[Tensor, " n"], seed: int) -> Estimate:
    """Returns the mean over features with a 95 % bootstrap interval; NaN features are excluded from n."""
    return bootstrap(values, seed=seed)


def mean_difference(one: Float[Tensor, " a"], other: Float[Tensor, " b"], seed: int) -> Estimate:
    """Returns the mean of ``one`` minus the mean of ``other``, both resampled; n counts both."""
    return bootstrap_difference(one, other, seed=seed)


# -- features to show ------------------------------------------------------------------------------------------


def choose_examples(
    s: StudyModel, found: Measures, pairs: Any, *, each: int, seed: int, top: int = TOP
) -> list[FeatureExample]:
    """Draws ``each`` features per group at random, among those active on at least ``top`` samples of the group's side."""
    mds, out = found.mds, []
    for group, members in zip(GROUPS, mds.groups, strict=True):
        sides = {"ImgD": [mds.image_counts], "TextD": [mds.text_counts]}.get(
            group, [mds.image_counts, mds.text_counts]
        )
        able = [k for k in members if all(int(c[k]) >= top for c in sides)] or list(members)
        order = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed)).tolist()
        for k in (able[i] for i in order[:each]):
            images = [(pairs[i].image, pairs[i].text) for i in top_rows(found.top["image"], k, top)]
            texts = [
                (pairs.texts[i], v) for i, v in distinct_top_texts(found.top["text"], k, pairs.texts, top)
            ]
            counts = int(mds.image_counts[k]), int(mds.text_counts[k])
            out.append(FeatureExample(s.name, k, group, float(mds.R[k]), *counts, images, texts))
    return out
