"""One model of the modality study measured: embeddings, MDS and groups, EmbedSim, WinRate, top samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from modality_page import Shown
from modality_tables import GROUPS
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.intervals import bootstrap, bootstrap_difference, from_draws
from mmhooks.analysis.results import correlation
from mmhooks.report import Estimate
from mmhooks.utils.files import written_aside

Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Encoded:
    """A model's raw embeddings of all pairs, row by row."""

    model: Any = field(repr=False)
    name: str = ""
    image: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    text: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(frozen=True)
class Subject:
    """One of the four models of the study: an encoded model, and the head on it, if any."""

    name: str
    encoded: Encoded
    head: Any = None  # None: the embedding's own coordinates
    image: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)  # latents
    text: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    @property
    def kind(self) -> str:
        return "abs" if self.head is None else "relu"


def encode(model: Any, name: str, pairs: Any, cache: Path, *, batch: int, progress: Progress) -> Encoded:
    """Raw ``image.embed`` and ``text.embed`` of all pairs, through the hooked model, once: a second run reads them."""
    path = cache / f"{weights_hash(model)}-{pairs.fingerprint}-{len(pairs)}.safetensors"
    if path.exists():
        stored = load_file(path)
        return Encoded(model, name, stored["image"], stored["text"])
    images, texts = [], []
    step = progress(f"encoding with {name}", len(pairs))
    for rows in batches(len(pairs), batch):
        chosen = [pairs[i] for i in rows]
        pixels = torch.stack([model.preprocess(p.image) for p in chosen])
        tokens = model.tokenizer([p.text for p in chosen])
        with torch.no_grad():
            _, acts = model.run_with_cache(images=pixels, texts=tokens, sites=["image.embed", "text.embed"])
        images.append(acts["image.embed"].float().cpu())
        texts.append(acts["text.embed"].float().cpu())
        step(len(rows))
    found = Encoded(model, name, torch.cat(images), torch.cat(texts))
    cache.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        save_file({"image": found.image, "text": found.text}, aside)
    return found


def weights_hash(model: Any) -> str:
    """A short hash of the weights and the preprocessing: embeddings of other weights are never reused."""
    digest = blake2b(digest_size=10)
    for key, tensor in sorted(model.model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    digest.update(repr(getattr(model.preprocess, "transforms", model.preprocess.__class__)).encode())
    return digest.hexdigest()


def batches(n: int, size: int) -> Iterable[range]:
    return (range(start, min(start + size, n)) for start in range(0, n, size))


def unit(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(x, dim=-1)


@torch.no_grad()
def subject(name: str, encoded: Encoded, head: Any = None) -> Subject:
    """The latents of a head over stored embeddings (the encoder never runs twice), or the embeddings themselves."""
    if head is None:
        return Subject(name, encoded, None, encoded.image, encoded.text)
    image, text = (head.encode(head.prepare(x)) for x in (encoded.image, encoded.text))
    return Subject(name, encoded, head, image, text)


def train_heads(
    encoded: Encoded, rows: Sequence[int], *, n: int, epochs: int, seed: int, cache: Path
) -> list[Any]:
    """An SAE and an NCL head for a model that comes without; kept for the next run."""
    image, text = unit(encoded.image[rows]), unit(encoded.text[rows])
    d = image.shape[1]
    sae, ncl = mm.TopKSAE(d, n, min(32, n // 4)), mm.NCL(d, n)
    heads = []
    for kind, head in (("sae", sae), ("ncl", ncl)):
        key = blake2b(
            json.dumps([kind, d, n, epochs, seed]).encode()
            + image.numpy().tobytes()
            + text.numpy().tobytes(),
            digest_size=10,
        ).hexdigest()
        folder = cache / f"{kind}-{key}"
        if not (folder / "config.json").exists():
            torch.manual_seed(seed)
            mm.train_head(head, image, text, epochs=epochs, seed=seed)
            head.save(folder)
        heads.append(mm.load_head(str(folder)))
    return heads


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
        sources: by kind a name, directory or Hub id; empty: train it; "none": leave it out.
    """
    trained: dict[str, Any] = {}
    if not all(sources.values()):
        made = train_heads(encoded, rows, n=n, epochs=epochs, seed=seed, cache=cache)
        trained = dict(zip(("sae", "ncl"), made, strict=True))
    return {
        kind: mm.load_head(source) if source else trained[kind]
        for kind, source in sources.items()
        if source != "none"
    }


# -- measures --------------------------------------------------------------------------------------------------


def measure(
    s: Subject,
    embeddings: dict[str, Tensor],
    heldout: Sequence[int],
    *,
    data: str,
    top_m: int,
    seed: int,
    draws: int,
) -> tuple[dict[str, Any], Any]:
    """Everything of Tables 1 and 2 and Figure 1 for one model, as JSON, and the MDS result with its groups."""
    head = "" if s.head is None else s.head.id
    mds = mm.mds(s.image, s.text, kind=s.kind, head=head, data=data)
    latents = {"image": s.image, "text": s.text}
    if s.head is None:
        latents = {k: v.abs() for k, v in latents.items()}
    sims = {k: mm.embed_sim(latents[k], embeddings[k], m=top_m, seed=seed) for k in latents}
    wins = {k: mm.win_rate(latents[k], embeddings[k], m=top_m, seed=seed) for k in latents}
    groups: dict[str, Any] = dict(zip(GROUPS, mds.groups, strict=True))
    alive = torch.nonzero(~mds.dead).flatten()
    scores = mds.R
    heldout_mds = mm.mds(s.image[list(heldout)], s.text[list(heldout)], kind=s.kind, head=head, data=data)
    spread = float(scores[alive].std(unbiased=False))
    found = {
        "n_features": len(scores),
        "alive": len(alive),
        "dead": int(mds.dead.sum()),
        "rare": int(mds.rare.sum()),
        "kind": s.kind,
        "head": head,
        "mds": {
            "mu": mean_of(scores[alive], seed).to_json(),
            "sigma": Estimate(
                spread,
                spread * (1 - 1.96 / math.sqrt(2 * max(len(alive) - 1, 1))),
                spread * (1 + 1.96 / math.sqrt(2 * max(len(alive) - 1, 1))),
                len(alive),
            ).to_json(),
            "scores": [None if math.isnan(x) else round(x, 6) for x in scores.tolist()],
            "ratio_of_means": finite(mds.ratio_of_means[alive].mean()),
            "shuffled_r": finite(mds.shuffled_r),
            "heldout_r": finite(correlation(scores, heldout_mds.R)),
        },
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
        "monosemanticity": monosemanticity(sims, groups, alive, seed, draws),
        "groups": {
            g: {
                "size": len(members),
                "embed_sim": {k: mean_of(v.values[members.indices], seed).to_json() for k, v in sims.items()},
            }
            for g, members in groups.items()
        },
    }
    return found, mds


def monosemanticity(
    sims: dict[str, Any], groups: dict[str, Any], alive: Int[Tensor, " a"], seed: int, draws: int
) -> dict[str, Any]:
    """Table 2, with the same difference between random groups of the same sizes."""
    out: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed)
    a, b = len(groups["ImgD"]), len(groups["TextD"])
    for modality, (own, foreign), sign in (
        ("image", ("ImgD", "TextD"), 1.0),
        ("text", ("TextD", "ImgD"), -1.0),
    ):
        values = sims[modality].values
        out[modality] = gap(values[groups[own].indices], values[groups[foreign].indices], seed).to_json()
        control = []
        for _ in range(draws):
            order = alive[torch.randperm(len(alive), generator=generator)]
            control.append(sign * float(values[order[:a]].nanmean() - values[order[a : a + b]].nanmean()))
        out[f"random_{modality}"] = range_of(control).to_json()
    return out


def finite(x: Any) -> float | None:
    value = float(x)
    return value if math.isfinite(value) else None


def mean_of(values: Float[Tensor, " n"], seed: int) -> Estimate:
    """Mean over features with a 95 % bootstrap interval; NaN features are left out of n."""
    return Estimate.of(bootstrap(values, seed=seed))


def gap(one: Float[Tensor, " a"], other: Float[Tensor, " b"], seed: int) -> Estimate:
    """Mean of one minus mean of the other, both resampled; n counts both."""
    return Estimate.of(bootstrap_difference(one, other, seed=seed))


def range_of(values: Sequence[float]) -> Estimate:
    """Mean and 95 % range of repeated draws."""
    known = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
    if not len(known):
        return Estimate(math.nan, n=0)
    return Estimate.of(from_draws(float(known.mean()), known, len(known)))


# -- features to show ------------------------------------------------------------------------------------------


def show(s: Subject, mds: Any, pairs: Any, *, each: int, seed: int, top: int = 8) -> list[Shown]:
    """``each`` features a group, drawn at random among those active on at least ``top`` samples of the group's side."""
    image, text = (s.image, s.text) if s.head is not None else (s.image.abs(), s.text.abs())
    best_image, best_text = mm.top_activating(image, m=top), mm.top_activating(text, m=top)
    out = []
    for group, members in zip(GROUPS, mds.groups, strict=True):
        sides = {"ImgD": [mds.image_counts], "TextD": [mds.text_counts]}.get(
            group, [mds.image_counts, mds.text_counts]
        )
        able = [k for k in members if all(int(c[k]) >= top for c in sides)] or list(members)
        order = torch.randperm(len(able), generator=torch.Generator().manual_seed(seed)).tolist()
        for k in (able[i] for i in order[:each]):
            pictures = [(pairs[i].image, pairs[i].text) for i in samples(best_image, k)]
            texts = [(pairs.texts[i], v) for i, v in distinct(best_text, k, pairs.texts)]
            out.append(
                Shown(
                    s.name,
                    k,
                    group,
                    float(mds.R[k]),
                    int(mds.image_counts[k]),
                    int(mds.text_counts[k]),
                    pictures,
                    texts,
                )
            )
    return out


def samples(best: Any, feature: int) -> list[int]:
    return best.indices[feature, : int(best.count[feature])].tolist()


def distinct(best: Any, feature: int, texts: Sequence[str]) -> list[tuple[int, float]]:
    """Top texts without repeats of the same words."""
    seen: dict[str, tuple[int, float]] = {}
    for i, value in zip(samples(best, feature), best.values[feature].tolist(), strict=False):
        seen.setdefault(texts[i], (i, value))
    return list(seen.values())
