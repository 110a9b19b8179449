"""Whole studies, simulated: false positives at their nominal rate under the null, power as computed under an effect.

Tolerances are binomial: of ``STUDIES`` studies the number declared is refused where its chance is below 1 in 2,000. A
test with discrete p-values may be below its level, never above.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.equivalence import clustered_mean, equivalence, noninferiority
from mmhooks.analysis.statistics.power import (
    detectable_against_sets,
    detectable_beyond_random,
    detectable_margin,
    detectable_mean,
    detectable_rate,
)
from mmhooks.analysis.statistics.primaries import Measured, Primary, decide
from mmhooks.analysis.statistics.repeated import sign_flip_p
from mmhooks.analysis.statistics.resampling import against_sets, beyond_random, cluster_sums, flip_p

STUDIES, FAMILIES, RARE = 500, 30, 1 / 2000
SIZES = 1 + np.random.default_rng(0).poisson(4, FAMILIES)  # drawings a family
CLUSTERS = torch.from_numpy(np.repeat(np.arange(FAMILIES), SIZES))
BETWEEN, WITHIN = 0.3, 0.2


def at_most(rate: float) -> float:
    return binom.ppf(1 - RARE, STUDIES, rate) / STUDIES


def at_least(rate: float) -> float:
    return binom.ppf(RARE, STUDIES, rate) / STUDIES


def study(seed: int, effect: float = 0.0) -> torch.Tensor:
    """Differences of samples of one study: drawings of a family move together."""
    rng = np.random.default_rng([7, seed])
    family = rng.normal(effect, BETWEEN, FAMILIES)
    return torch.from_numpy(np.repeat(family, SIZES) + rng.normal(0, WITHIN, len(CLUSTERS)))


def true_error() -> float:
    """Standard error of a study's mean, in closed form."""
    n = len(CLUSTERS)
    return float(np.sqrt((BETWEEN**2 * (SIZES**2).sum() + WITHIN**2 * n) / n**2))


def p_values(effect: float) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {"flips": [], "t": [], "unclustered": []}
    for i in range(STUDIES):
        x = study(i, effect)
        found["flips"].append(flip_p(cluster_sums(x[:, None], CLUSTERS)[:, 0], draws=499)[0])
        found["t"].append(clustered_mean(x, CLUSTERS).p())
        found["unclustered"].append(clustered_mean(x).p())
    return {k: np.array(v) for k, v in found.items()}


def test_clustered_tests_are_nominal_under_the_null_and_unclustered_ones_are_not():
    p = p_values(0.0)
    for kind in ("flips", "t"):
        assert at_least(0.05) <= (p[kind] <= 0.05).mean() <= at_most(0.05), kind
    assert (p["unclustered"] <= 0.05).mean() > 0.2  # the harness sees what ignoring families does


def test_clustered_tests_have_the_power_computed():
    p = p_values(detectable_mean(true_error(), FAMILIES - 1))
    for kind in ("flips", "t"):
        assert at_least(0.77) <= (p[kind] <= 0.05).mean() <= at_most(0.83), kind


def test_margins_are_nominal_at_the_margin_and_have_the_power_computed():
    error, df = true_error(), FAMILIES - 1
    margin, one_sided = detectable_margin(error, df), detectable_margin(error, df, sides=1)
    zero = [study(i) for i in range(STUDIES)]
    edge = [np.mean([equivalence(x + margin, margin, CLUSTERS).p <= 0.05 for x in zero]),
            np.mean([noninferiority(x + one_sided, one_sided, CLUSTERS).p <= 0.05 for x in zero])]  # fmt: skip
    inside = [np.mean([equivalence(x, margin, CLUSTERS).p <= 0.05 for x in zero]),
              np.mean([noninferiority(x, one_sided, CLUSTERS).p <= 0.05 for x in zero])]  # fmt: skip
    assert all(at_least(0.05) <= rate <= at_most(0.05) for rate in edge), edge
    assert all(at_least(0.77) <= rate <= at_most(0.83) for rate in inside), inside


@pytest.mark.parametrize(("test", "sets"), [(beyond_random, 200), (against_sets, 20)])
def test_a_group_against_random_sets(test, sets):
    """A group that is a random set itself is declared different in 5 %, with two hundred sets by rank or twenty by t."""
    rng = np.random.default_rng(11)
    detectable = {beyond_random: detectable_beyond_random, against_sets: detectable_against_sets}[test]
    drawn = torch.from_numpy(rng.normal(0.4, 0.1, (STUDIES, sets)))
    value = rng.normal(0.4, 0.1, STUDIES).tolist()
    null = np.mean([test(v, d) <= 0.05 for v, d in zip(value, drawn, strict=True)])
    # The effect that random sets with exactly this scatter make detectable, planted in every study.
    effect = detectable(_normal_sets(sets))
    power = np.mean([test(v + effect, d) <= 0.05 for v, d in zip(value, drawn, strict=True)])
    assert at_least(0.05 * 0.95) <= null <= at_most(0.05), null
    assert at_least(0.70) <= power <= at_most(0.88), power


def _normal_sets(n: int) -> torch.Tensor:
    """Quantiles of the normal distribution that the studies draw their sets from."""
    x = torch.from_numpy(norm.ppf((np.arange(n) + 0.5) / n))
    return 0.1 * x / x.std()


def test_one_random_set_is_no_control():
    """Paired over prompts, a random set differs from *one* other random set far more often than in 5 %."""
    rng = np.random.default_rng(5)
    sets = rng.normal(0, 0.1, (STUDIES, 2))
    prompts = rng.normal(0, 0.2, (STUDIES, 2, 100)) + sets[..., None]
    declared = [clustered_mean(torch.from_numpy(a - b)).p() <= 0.05 for a, b in prompts]
    assert np.mean(declared) > 0.5


def test_holm_holds_the_rate_of_any_false_claim_over_dependent_primaries():
    rng = np.random.default_rng(13)
    primaries = [Primary(str(j)) for j in range(6)]
    false = naive = 0
    for _ in range(STUDIES):
        shared = rng.normal(0, 0.2, 40)
        found = {}
        for p in primaries:
            c = clustered_mean(torch.from_numpy(shared + rng.normal(0, 0.3, 40)))
            found[p.name] = Measured(c.mean, c.p(), 0.3)
        false += any(d.outcome != "undecided" for d in decide(primaries, found).values())
        naive += any(m.p <= 0.05 for m in found.values())
    assert false / STUDIES <= at_most(0.05) < naive / STUDIES


def test_repeated_judgements_of_samples_on_one_drawing():
    """Success of attacks whose samples share drawings: by drawing nominal, by sample not."""
    rng = np.random.default_rng(17)
    clusters = torch.arange(40).repeat_interleave(5)
    declared = {"clusters": 0, "samples": 0}
    for _ in range(STUDIES):
        moved = np.repeat(rng.normal(0, 0.25, 40), 5)
        sides = [torch.from_numpy(rng.random((2, 200)) < (0.5 + sign * moved)) for sign in (0.5, -0.5)]
        units = sides[0].sum(0) - sides[1].sum(0)
        declared["clusters"] += (
            sign_flip_p(cluster_sums(units[:, None].double(), clusters)[:, 0].long()) <= 0.05
        )
        declared["samples"] += sign_flip_p(units) <= 0.05
    assert at_least(0.035) <= declared["clusters"] / STUDIES <= at_most(0.05)
    assert declared["samples"] / STUDIES > at_most(0.05)


def test_rates_have_the_power_computed():
    rng, n, rate = np.random.default_rng(19), 150, 0.3
    effect = detectable_rate(rate, n)
    one, other = (rng.binomial(n, r, STUDIES) / n for r in (rate, rate + effect))
    pooled = (one + other) / 2
    z = (other - one) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert at_least(0.78) <= (np.abs(z) > 1.95996).mean() <= at_most(0.82)


def test_a_measured_result_keeps_its_numbers():
    e = Estimate(0.1, 0.0, 0.2, 5)
    assert decide([Primary("x")], {"x": Measured(e, 0.2, 0.3)})["x"].to_json()["estimate"]["value"] == 0.1
