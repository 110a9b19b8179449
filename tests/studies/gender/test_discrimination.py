"""Separation and drift: measures with known answers, and verdicts on planted groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import mmhooks as mm
from mmhooks.analysis.interventions.masked_classification import CosineLabels
from mmhooks.analysis.measures.mds import mds
from mmhooks.studies.gender.discrimination import Arm, auc, discrimination, dprime, numbers
from mmhooks.studies.gender.implicit import KEYWORDS, TEMPLATES, implicit_texts
from mmhooks.studies.gender.samples import gender_of_words


def test_measures_are_those_of_the_books():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    score = rng.normal(1.0 * (y == 0), 1.0).round(1)  # with ties
    assert auc(score, y) == pytest.approx(roc_auc_score(y == 0, score))
    assert dprime(np.array([3.0, 5.0, 0.0, 2.0]), np.array([0, 0, 1, 1])) == pytest.approx(3 / np.sqrt(2))
    assert np.isnan(auc(score[:40], y[:40])) and np.isnan(dprime(score[:41], y[:41]))


def test_drift_moves_the_probability_and_leaves_the_separation():
    rng = np.random.default_rng(1)
    y = np.repeat([0, 1], 200)
    logit = rng.normal(np.where(y == 0, 0.7, -0.7), 1.0)
    before, drifted = (numbers(1 / (1 + np.exp(-(logit + d))), y) for d in (0.0, 2.0))
    assert drifted["auc"] == before["auc"] and drifted["dprime"] == pytest.approx(before["dprime"])
    assert drifted["drift"] > before["drift"] + 0.2 and drifted["own"] < before["own"] - 0.05


def test_implicit_texts_name_no_gender_and_are_as_many_of_each():
    texts, labels, keywords = implicit_texts()
    assert len(texts) == len(set(texts)) == 60 * len(TEMPLATES) and sum(labels) * 2 == len(labels)
    assert all(gender_of_words(t) is None for t in texts) and len(set(keywords)) == 60
    assert not set(KEYWORDS[0]) & set(KEYWORDS[1])


def planted() -> tuple[mm.TopKSAE, torch.Tensor, torch.Tensor, list[int]]:
    """An SAE of orthogonal features, of which the first four carry the class; the rest is noise of equal size."""
    torch.manual_seed(0)
    head = mm.TopKSAE(64, 64, 64)
    with torch.no_grad():
        head.W_enc.copy_(torch.eye(64))
        head.W_dec.copy_(torch.eye(64))
        for bias in (head.b_enc, head.b_pre):
            bias.zero_()
    y = torch.arange(120) % 2
    x = torch.rand(120, 64)
    x[:, :4] += 0.5
    x[:, :4] += torch.where(
        y[:, None] == 0, torch.tensor([0.4, 0.4, -0.4, -0.4]), torch.tensor([-0.4, -0.4, 0.4, 0.4])
    )
    return head, x, y, (torch.arange(120) // 4).tolist()


def test_a_group_that_carries_the_class_is_beyond_random_sets():
    head, x, y, families = planted()
    labels = torch.zeros(2, 64)
    labels[0, :2], labels[1, 2:4] = 1.0, 1.0
    share = torch.full((64,), 0.5)
    share[:4], share[4:8] = 0.95, 0.05
    scores = mds(share[None], 1 - share[None])
    assert list(scores.groups[0]) == [0, 1, 2, 3]
    found = discrimination(
        [Arm.of("images", "image", head, x, y, families)],
        scores,
        CosineLabels(labels, 10.0),
        seed=0,
        draws=100,
    )
    primaries = found["primaries"]
    assert len(primaries) == 3 and all(p["name"].startswith("images") for p in primaries.values())
    lowered = primaries["images: ImgD lowers the AUC more than random sets"]
    assert lowered["outcome"] == "shown" and lowered["estimate"]["value"] < -0.4
    groups = found["arms"]["images"]["groups"]
    assert groups["ImgD"]["change"]["auc"]["estimate"]["value"] == pytest.approx(
        lowered["estimate"]["value"], abs=0.05
    )
    other = groups["TextD"]["random"]["auc"]
    assert other["p"] > 0.01 and other["detectable"] < 0.5
    assert "nearest 56 %" in groups["ImgD"]["mass"]["none"]  # no set outside the group weighs as much
