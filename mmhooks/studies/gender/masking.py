"""Masking effects of the gender study: classification by prompt, centroid and probe, compared with random masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.interventions.masked_classification import (
    CosineLabels,
    Masked,
    centroids,
    classified,
    fit_probe,
)
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.analysis.results import Estimate, plain
from mmhooks.analysis.statistics.controls import size_matched
from mmhooks.analysis.statistics.hypothesis_tests import benjamini_hochberg
from mmhooks.analysis.statistics.intervals import from_draws
from mmhooks.analysis.statistics.resampling import (
    beyond_random,
    bootstrap_ratio,
    paired_test,
    resampled_sums,
)
from mmhooks.studies.common.encode import Encoded, batches
from mmhooks.studies.common.placement import on_device_of
from mmhooks.studies.gender.samples import CLASSES, Sample
from mmhooks.utils.indexing import number_labels

SIDES = ("image", "text")
LABELS = ("prompt", "centroid", "probe")
MAIN = "SAE, decoded"


@dataclass(frozen=True)
class Setting:
    """A head and the space its masked samples are compared in, with its groups."""

    name: str
    head: Any
    space: str
    mds: Any


@dataclass(frozen=True)
class Split:
    """Rows of the pairs with their labels and families."""

    rows: Int[Tensor, " n"]
    y: Int[Tensor, " n"]
    families: Int[Tensor, " n"]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Split:
        labels = [-1 if s.label is None else s.label for s in samples]
        return cls(
            torch.tensor([s.row for s in samples], dtype=torch.long),
            torch.tensor(labels, dtype=torch.long),
            number_labels([s.family for s in samples]),
        )


@dataclass(frozen=True)
class Inputs:
    """Inputs of every measurement of the study.

    Attributes:
        encoded: the model's embeddings of all pairs.
        fit: samples that labels are fitted on and features are chosen on. judged: samples that are judged.
        prompts: the embedding of each class's prompts. scale: the model's own scale of the cosine to them.
    """

    encoded: Encoded
    fit: Split
    judged: Split
    prompts: Float[Tensor, "c d"]
    scale: float

    @property
    def labels(self) -> CosineLabels:
        """The classifier by cosine to the prompts."""
        return CosineLabels(self.prompts, self.scale)

    def masked(self, setting: Setting, side: str, rows: Int[Tensor, " n"]) -> Masked:
        """Returns one side of the pairs in these rows, ready to be masked by the setting's head."""
        return Masked(setting.head, self.encoded.vectors(side, rows))


def classifiers(setting: Setting, inputs: Inputs, side: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns the three classifiers in the setting's space; centroid and probe are fitted on samples not judged."""
    known = inputs.masked(setting, side, inputs.fit.rows).vectors(None, setting.space)
    named, head = inputs.prompts, setting.head
    if setting.space == "latent":
        named = head.encode(head.prepare(named)).detach()
    return {
        "prompt": CosineLabels(named, inputs.scale),
        "centroid": CosineLabels(centroids(known, inputs.fit.y), inputs.scale),
        "probe": fit_probe(known, inputs.fit.y),
    }


def masking_effects(
    setting: Setting,
    inputs: Inputs,
    *,
    draws: int,
    seed: int,
    live: Mapping[tuple[str, str], Tensor],
    step: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Returns Tables 6 and 7 in one setting: both sides, every kind of label, every group and its controls.

    Args:
        draws: random masks of each control.
        live: vectors computed under ``model.hooks(mask=group)``, by ``(side, group)``; others are computed by hand.
        step: called with the number of random masks just done.
    """
    found = {
        side: _effects_of_side(setting, inputs, side, draws=draws, seed=seed, live=live, step=step)
        for side in SIDES
    }
    return {"head": setting.head.id, "space": setting.space} | found


def _effects_of_side(
    setting: Setting,
    inputs: Inputs,
    side: str,
    *,
    draws: int,
    seed: int,
    live: Mapping[tuple[str, str], Tensor],
    step: Callable[[int], None],
) -> dict[str, Any]:
    judged = inputs.judged
    samples, judges = inputs.masked(setting, side, judged.rows), classifiers(setting, inputs, side)

    def classified_by(judge: Callable[[Tensor], Tensor], z: Tensor) -> Any:
        return classified(judge(z), judged.y, CLASSES, clusters=judged.families, seed=seed)

    def means(mask: Any) -> dict[str, tuple[float, float]]:
        z = samples.vectors(mask, setting.space)
        return {k: _accuracy_and_probability(judge(z), judged.y) for k, judge in judges.items()}

    start = samples.vectors(None, setting.space)
    base = {k: classified_by(judge, start) for k, judge in judges.items()}
    found: dict[str, Any] = {k: {"base": summary_of(b), "groups": {}} for k, b in base.items()}
    own: dict[str, dict[str, Tensor]] = {k: {} for k in judges}
    groups = dict(zip(GROUPS, setting.mds.groups, strict=True))
    for name, group in groups.items():
        z = live.get((side, name))
        z = samples.vectors(group, setting.space) if z is None else z
        random = [means(m) for m in size_matched(group, draws=draws, seed=seed, alive=setting.mds.alive)]
        step(draws)
        size, cross_effects, subsampled = _against_cross(name, group, groups["CrossD"], means, draws, seed)
        step(draws)
        for k, judge in judges.items():
            after = classified_by(judge, z)
            own[k][name] = after.own
            p0, a0 = base[k].probability.value, base[k].accuracy.value
            random_changes = [r[k][1] - p0 for r in random]
            group_changes = [r[k][1] - p0 for r in subsampled] or [after.probability.value - p0] * len(
                cross_effects
            )
            cross_differences = [
                g - (c[k][1] - p0) for g, c in zip(group_changes, cross_effects, strict=True)
            ]
            accuracy = _control(after.accuracy.value - a0, [r[k][0] - a0 for r in random])
            found[k]["groups"][name] = {
                "size": len(group),
                "share": samples.removed_share(group),
                **summary_of(after),
                "change": plain(paired_test(after.own, base[k].own, judged.families, seed=seed)),
                "accuracy_change": plain(paired_test(after.right, base[k].right, judged.families, seed=seed)),
                "by_gender": _by_gender(base[k].own, after.own, judged, seed),
                "random": _control(after.probability.value - p0, random_changes)
                | _prefixed(accuracy, "accuracy_"),
                "cross": None if name == "CrossD" else {"size": size, **_control(0.0, cross_differences)},
            }
    for k in judges:
        found[k]["contrast"] = plain(paired_test(own[k]["ImgD"], own[k]["TextD"], judged.families, seed=seed))
    return found


def _against_cross(
    name: str,
    group: mm.FeatureSet,
    cross: mm.FeatureSet,
    means: Callable[[mm.FeatureSet], dict[str, tuple[float, float]]],
    draws: int,
    seed: int,
) -> tuple[int, list[dict[str, tuple[float, float]]], list[dict[str, tuple[float, float]]]]:
    """Returns the number of features compared, the effects of that many of CrossD, and of that many of the group.

    Where CrossD is smaller, the group is sub-sampled to its size in every draw; otherwise the last list is empty.
    """
    size = min(len(group), len(cross))
    if name == "CrossD":
        return size, [], []
    cross_effects = [means(cross.sample(size, seed=seed * 100_003 + i)) for i in range(draws)]
    if size == len(group):
        return size, cross_effects, []
    return (
        size,
        cross_effects,
        [means(group.sample(size, seed=seed * 100_003 + 7_919 + i)) for i in range(draws)],
    )


def _accuracy_and_probability(
    probabilities: Float[Tensor, "n c"], y: Int[Tensor, " n"]
) -> tuple[float, float]:
    """Returns accuracy and mean probability of the own class: ``classified`` without its intervals."""
    own = probabilities.gather(1, y[:, None])[:, 0]
    best = probabilities >= probabilities.amax(1, keepdim=True)
    right = best.gather(1, y[:, None])[:, 0].double() / best.sum(1)
    return float(right.mean()), float(own.mean())


def summary_of(c: Any) -> dict[str, Any]:
    return {
        "accuracy": plain(c.accuracy),
        "balanced": plain(c.balanced),
        "probability": plain(c.probability),
        "by_class": {k: {"accuracy": plain(a), "probability": plain(p)} for k, (a, p) in c.by_class.items()},
    }


def _control(value: float, drawn: Sequence[float]) -> dict[str, Any]:
    """Returns mean and range of the draws, and the p-value of ``value`` among them."""
    if not drawn:
        return {"mean": None, "low": None, "high": None, "p": None, "draws": []}
    e = from_draws(sum(drawn) / len(drawn), torch.tensor(drawn, dtype=torch.float64), len(drawn))
    p = plain(beyond_random(value, drawn))
    return {"mean": e.value, "low": e.low, "high": e.high, "p": p, "draws": [round(d, 6) for d in drawn]}


def _prefixed(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + k: v for k, v in values.items() if k != "draws"}


def _by_gender(before: Tensor, after: Tensor, judged: Split, seed: int) -> dict[str, Any]:
    """Returns Table 7: ``100 (p0 - p) / p0`` and points of each gender, paired tests, and women minus men."""
    drop, out = before - after, {}
    for c, name in enumerate(CLASSES):
        of = judged.y == c
        test = paired_test(after[of], before[of], judged.families[of], seed=seed)
        out[name] = {
            "relative": plain(bootstrap_ratio(100 * drop[of], before[of], judged.families[of], seed=seed)),
            "points": plain(bootstrap_ratio(100 * drop[of], None, judged.families[of], seed=seed)),
            "p": test.p,
            "n": int(of.sum()),
        }
    women, men = ((judged.y == c).double() for c in (0, 1))
    columns = torch.stack([drop * women, before * women, drop * men, before * men], dim=1).double()
    a, b, c, d = columns.sum(0).tolist()
    value = 100 * (a / b - c / d)
    n = len(before)
    if len(judged.families.unique()) < 2:
        difference = Estimate(value, math.nan, math.nan, n)
    else:
        s = resampled_sums(columns, judged.families, seed=seed)
        s = s[(s[:, 1] > 0) & (s[:, 3] > 0)]
        difference = from_draws(value, 100 * (s[:, 0] / s[:, 1] - s[:, 2] / s[:, 3]), n)
    return out | {"difference": plain(difference)}


def false_discovery(settings: Mapping[str, Any]) -> None:
    """Adds ``q`` to every ``p`` against random masks, in place: Benjamini-Hochberg over all of them."""
    cells = [
        g["random"]
        for s in settings.values()
        for side in SIDES
        for k in LABELS
        for g in s[side][k]["groups"].values()
    ]
    p = torch.tensor([math.nan if c["p"] is None else c["p"] for c in cells], dtype=torch.float64)
    for cell, q in zip(cells, benjamini_hochberg(p).tolist(), strict=True):
        cell["q"] = plain(q)


# -- live ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_live(
    setting: Setting, model: Any, inputs: tuple[Tensor, Tensor], mask: Any, *, batch: int = 128
) -> dict[str, Tensor]:
    """Runs both towers under ``model.hooks(mask=mask)``, with the head attached as the setting's space requires."""
    latent, sites = setting.space == "latent", [f"{side}.embed" for side in SIDES]
    head = on_device_of(model, setting.head)
    model.attach(head, at=sites, name="probe", error_term=setting.space != "decoded", splice=not latent)
    try:
        out: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for rows in batches(len(inputs[0]), batch):
            pixels, tokens = (model.to_input(x[rows.start : rows.stop]) for x in inputs)
            with model.hooks(mask=mask):
                if latent:
                    _, cache = model.run_with_cache(
                        pixels, tokens, sites=[f"{s}.probe.latents" for s in sites]
                    )
                    found = [cache[f"{s}.probe.latents"] for s in sites]
                else:
                    found = [model.encode_image(pixels), model.encode_text(tokens)]
            for side, z in zip(SIDES, found, strict=True):
                out[side].append(z.float().cpu())
        return {side: torch.cat(z) for side, z in out.items()}
    finally:
        model.detach("probe")


def mask_live(
    setting: Setting, inputs: Inputs, pairs: Any
) -> tuple[dict[tuple[str, str], Tensor], dict[str, Any]]:
    """Masks the groups live on all judged samples.

    Returns:
        Vectors by side and group; and the largest difference of a probability from masking by hand, with whether the
        model's outputs are bit-equal afterwards.
    """
    model, rows = inputs.encoded.model, inputs.judged.rows
    chosen = [pairs[int(i)] for i in rows]
    pixels = torch.stack([model.preprocess(p.image) for p in chosen])
    tokens = model.tokenizer([p.text for p in chosen])
    few = model.to_input(pixels[:32]), model.to_input(tokens[:32])
    with torch.no_grad():
        before = model.encode_image(few[0]), model.encode_text(few[1])
    live: dict[tuple[str, str], Tensor] = {}
    worst = 0.0
    for name, group in zip(GROUPS, setting.mds.groups, strict=True):
        if not len(group):
            continue
        both = run_live(setting, model, (pixels, tokens), group)
        for side in SIDES:
            live[side, name] = both[side]
            judge = classifiers(setting, inputs, side)["prompt"]
            hand = inputs.masked(setting, side, rows).vectors(group, setting.space)
            worst = max(worst, float((judge(both[side]) - judge(hand)).abs().max()))
    with torch.no_grad():
        after = model.encode_image(few[0]), model.encode_text(few[1])
    equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return live, {"by_hand": worst, "bit_equal_after": equal}
