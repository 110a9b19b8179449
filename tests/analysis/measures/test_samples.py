"""EmbedSim and WinRate together: the paper's forms, chance, refused input, and saving as JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch

import mmhooks as mm
from mmhooks.analysis.measures.embed_sim import EmbedSim
from mmhooks.analysis.measures.samples import random_samples
from mmhooks.analysis.measures.win_rate import WinRate
from mmhooks.errors import NotFinite, ShapeMismatch
from mmhooks.studies.modality.measures import Definition

from .conftest import FEATURES, M, N
from .loops import cos, mean, naive_top


def test_paper_forms_equal_the_loops(data):
    latents, x = data
    eps = 0.4
    sim = mm.embed_sim(latents, x, m=M, kind="paper", eps=eps, seed=3)
    win = mm.win_rate(latents, x, m=M, kind="paper", seed=3)
    random = random_samples(N, M, range(FEATURES), 3)
    excluded = compared = 0
    for k in range(FEATURES):
        top, other = naive_top(latents, k, M), random[k].tolist()
        assert len(set(other)) == M
        ratios, wins = [], []
        for a in range(len(top)):
            for b in range(a + 1, len(top)):
                plus, minus = cos(x, top[a], top[b]), cos(x, other[a], other[b])
                wins.append(plus > minus)
                compared += 1
                if abs(minus) < eps:
                    excluded += 1
                else:
                    ratios.append((plus - minus) / minus)
        assert float(sim.values[k]) == pytest.approx(mean(ratios), abs=1e-4, nan_ok=True)
        assert float(win.values[k]) == pytest.approx(mean(wins), abs=1e-6, nan_ok=True)
    assert (sim.excluded, sim.pairs_compared) == (excluded, compared) and 0 < excluded < compared


def test_random_features_have_no_similarity_above_chance():
    generator = torch.Generator().manual_seed(5)
    latents = torch.rand(600, 300, generator=generator)
    x = torch.randn(600, 8, generator=generator) + 0.5
    sim, win = mm.embed_sim(latents, x), mm.win_rate(latents, x)
    assert sim.estimate.low < 0 < sim.estimate.high and win.estimate.low < 0.5 < win.estimate.high
    # Features that are directions of the embedding find alike samples.
    directed = torch.relu(x @ torch.randn(8, 300, generator=generator))
    assert mm.embed_sim(directed, x).estimate.low > 0.3 and mm.win_rate(directed, x).estimate.low > 0.7


def test_bad_input_is_named(data):
    latents, x = data
    with pytest.raises(ShapeMismatch, match="latents of 40 samples, embeddings of 39"):
        mm.embed_sim(latents, x[:-1])
    bad = x.clone()
    bad[4, 1] = math.nan
    with pytest.raises(NotFinite, match=r"embeddings: 1 of 200 .*rows 4 and columns 1"):
        mm.win_rate(latents, bad)
    with pytest.raises(ShapeMismatch, match="m = 1"):
        mm.embed_sim(latents, x, m=1)
    with pytest.raises(NotFinite, match="latents"):
        mm.top_activating(latents / 0)


def test_more_samples_than_a_list_holds_are_refused(data):
    """Such a number left every feature NaN without a word."""
    latents, x = data
    wrong = {"m": 5, "min_samples": 6}
    message = "min_samples of at most m = 5, got 6; lower min_samples or raise m"
    for measure in (mm.embed_sim, mm.win_rate):
        with pytest.raises(ShapeMismatch, match=message):
            measure(latents, x, **wrong)
        assert measure(latents, x, m=5, min_samples=5).values.isfinite().any()
    for metric in (EmbedSim, WinRate):
        with pytest.raises(ShapeMismatch, match=message):
            metric(FEATURES, x.shape[1], pool=20, **wrong)
    with pytest.raises(ShapeMismatch, match=message):
        Definition(**wrong)  # of the modality study: before its encoders run


def test_results_are_written_as_json(data, tmp_path):
    latents, x = data
    for result in (
        mm.embed_sim(latents, x, m=M),
        mm.win_rate(latents, x, m=M),
        mm.top_activating(latents, m=M),
    ):
        stored = json.loads(result.save(tmp_path / "r.json").read_text())
        assert (
            stored["kind"] in (type(result).__name__, getattr(result, "kind", ""))
            and result.table().markdown()
        )
    stored = json.loads(mm.embed_sim(latents, x, m=M).save(tmp_path / "r.json").read_text())
    assert stored["values"][2] is None and stored["estimate"]["n"] == 4
