"""One model of the modality study measured: embeddings, MDS and groups, EmbedSim, WinRate, top samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from modality_page import Shown
from modality_tables import GROUPS
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.intervals import bootstrap, bootstrap_difference
from mmhooks.analysis.mds import MDSResult
from mmhooks.analysis.measures import Measures
from mmhooks.analysis.monosemanticity import textual_monosemanticity, visual_monosemanticity
from mmhooks.analysis.results import correlation
from mmhooks.analysis.similarity import EmbedSimResult
from mmhooks.analysis.top import TopActivating
from mmhooks.models.provenance import weights_hash
from mmhooks.report import Estimate
from mmhooks.utils.digest import digest

SIDES = ("image", "text")
SITES = ("image.embed", "text.embed")
TOP = 8  # samples of a feature that are shown


@dataclass(frozen=True)
class Encoded:
    """A model, and its embeddings of all pairs in a store, row by row.

    Attributes:
        store: with the sites ``image.embed`` and ``text.embed``.
    """

    model: Any = field(repr=False)
    name: str
    store: mm.Store

    def vectors(self, side: str, rows: Any = slice(None)) -> Float[Tensor, "n d"]:
        """The embeddings of one side, "image" or "text", of all pairs or of those in ``rows``."""
        return self.store[f"{side}.embed"][rows]  # type: ignore[return-value]


@dataclass(frozen=True)
class Subject:
    """One of the four models of the study: an encoded model, and the head on it, if any."""

    name: str
    encoded: Encoded
    head: Any = None  # None: the embedding's own coordinates

    @property
    def kind(self) -> Literal["abs", "relu"]:
        """What counts as activation: coordinates have a sign, latents have none."""
        return "abs" if self.head is None else "relu"

    @torch.no_grad()
    def latents(self, side: str, rows: Any) -> Float[Tensor, "n k"]:
        """The head's latents of the pairs in ``rows``, or the embeddings themselves."""
        x = self.encoded.vectors(side, rows)
        return x if self.head is None else self.head.encode(self.head.prepare(x))


def encode(model: Any, name: str, pairs: Any, cache: Path, *, batch: int, progress: bool) -> Encoded:
    """Runs the hooked model once over all pairs, into a store under ``cache``; a second run opens it.

    The store's folder is named by what decides its rows, so embeddings of other weights, transforms or pairs are
    never read in their place. A run that was broken off goes on where it stopped.
    """
    made_by = digest(model.preprocess, model.tokenizer, what=f"transforms of {name}")[:16]
    folder = cache / f"{weights_hash(model.model)}-{made_by}-{pairs.fingerprint}-{batch}"
    store = mm.extract(model, pairs, SITES, folder, batch_size=batch, progress=progress)
    return Encoded(model, name, store)


def batches(n: int, size: int) -> Iterable[range]:
    return (range(start, min(start + size, n)) for start in range(0, n, size))


def unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(x, dim=-1)


def train_heads(
    encoded: Encoded, rows: Sequence[int], *, n: int, epochs: int, seed: int, cache: Path
) -> dict[str, Any]:
    """An SAE and an NCL head for a model that comes without; kept for the next run."""
    image, text = (unit(encoded.vectors(side, list(rows))) for side in SIDES)
    d = image.shape[1]
    heads = {"sae": mm.TopKSAE(d, n, min(32, n // 4)), "ncl": mm.NCL(d, n)}
    made_by = digest(d, n, epochs, seed, image, text)[:20]
    return {
        kind: kept_head(cache / f"{kind}-{made_by}", head, image, text, epochs=epochs, seed=seed)
        for kind, head in heads.items()
    }


def kept_head(folder: Path, head: Any, image: Tensor, text: Tensor, *, epochs: int, seed: int) -> Any:
    """The head that ``folder`` holds; where it holds none, ``head`` is trained and saved there."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        mm.train_head(head, image, text, epochs=epochs, seed=seed)
        head.save(folder)
    return mm.load_head(str(folder))


def load_heads(
    encoded: Encoded,
    rows: Sequence[int],
    sources: Mapping[str, str],
    *,
    n: int,
    epochs: int,
    seed: int,
    cache: Path,
) -> dict[str, Any]:
    """The heads by kind, "sae" and "ncl", from where they are; those without a source are trained here.

    Args:
        rows: pairs that a head may be trained on.
        sources: by kind a name, directory or Hub id; empty: train it.
    """
    trained: dict[str, Any] = {}
    if not all(sources.values()):
        trained = train_heads(encoded, rows, n=n, epochs=epochs, seed=seed, cache=cache)
    return {kind: mm.load_head(source) if source else trained[kind] for kind, source in sources.items()}


# -- measures --------------------------------------------------------------------------------------------------


def measure_subject(
    s: Subject,
    judges: dict[str, Tensor],
    heldout: Sequence[int],
    *,
    top_m: int,
    seed: int,
    draws: int,
) -> tuple[dict[str, Any], Measures]:
    """Everything of Tables 1 and 2 and Figure 1 for one model, as JSON, and all measures of it.

    Args:
        judges: by side, another model's embeddings of all pairs: how alike they are.
        heldout: rows of pairs that no training saw, on which the scores are repeated.
    """
    store = s.encoded.store
    found = mm.measure(
        store, head=s.head, image=SITES[0], text=SITES[1], embeddings=judges, kind=s.kind, m=top_m, seed=seed,
        progress=False,
    )  # fmt: skip
    again = mm.mds(store.rows(list(heldout)), head=s.head or "", image=SITES[0], text=SITES[1], kind=s.kind)
    mds, sims, wins = found.mds, found.embed_sim, found.win_rate
    groups: dict[str, Any] = dict(zip(GROUPS, mds.groups, strict=True))
    told = {
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
        | {"gap": gap(wins["image"].values, wins["text"].values, seed).to_json()},
        "monosemanticity": _monosemanticity(sims, groups, seed, draws),
        "groups": {
            g: {
                "size": len(members),
                "embed_sim": {k: mean_of(v.values[members.indices], seed).to_json() for k, v in sims.items()},
            }
            for g, members in groups.items()
        },
    }
    return told, found


def _scores(mds: MDSResult, again: MDSResult, seed: int) -> dict[str, Any]:
    """The scores of all features, mean and spread of the alive ones, and how far two controls agree with them."""
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
    """Table 2, with the same difference between random groups of the same sizes."""
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
    """Mean over features with a 95 % bootstrap interval; NaN features are left out of n."""
    return bootstrap(values, seed=seed)


def gap(one: Float[Tensor, " a"], other: Float[Tensor, " b"], seed: int) -> Estimate:
    """Mean of one minus mean of the other, both resampled; n counts both."""
    return bootstrap_difference(one, other, seed=seed)


# -- features to show ------------------------------------------------------------------------------------------


def show(s: Subject, found: Measures, pairs: Any, *, each: int, seed: int, top: int = TOP) -> list[Shown]:
    """``each`` features a group, drawn at random among those active on at least ``top`` samples of the group's side."""
    mds, out = found.mds, []
    for group, members in zip(GROUPS, mds.groups, strict=True):
        sides = {"ImgD": [mds.image_counts], "TextD": [mds.text_counts]}.get(
            group, [mds.image_counts, mds.text_counts]
        )
        able = [k for k in members if all(int(c[k]) >= top for c in sides)] or list(members)
        order = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed)).tolist()
        for k in (able[i] for i in order[:each]):
            pictures = [(pairs[i].image, pairs[i].text) for i in samples(found.top["image"], k, top)]
            texts = [(pairs.texts[i], v) for i, v in distinct(found.top["text"], k, pairs.texts, top)]
            counts = int(mds.image_counts[k]), int(mds.text_counts[k])
            out.append(Shown(s.name, k, group, float(mds.R[k]), *counts, pictures, texts))
    return out


def samples(best: TopActivating, feature: int, top: int = TOP) -> list[int]:
    """Rows of the samples that activate a feature most, at most ``top``."""
    return best.indices[feature, : min(int(best.count[feature]), top)].tolist()


def distinct(
    best: TopActivating, feature: int, texts: Sequence[str], top: int = TOP
) -> list[tuple[int, float]]:
    """Top texts without repeats of the same words."""
    seen: dict[str, tuple[int, float]] = {}
    for i, value in zip(samples(best, feature, top), best.values[feature].tolist(), strict=False):
        seen.setdefault(texts[i], (i, value))
    return list(seen.values())
