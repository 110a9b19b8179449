"""The groups of features of the gender study, and the settings in which they are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmhooks as mm
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.studies.common.encode import Encoded, encode
from mmhooks.studies.gender.drawing_styles import is_corpus
from mmhooks.studies.gender.masking import Setting
from mmhooks.studies.gender.options import Options
from mmhooks.studies.gender.samples import from_drawings


def score_groups(
    heads: Mapping[str, Any],
    encoded: Encoded,
    known: Sequence[int],
    options: Options,
    cache: Path,
) -> dict[str, Any]:
    """Computes MDS and groups of every head, over pairs that are not judged (``known``).

    For a corpus of several styles the scores come from the embedded drawings instead: over all styles mu + sigma
    exceeds 1, so no feature would be ImgD.
    """
    if is_corpus(options.data):
        drawings = mm.data.pairs("mini")
        people = {s.row for s in from_drawings(drawings) if s.heldout}
        known = [row for row in range(len(drawings)) if row not in people]
        encoded = encode(
            encoded.model, options.model, drawings, cache, batch=options.batch, progress=not options.quiet
        )
    store = encoded.store.rows(list(known))
    return {kind: mm.mds(store, head=head) for kind, head in heads.items()}


def group_sizes(heads: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the number of features in each group of each head, and the head's id."""
    return {
        kind: {name: len(group) for name, group in zip(GROUPS, mds.groups, strict=True)}
        | {"head": heads[kind].id}
        for kind, mds in groups.items()
    }


def settings_of(heads: Mapping[str, Any], groups: Mapping[str, Any]) -> list[Setting]:
    """Returns the settings, the main one first: the SAE in its three spaces, and the NCL head, if any, in its own."""
    sae = [
        Setting(f"SAE, {space}", heads["sae"], space, groups["sae"])
        for space in ("decoded", "spliced", "latent")
    ]
    return sae + [
        Setting("NCL, latent", heads[kind], "latent", groups[kind]) for kind in heads if kind == "ncl"
    ]
