"""The paper's statements on modality: verdicts follow intervals, and every statement can go each way."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mmhooks.report import Estimate
from mmhooks.studies.modality import paper


def tight(value: float, width: float = 0.001) -> dict[str, Any]:
    return Estimate(value, value - width, value + width, 100).to_json()


def as_in_paper(width: float = 0.001, flip: float = 1.0) -> dict[str, Any]:
    """Models that measure what the paper prints (``flip`` = -1: the opposite)."""
    mu = {"CLIP": 0.45, "DeCLIP": 0.48, "CLIP+NCL": 0.49, "CLIP+SAE": 0.5}
    if flip < 0:
        mu = {"CLIP": 0.51, "DeCLIP": 0.48, "CLIP+NCL": 0.7, "CLIP+SAE": 0.3}
    return {
        m: {
            "embed_sim": {
                k: tight(flip * paper.SIMILARITY[m][i], width) for i, k in enumerate(paper.MODALITIES)
            },
            "win_rate": {k: tight(flip * paper.WIN_RATE[m][i], width) for i, k in enumerate(paper.MODALITIES)}
            | {"gap": tight(paper.WIN_GAP[m] if flip > 0 else 0.2 - paper.WIN_GAP[m], width)},
            "monosemanticity": {
                k: tight(flip * paper.MONOSEMANTICITY[m][i], width) for i, k in enumerate(paper.MODALITIES)
            },
            "mds": {"mu": tight(mu[m], width), "sigma": tight(0.1 + flip * 0.02 * (m != "CLIP"), width)},
        }
        for m in paper.MODELS
    }


def test_the_papers_own_values_hold() -> None:
    found = paper.claims(as_in_paper())
    assert len(found) == 15 and [c.claim for c in found if c.verdict != "same"] == []


def test_opposite_values_differ_everywhere() -> None:
    found = paper.claims(as_in_paper(flip=-1))
    assert len(found) == 15 and [c.claim for c in found if c.verdict != "differs"] == []
    assert all(c.sentence().startswith("Differs from the paper: ") for c in found)


def test_wide_intervals_decide_nothing() -> None:
    assert {c.verdict for c in paper.claims(as_in_paper(width=3.0))} == {"open"}


def test_missing_models_are_not_spoken_of() -> None:
    models = as_in_paper()
    del models["DeCLIP"]
    assert all("DeCLIP" not in c.sentence() for c in paper.claims(models))
    assert paper.claims({}) == []


def test_unknown_values_are_not_compared() -> None:
    models = as_in_paper()
    models["CLIP+NCL"]["embed_sim"]["image"] = Estimate(math.nan, n=0).to_json()
    assert not any("EmbedSim for images" in c.claim for c in paper.claims(models))


def test_table_marks_only_decided_reversals() -> None:
    column = {m: paper.SIMILARITY[m][0] for m in paper.MODELS}  # CLIP .113, DeCLIP .058
    clip = Estimate(0.1, 0.09, 0.11)
    assert paper.table1_differs({"CLIP": clip, "DeCLIP": Estimate(0.3, 0.2, 0.4)}, column, "DeCLIP")
    assert not paper.table1_differs({"CLIP": clip, "DeCLIP": Estimate(0.3, 0.0, 0.6)}, column, "DeCLIP")
    assert not paper.table1_differs({"CLIP": clip, "DeCLIP": Estimate(0.02, 0.0, 0.04)}, column, "DeCLIP")
    assert paper.table1_differs({"CLIP": Estimate(-0.1, -0.2, -0.05)}, column, "CLIP")


def test_p_of_an_interval_is_that_of_its_normal_distribution() -> None:
    assert paper.p_value(Estimate(1.96, 0.0, 3.92)) == pytest.approx(0.05, abs=1e-5)
    assert paper.p_value(Estimate(-1.0, -1.2, 0.0)) == pytest.approx(0.05, abs=1e-5)  # the side of 0 counts
    assert math.isnan(paper.p_value(Estimate(1.0)))


def test_a_verdict_alone_does_not_survive_the_correction_over_all() -> None:
    models = as_in_paper(width=3.0)  # nothing decided, but one: p = .02 alone
    models["CLIP"]["mds"]["mu"] = Estimate(0.45, 0.45 - 0.042, 0.45 + 0.042, 100).to_json()
    alone = next(s for s in paper.statements(models) if "lean to the text side" in s.claim)
    together = next(c for c in paper.claims(models) if "lean to the text side" in c.claim)
    assert alone.verdict == "same" and 0.01 < alone.p < 0.05
    assert together.verdict == "open" and "(Holm)" in together.measured
