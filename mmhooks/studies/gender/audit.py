"""Bias audit: woman or man by skin tone, profession or another stratum, and skin tone itself as the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.interventions.masked_classification import CosineLabels, classified
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.analysis.results import Estimate, plain
from mmhooks.analysis.statistics.resampling import bootstrap_ratio, paired_test
from mmhooks.studies.gender.masking import SIDES, Inputs, Setting, Split, summary_of
from mmhooks.studies.gender.samples import TONES, Sample
from mmhooks.utils.indexing import number_labels


def audit(setting: Setting, inputs: Inputs, people: Sequence[Sample], *, seed: int) -> list[dict[str, Any]]:
    """Classifies woman/man by stratum, before and after masking ImgD in images and TextD in texts.

    Includes people of unstated gender and the model's training samples, which ``seen`` counts.
    """
    everyone = Split.of(people)
    masks = {"image": setting.mds.groups[0], "text": setting.mds.groups[1]}
    answers = {}
    for side in SIDES:
        samples = inputs.masked(setting, side, everyone.rows)
        answers[side] = tuple(inputs.labels(samples.vectors(mask)) for mask in (None, masks[side]))
    out = []
    for kind, stratum, rows in _strata(people):
        at = torch.tensor(rows)
        y, families = everyone.y[at], everyone.families[at]
        line: dict[str, Any] = {
            "kind": kind, "stratum": stratum, "women": int((y == 0).sum()), "men": int((y == 1).sum()),
            "unsaid": int((y < 0).sum()), "seen": sum(not people[i].heldout for i in rows),
        }  # fmt: skip
        for side in SIDES:
            line[side] = {}
            for when, p in zip(("before", "after"), answers[side], strict=True):
                woman = p[at, 0]
                p_woman = {c: _mean(woman[y == c], families[y == c], seed) for c in (0, 1, -1)}
                hits = {c: _mean((woman[y == c] > 0.5) == (c == 0), families[y == c], seed) for c in (0, 1)}
                line[side][when] = {
                    "women": plain(hits[0]), "men": plain(hits[1]),
                    "p_woman": {"women": plain(p_woman[0]), "men": plain(p_woman[1]), "unsaid": plain(p_woman[-1])},
                }  # fmt: skip
        out.append(line)
    return out


def _mean(values: Tensor, families: Tensor, seed: int) -> Estimate | None:
    return bootstrap_ratio(values.double(), None, families, seed=seed) if len(values) else None


def _strata(people: Sequence[Sample]) -> list[tuple[str, str, list[int]]]:
    found: dict[tuple[str, str], list[int]] = {}
    for i, s in enumerate(people):
        found.setdefault(("all", "all"), []).append(i)
        for kind, value in s.strata.items():
            found.setdefault((kind, f"all of {kind}"), []).append(i)
            found.setdefault((kind, value), []).append(i)

    def order(key: tuple[str, str]) -> tuple[Any, ...]:
        kind, value = key
        tone = TONES.index(value) if value in TONES else -1
        return (kind != "all", kind == "profession", kind, not value.startswith("all of"), tone, value)

    return [(kind, value, found[kind, value]) for kind, value in sorted(found, key=order)]


def skin_tone_masking(
    setting: Setting,
    inputs: Inputs,
    people: Sequence[Sample],
    words: Float[Tensor, "2 d"],
    *,
    seed: int,
) -> dict[str, Any] | None:
    """Classifies skin tone itself, light against dark, under the same masks; None unless samples have both.

    Args:
        words: the text embeddings of a light and of a dark skin tone.
    """
    side_of = {"light": 0, "medium-light": 0, "medium-dark": 1, "dark": 1}
    chosen = [(s, side_of[s.strata["skin tone"]]) for s in people if s.strata.get("skin tone") in side_of]
    if len({y for _, y in chosen}) < 2:
        return None
    rows, y = torch.tensor([s.row for s, _ in chosen]), torch.tensor([y for _, y in chosen])
    families, judge = number_labels([s.family for s, _ in chosen]), CosineLabels(words, inputs.scale)
    out: dict[str, Any] = {"classes": ["light", "dark"], "n": len(chosen)}
    for side in SIDES:
        samples = inputs.masked(setting, side, rows)
        masks = {"none": None, **dict(zip(GROUPS, setting.mds.groups, strict=True))}
        got = {
            m: classified(judge(samples.vectors(g)), y, ("light", "dark"), clusters=families, seed=seed)
            for m, g in masks.items()
        }
        out[side] = {
            m: summary_of(c)
            | {"change": plain(paired_test(c.own, got["none"].own, families, draws=1999, seed=seed))}
            for m, c in got.items()
        }
    return out
