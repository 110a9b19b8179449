"""Which of the paper's groups are cross-modal by the pairing: co-firing on pairs, and causal MDS, beside the score itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.measures.mds import GROUPS, MDSResult
from mmhooks.analysis.measures.samples import one_per_family
from mmhooks.analysis.results import correlation
from mmhooks.report import Cell, Table, fixed, percent
from mmhooks.studies.common.encode import SIDES, SITES
from mmhooks.studies.common.held_out import sample_rows
from mmhooks.studies.modality.measures import StudyModel, finite
from mmhooks.utils.indexing import number_labels

CAUSAL_PAIRS = 2000  # pairs of different families among which causal MDS retrieves


def pairing_effects(
    s: StudyModel, scores: MDSResult, families: Int[Tensor, " n"], texts: list[str], *, most: int, seed: int
) -> dict[str, Any]:
    """Tests co-firing and causal MDS of every feature of one model, on one pair of each family, and counts by group.

    Args:
        most: at most this many pairs for causal MDS, whose cost grows with their square.
    """
    rows = one_per_family(families, len(families), seed)
    chosen = torch.tensor(sample_rows(rows.tolist(), most, seed))
    same = number_labels(texts[i] for i in chosen.tolist())
    scale = float(s.encoded.model.logit_scale.detach().exp())
    image, text = (s.encoded.vectors(side, chosen) for side in SIDES)
    causal = mm.causal_mds(image, text, s.head, logit_scale=scale, same=same, seed=seed)
    store = s.encoded.store
    if s.head is None:  # signed coordinates fire where they are not 0, which is always
        sides = (s.latents(side, rows).abs() for side in SIDES)
        together = mm.pairing(*sides)
    else:
        together = mm.pairing(store, head=s.head, image=SITES[0], text=SITES[1], families=families, seed=seed)
    image_used, text_used = causal.used()
    kinds = {
        "paired": together.paired(), "both": causal.cross_modal(), "image": image_used & ~text_used,
        "text": text_used & ~image_used,
    }  # fmt: skip
    return {
        "pairs": together.n_pairs,
        "causal_pairs": causal.n_pairs,
        "logit_scale": scale,
        "tested": int((~together.p.isnan()).sum()),
        "causal_r": finite(correlation(scores.R, causal.score)),
        "lift": [finite(x) for x in together.lift.tolist()],
        "causal": [finite(x) for x in causal.score.tolist()],
        "is_paired": together.paired().tolist(),
        "is_causal": causal.cross_modal().tolist(),
        "groups": {
            group: {name: int((mask & members.mask).sum()) for name, mask in kinds.items()}
            | {"size": len(members), "median_lift": _median(together.lift[members.mask])}
            for group, members in zip(GROUPS, scores.groups, strict=True)
        },
    }


def _median(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.median()) if len(known) else None


def cross_modal_table(results: Mapping[str, Any], models: list[str]) -> Table:
    rows: list[list[str | Cell]] = []
    for m in models:
        r = results["models"][m]["cross_modal"]
        for group in GROUPS:
            g = r["groups"][group]
            lift = "—" if g["median_lift"] is None else fixed(g["median_lift"], 2)
            counts = [_share(g[kind], g["size"]) for kind in ("paired", "both", "image", "text")]
            rows.append([m, group, f"{g['size']:,}", lift, *counts])
    first = results["models"][models[0]]["cross_modal"]
    causes = "; ".join(
        f"{m} {'—' if (r := results['models'][m]['cross_modal']['causal_r']) is None else fixed(r, 2)}"
        for m in models
    )
    return Table(
        ["Model", "Group", "features", "median lift", "paired", "used in both", "images only", "texts only"],
        rows,
        "Which features are cross-modal by the pairing",
        "Paired: the feature fires for image and text of one pair more often than with shuffled texts (Fisher's exact test, "
        f"one pair of each of {first['pairs']:,} families; features that always fire, by the correlation of their "
        "activations), q < .05 over all features. Lift: by what factor. Used: masking this one feature in the "
        f"images (texts) raises the cross-entropy of finding the right text (image) among {first['causal_pairs']:,}, by the "
        "closed form for every feature, sign-flip tests over families, q < .05 over both sides of all features. "
        f"Correlation of MDS with its causal counterpart: {causes}.",
        text_columns=(0, 1),
    )  # fmt: skip


def _share(hits: int, n: int) -> str:
    return f"{hits:,} ({percent(hits / n, 0)} %)" if n else "0"
