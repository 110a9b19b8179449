"""Masking experiment: image→text retrieval with a group of features set to zero in the live model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.report import Estimate
from mmhooks.studies.common.encode import batches, unit
from mmhooks.studies.common.placement import on_device_of
from mmhooks.studies.modality.measures import StudyModel
from mmhooks.utils.indexing import number_labels

KS = (1, 5, 10)
BothSides = tuple[Tensor, Tensor]


class LiveTowers:
    """Runs both towers of one model over the evaluation pairs, under any open context.

    With a head that has a decoder the edit is spliced back into the embeddings; a head without one (NCL) is read,
    masked and scored in its own latent space; without a head the embedding's own coordinates are masked.
    """

    def __init__(self, s: StudyModel, inputs: BothSides, *, batch: int = 256) -> None:
        self.study_model, self.model, self.batch = s, s.encoded.model, batch
        self.pixels, self.tokens = inputs
        self.in_latents = s.head is not None and not s.head.has_decoder

    def __enter__(self) -> LiveTowers:
        if self.study_model.head is not None:
            self.model.attach(
                on_device_of(self.model, self.study_model.head),
                at=["image.embed", "text.embed"],
                name="probe",
                splice=not self.in_latents,
            )
        return self

    def __exit__(self, *exc: object) -> None:
        if self.study_model.head is not None:
            self.model.detach("probe")

    @torch.no_grad()
    def run(self, limit: int | None = None) -> BothSides:
        """Returns the embeddings (or latents) of both sides, of the first ``limit`` pairs."""
        image, text = [], []
        for rows in batches(limit or len(self.pixels), self.batch):
            pixels, tokens = (
                self.model.to_input(x[rows.start : rows.stop]) for x in (self.pixels, self.tokens)
            )
            if self.in_latents:
                sites = ["image.embed.probe.latents", "text.embed.probe.latents"]
                _, cache = self.model.run_with_cache(pixels, tokens, sites=sites)
                image.append(cache[sites[0]])
                text.append(cache[sites[1]])
            else:
                image.append(self.model.encode_image(pixels))
                text.append(self.model.encode_text(tokens))
        return torch.cat(image).float().cpu(), torch.cat(text).float().cpu()

    def masked(self, group: Any) -> BothSides:
        """Runs both towers with the group masked, by the line that the README shows."""
        mask = group
        if self.study_model.head is None:  # no head: the coordinates of the embeddings themselves
            mask = {"image.embed": group.indices, "text.embed": group.indices}
        with self.model.hooks(mask=mask):
            return self.run()


def model_inputs(model: Any, pairs: Any, rows: Sequence[int]) -> BothSides:
    """Returns pixels and tokens of the evaluation pairs, as inputs of ``model``."""
    chosen = [pairs[i] for i in rows]
    return torch.stack([model.preprocess(p.image) for p in chosen]), model.tokenizer([p.text for p in chosen])


@torch.no_grad()
def masked_by_hand(
    s: StudyModel, x: Float[Tensor, "n d"], f: Float[Tensor, "n k"] | None, group: Any
) -> Float[Tensor, "n _"]:
    """Applies the same mask without hooks: coordinates or latents at zero; for an SAE ``x + |x| (f' - f) W_dec``."""
    index = group.indices
    if s.head is None or f is None:
        return x.index_fill(1, index, 0.0)
    if not s.head.has_decoder:
        return f.index_fill(1, index, 0.0)
    scale = s.head.scaled(x)[1]
    change = f[:, index] @ s.head.W_dec[index]
    return x - (change if scale is None else scale * change)


def masking_effects(
    s: StudyModel,
    mds: Any,
    pairs: Any,
    rows: Sequence[int],
    inputs: BothSides,
    *,
    draws: int,
    seed: int,
    step: Callable[[int], None],
) -> dict[str, Any]:
    """Masks each group live, checks it against :func:`masked_by_hand`, and compares it with random sets of its size."""
    at = torch.as_tensor(list(rows))
    x = s.encoded.vectors("image", at), s.encoded.vectors("text", at)
    f = (None, None) if s.head is None else (s.latents("image", at), s.latents("text", at))
    alive = torch.nonzero(~mds.dead).flatten()
    everything = mm.FeatureSet(alive.tolist(), len(mds.R), head=mds.groups[0].head)
    with LiveTowers(s, inputs) as live:
        before: Any = f if live.in_latents else x  # outputs without a mask, already computed
        worst, groups, found = 0.0, {}, {}
        some = min(len(rows), live.batch)
        untouched = live.run(some)
        for group, members in zip(GROUPS, mds.groups, strict=True):
            found[group] = live.masked(members) if len(members) else before
        after = live.run(some)
        for group, members in zip(GROUPS, mds.groups, strict=True):
            hand = tuple(masked_by_hand(s, x[i], f[i], members) for i in (0, 1))
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(found[group], hand, strict=True)))
    same = number_labels([pairs.texts[i] for i in rows])
    right = same[:, None] == same
    first = scores(before, same)
    base = estimates(first)
    for group, members in zip(GROUPS, mds.groups, strict=True):
        now = estimates(scores(found[group], same))
        random = []
        for draw in range(draws):
            other = everything.sample(min(len(members), len(everything)), seed=seed * 100_003 + draw)
            image, text = (masked_by_hand(s, x[i], f[i], other) for i in (0, 1))
            random.append(first_rank_rate(image, text, right) - base["R@1"].value)
            step(1)
        groups[group] = _against_random(now, base, random, len(members), len(rows))
    return {
        "n": len(rows),
        "draws": draws,
        "chance": {f"R@{k}": c for k, c in first.chance.items()},
        "base": {k: e.to_json() for k, e in base.items()},
        "groups": groups,
        "by_hand": worst,
        "bit_equal_after": all(torch.equal(a, b) for a, b in zip(untouched, after, strict=True)),
    }


def _against_random(
    now: dict[str, Estimate], base: dict[str, Estimate], random: list[float], size: int, n: int
) -> dict[str, Any]:
    half = 0.5 / n  # recall moves in steps of one pair: less than half a step is rounding
    change = now["R@1"].value - base["R@1"].value
    spread = torch.tensor(random or [0.0], dtype=torch.float64)
    low, high = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "size": size,
        **{k: e.to_json() for k, e in now.items()},
        "change": change,
        "random": [round(r, 6) for r in random],
        "random_mean": float(spread.mean()),
        "random_interval": [low, high],
        "beyond": "more" if change < low - half else ("less" if change > high + half else ""),
    }


def scores(both: Any, same: Tensor) -> Any:
    """Returns image→text recall at each k; any text equal to the image's own counts as a hit."""
    return mm.retrieval(both[0], both[1], ks=KS, same=same)


@torch.no_grad()
def first_rank_rate(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], right: Bool[Tensor, "n n"]
) -> float:
    """Returns image→text R@1 only, equal to that of ``mm.retrieval``: cheaper for the many random masks."""
    cosines = unit(image) @ unit(text).T
    wrong = cosines.masked_fill(right, -torch.inf).amax(1)
    return float((cosines.masked_fill_(~right, -torch.inf).amax(1) > wrong).float().mean())


def estimates(result: Any) -> dict[str, Estimate]:
    return {f"R@{k}": e for k, e in result.image_to_text.items()}
