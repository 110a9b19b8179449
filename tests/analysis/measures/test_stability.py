"""Stability of features and of their groups across seeds, against naive assignments, correlations and counts."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score
from torch.nn.functional import normalize

from mmhooks.analysis.measures.stability import activation_stability, group_agreement, labels_of, stability
from mmhooks.errors import MMHooksError, NoDecoder, NotFinite, ShapeMismatch
from mmhooks.heads import NCL, TopKSAE
from mmhooks.hooks.features import FeatureSet


def vectors(n: int, d: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_stability_is_the_best_assignment_of_all() -> None:
    one, other = TopKSAE(5, 6, 2, seed=0), TopKSAE(5, 6, 2, seed=1)
    cosine = one.W_dec.detach() @ other.W_dec.detach().T
    best = max(sum(float(cosine[i, j]) for i, j in enumerate(p)) for p in permutations(range(6))) / 6
    assert stability(one, other).mean.value == pytest.approx(best, rel=1e-5)


def test_stability_ignores_order_and_reports_chance() -> None:
    one, other = TopKSAE(32, 64, 4, seed=0), TopKSAE(32, 64, 4, seed=0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.W_dec.copy_(3 * one.W_dec[order])
    found = stability(one, other)
    assert found.mean.value == pytest.approx(1, abs=1e-5) and torch.equal(
        order[found.partner], torch.arange(64)
    )
    strangers = stability(one, TopKSAE(32, 64, 4, seed=7))
    assert strangers.mean.value == pytest.approx(strangers.chance, abs=0.05)
    assert len(stability(one, TopKSAE(32, 96, 4)).values) == 64
    assert float(found.matched.value) == 1 and strangers.matched_by_chance < 0.05
    with pytest.raises(MMHooksError, match="similarity between 0 and 1"):
        stability(one, other, above=1.0)
    with pytest.raises(NoDecoder, match="without any"):
        stability(one, NCL(32, 64))
    with pytest.raises(ShapeMismatch, match="same width, got 32 and 16"):
        stability(one, TopKSAE(16, 64, 4))


# -- by activations ----------------------------------------------------------------------------------------------


def test_activation_stability_is_the_best_assignment_of_pearsons_r() -> None:
    one, other = NCL(8, 5, seed=0), NCL(8, 5, seed=1)
    image, text = vectors(5000, 8, 0), vectors(40, 8, 1) + 0.5  # more images than a batch
    f, g = (
        torch.cat([head.encode(image), head.encode(text)]).detach().double().numpy() for head in (one, other)
    )
    r = np.corrcoef(f.T, g.T)[:5, 5:]
    best = max(permutations(range(5)), key=lambda p: sum(r[i, j] for i, j in enumerate(p)))
    found = activation_stability(one, other, image, text, above=0.2)
    assert found.partner.tolist() == list(best) and found.by == "activations"
    expected = [r[i, j] for i, j in enumerate(best)]
    assert found.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.matched.value == pytest.approx(np.mean([x > 0.2 for x in expected]))
    assert found.same.tolist() == [x > 0.2 for x in expected]


def test_order_scale_and_dead_features_do_not_matter_and_modality_is_not_a_match() -> None:
    one, other = TopKSAE(16, 24, 3, seed=0), TopKSAE(16, 24, 3, seed=0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.W_enc.copy_(one.W_enc[order])
        other.W_dec.copy_(one.W_dec[order])
    image, text = vectors(800, 16, 0) + 1, vectors(800, 16, 1) - 1  # two clouds: features are of one of them
    found = activation_stability(one, other, image, text)
    alive = torch.cat([one.encode(image), one.encode(text)]).any(0)
    assert torch.equal(order[found.partner][alive], torch.arange(24)[alive])
    assert bool((found.values[alive] > 0.999).all()) and not found.values[~alive].any()
    assert found.matched.value == pytest.approx(float(alive.float().mean()))
    # Shuffled within each modality, a feature of images still fires with other features of images.
    assert 0 < found.chance < 0.9 * found.mean.value
    assert len(activation_stability(TopKSAE(16, 32, 3), one, image).values) == 24
    with pytest.raises(ShapeMismatch, match="same width, got 16 and 8"):
        activation_stability(one, NCL(8, 5), image)
    with pytest.raises(ShapeMismatch, match="at least 2 vectors"):
        activation_stability(one, other, image[:1])
    with pytest.raises(NotFinite, match="vectors"):
        activation_stability(one, other, image / 0)


# -- groups ------------------------------------------------------------------------------------------------------


def grouped(labels: list[int]) -> list[FeatureSet]:
    return [
        FeatureSet([i for i, x in enumerate(labels) if x == g], len(labels), name=n)
        for g, n in enumerate("AB")
    ]


def test_agreement_of_groups_is_cohens_kappa_over_shared_features() -> None:
    one, other = TopKSAE(16, 12, 2, seed=0), TopKSAE(16, 12, 2, seed=0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        other.W_dec.copy_(one.W_dec[order])
        other.W_dec[0] *= -1  # a stranger
    here, there = [0, 0, 0, 1, 1, 1, 0, 1, 0, 1, -1, 0], [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0]
    found = stability(one, other)
    shared = [i for i in range(12) if found.same[i] and here[i] >= 0]
    assert 8 <= len(shared) <= 11  # feature 10 is in no group, and the stranger has no partner
    partners = [there[int(found.partner[i])] for i in shared]
    agreement = group_agreement(found, grouped(here), grouped(there))
    own = [here[i] for i in shared]
    assert agreement.kappa.value == pytest.approx(cohen_kappa_score(own, partners))
    assert agreement.ungrouped == int(found.same.sum()) - len(shared)
    assert agreement.kappa.low <= agreement.kappa.value <= agreement.kappa.high
    assert agreement.agreement == pytest.approx(np.mean([a == b for a, b in zip(own, partners, strict=True)]))
    assert int(agreement.counts.sum()) == len(shared) and agreement.counts[0, 1] == sum(
        a == 0 and b == 1 for a, b in zip(own, partners, strict=True)
    )
    assert len(agreement.table()) == 2 and -0.5 <= agreement.adjusted_rand <= 1


def test_equal_groups_agree_fully_and_random_ones_by_chance() -> None:
    sae = TopKSAE(64, 400, 4)
    same, generator = stability(sae, sae), torch.Generator().manual_seed(0)
    a, b = (grouped((torch.rand(400, generator=generator) > 0.7).long().tolist()) for _ in range(2))
    assert group_agreement(same, a, a).kappa.value == group_agreement(same, a, a).adjusted_rand == 1
    found = group_agreement(same, a, b)
    assert abs(found.kappa.value) < 0.15 and found.kappa.low < 0 < found.kappa.high
    assert found.agreement == pytest.approx(found.expected, abs=0.07) and found.expected > 0.5


def test_groups_that_do_not_fit_are_refused() -> None:
    sae = TopKSAE(16, 12, 2)
    same = stability(sae, sae)
    groups = grouped([0, 1] * 6)
    with pytest.raises(ShapeMismatch, match="the same names"):
        group_agreement(same, groups, groups[::-1])
    with pytest.raises(ShapeMismatch, match="narrower of 12 features, got groups of heads of 6 and 12"):
        group_agreement(same, groups, grouped([0, 1] * 3))
    with pytest.raises(ShapeMismatch, match="disjoint"):
        labels_of([groups[0], groups[0]])
    with pytest.raises(MMHooksError, match="got none of 12"):
        group_agreement(stability(sae, TopKSAE(16, 12, 2, seed=9), above=0.99), groups, groups)
    assert labels_of(grouped([0, -1, 1])).tolist() == [0, -1, 1]
