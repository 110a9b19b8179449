"""Measures of one model of the modality study: MDS and groups, EmbedSim, WinRate, monosemanticity, top samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.measures.all_measures import Measures
from mmhooks.analysis.measures.mds import GROUPS, Kind, MDSResult
from mmhooks.analysis.measures.monosemanticity import textual_monosemanticity, visual_monosemanticity
from mmhooks.analysis.measures.samples import check_sizes
from mmhooks.analysis.results import correlation
from mmhooks.analysis.statistics.intervals import bootstrap, bootstrap_difference, bootstrap_spread
from mmhooks.analysis.statistics.jackknife import GROUPS as GROUPS_LEFT_OUT
from mmhooks.analysis.statistics.two_way import two_way
from mmhooks.report import Estimate
from mmhooks.studies.common.cards import TOP, FeatureExample, distinct_top_texts, top_rows
from mmhooks.studies.common.encode import SITES, Encoded


@dataclass(frozen=True)
class StudyModel:
    """One of the four models of the study: an encoded model, and the head on it, if any."""

    name: str
    encoded: Encoded
    head: Any = None  # None: the embedding's own coordinates

    def kind(self, activation: Literal["abs", "relu", "raw"]) -> Kind:
        """Which values count as activation: coordinates are signed, so ``activation`` says; latents are not."""
        if self.head is not None:
            return "relu"
        return "paper" if activation == "raw" else activation

    @torch.no_grad()
    def latents(self, side: str, rows: Any) -> Float[Tensor, "n k"]:
        """Returns the head's latents of the pairs in ``rows``; without a head, their embeddings."""
        x = self.encoded.vectors(side, rows)
        return x if self.head is None else self.head.encode(self.head.prepare(x))


# -- measures --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Definition:
    """How the paper's quantities are defined; :mod:`mmhooks.studies.modality.definitions` compares several.

    Attributes:
        activation: of raw CLIP's signed coordinates: their size, their positive part, or as they are.
        zeros: whether a top list leaves out samples with activation 0 or is filled up with them.
        min_samples: samples that must activate a feature; m for full lists only.
        families: the family of each pair; None: every pair counts.

    Raises:
        ShapeMismatch: ``m`` and ``min_samples`` leave no list of top samples.
    """

    m: int
    activation: Literal["abs", "relu", "raw"] = "abs"
    zeros: Literal["drop", "keep"] = "drop"
    min_samples: int = 2
    families: Int[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        check_sizes(self.m, self.min_samples, self.m)


def measured(s: StudyModel, embeddings: dict[str, Tensor], definition: Definition, seed: int) -> Measures:
    """Measures one model on all pairs under one definition."""
    return mm.measure(
        s.encoded.store, head=s.head, image=SITES[0], text=SITES[1], embeddings=embeddings,
        kind=s.kind(definition.activation), m=definition.m, zeros=definition.zeros,
        min_samples=definition.min_samples, families=definition.families, seed=seed, progress=False,
    )  # fmt: skip


def measure_model(
    s: StudyModel,
    embeddings: dict[str, Tensor],
    heldout: Sequence[int],
    definition: Definition,
    *,
    seed: int,
    draws: int,
) -> tuple[dict[str, Any], Measures]:
    """Measures one model: returns the numbers of Tables 1 and 2 and Figure 1 as JSON, and all its measures.

    Args:
        embeddings: by side, another model's embeddings of all pairs, which give the similarity of samples.
        heldout: rows of pairs that no training saw; scores of these are compared with scores of the others.
    """
    found = measured(s, embeddings, definition, seed)
    mds, sims = found.mds, found.embed_sim
    groups: dict[str, Any] = dict(zip(GROUPS, mds.groups, strict=True))
    numbers = table_numbers(found, seed, draws)
    summary = {
        "n_features": len(mds.R),
        "alive": int((~mds.dead).sum()),
        "dead": int(mds.dead.sum()),
        "rare": int(mds.rare.sum()),
        "kind": s.kind(definition.activation),
        "families": found.settings["families"],
        "head": "" if s.head is None else s.head.id,
        **numbers,
        "mds": numbers["mds"] | _scores(mds, _disjoint_scores(s, heldout, definition)),
        "embed_sim": numbers["embed_sim"]
        | {
            "excluded": {k: v.excluded for k, v in sims.items()},
            "compared": {k: v.pairs_compared for k, v in sims.items()},
            "s_minus": {k: finite(v.s_minus) for k, v in sims.items()},
            "difference": {k: mean_of(v.s_plus - v.s_minus, seed).to_json() for k, v in sims.items()},
            "paper": {k: mean_of(v.paper, seed).to_json() for k, v in sims.items()},
        },
        "groups": {
            g: {
                "size": len(members),
                "embed_sim": {k: mean_of(v.values[members.indices], seed).to_json() for k, v in sims.items()},
            }
            for g, members in groups.items()
        },
    }
    return summary, found


def table_numbers(found: Measures, seed: int, draws: int = 60) -> dict[str, Any]:
    """Returns the numbers of Tables 1 and 2 and Figure 1 as JSON, as the statements of the paper read them."""
    groups: dict[str, mm.FeatureSet] = dict(zip(GROUPS, found.mds.groups, strict=True))
    spread = bootstrap_spread(found.mds.R[found.mds.alive], seed=seed)
    return {
        "embed_sim": {k: v.estimate.to_json() for k, v in found.embed_sim.items()},
        "win_rate": {k: v.estimate.to_json() for k, v in found.win_rate.items()}
        | {"gap": _win_gap(found, seed).to_json()},
        "monosemanticity": _monosemanticity(found, groups, seed, draws),
        "mds": {
            "mu": found.mds.mu_estimate.to_json(),
            "sigma": over_families(spread, found, "MDS sigma").to_json(),
        },
    }


def _disjoint_scores(
    s: StudyModel, heldout: Sequence[int], definition: Definition
) -> tuple[MDSResult, MDSResult]:
    """Scores of the pairs that training may have seen, and of the held-out ones: two sets without a common pair."""
    apart = set(heldout)
    seen = [i for i in range(len(s.encoded.store)) if i not in apart]
    kind = s.kind(definition.activation)
    one, other = (
        mm.mds(s.encoded.store.rows(rows), head=s.head or "", image=SITES[0], text=SITES[1], kind=kind)
        for rows in (seen, list(heldout))
    )
    return one, other


def _scores(mds: MDSResult, disjoint: tuple[MDSResult, MDSResult]) -> dict[str, Any]:
    """Returns the scores of all features, and their correlation with two controls."""
    return {
        "scores": [None if math.isnan(x) else round(x, 6) for x in mds.R.tolist()],
        "ratio_of_means": finite(mds.ratio_of_means[~mds.dead].mean()),
        "shuffled_r": finite(mds.shuffled_r),
        "heldout_r": finite(correlation(disjoint[0].R, disjoint[1].R)),
    }


def over_families(e: Estimate, found: Measures, what: str) -> Estimate:
    """Widens an interval over features by what the estimate varies over families; unchanged without families."""
    error = found.family_errors.get(what)
    return e if error is None else two_way(e, error, groups=min(GROUPS_LEFT_OUT, found.settings["families"]))


def _win_gap(found: Measures, seed: int) -> Estimate:
    """WinRate on images minus on texts."""
    image, text = (found.win_rate[side].values for side in ("image", "text"))
    return over_families(bootstrap_difference(image, text, seed=seed), found, "WinRate gap")


def _monosemanticity(
    found: Measures, groups: Mapping[str, mm.FeatureSet], seed: int, draws: int
) -> dict[str, Any]:
    """Returns Table 2, with the same difference between random groups of the same sizes as control."""
    imgd, textd, out = groups["ImgD"], groups["TextD"], {}
    for side, name, contrast in (
        ("image", "visual", visual_monosemanticity),
        ("text", "textual", textual_monosemanticity),
    ):
        made = contrast(found.embed_sim[side], imgd, textd, draws=draws, seed=seed)
        out[side] = over_families(made.estimate, found, name).to_json()
        out[f"random_{side}"] = made.control.to_json()
    return out


def finite(x: Any) -> float | None:
    value = float(x)
    return value if math.isfinite(value) else None


def mean_of(values: Float[Tensor, " n"], seed: int) -> Estimate:
    """Returns the mean over features with a 95 % bootstrap interval; NaN features are excluded from n."""
    return bootstrap(values, seed=seed)


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
