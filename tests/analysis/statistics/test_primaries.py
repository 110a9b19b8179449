"""Holm's correction and the verdicts, against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.primaries import (
    Measured,
    Primary,
    decide,
    holm,
    outcome_of,
    power_text,
    verdict_text,
)
from mmhooks.errors import MMHooksError, ShapeMismatch


def rejected_by_holm(p: list[float], alpha: float) -> set[int]:
    """Steps down as Holm (1979) wrote it: the smallest against alpha/n, the next against alpha/(n-1), until one fails."""
    rejected: set[int] = set()
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] > alpha / (len(p) - step):
            break
        rejected.add(i)
    return rejected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.3]))
def test_holm_rejects_what_stepping_down_rejects(p, alpha):
    adjusted = holm(torch.tensor(p, dtype=torch.float64)).tolist()
    assert {i for i, q in enumerate(adjusted) if q <= alpha * (1 + 1e-12)} >= rejected_by_holm(p, alpha)
    assert {i for i, q in enumerate(adjusted) if q <= alpha * (1 - 1e-12)} <= rejected_by_holm(p, alpha)


def test_what_could_not_be_tested_still_counts_as_chosen():
    adjusted = holm(torch.tensor([0.01, math.nan])).tolist()
    assert adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1])
    assert holm(torch.empty(0)).tolist() == []


def test_only_what_was_named_is_decided():
    primaries = [Primary("a", "greater"), Primary("b")]
    one = Measured(Estimate(0.2, 0.1, 0.3, 9), 0.03, 0.1)
    assert decide(primaries, {"a": one, "b": one})["a"].outcome == "undecided"  # .03 becomes .06
    assert decide(primaries[:1], {"a": one})["a"].outcome == "shown"
    for found in ({"a": one}, {"a": one, "b": one, "c": one}):
        with pytest.raises(MMHooksError, match="exploratory"):
            decide(primaries, found)
    with pytest.raises(MMHooksError, match="expected one measurement"):
        decide([primaries[0], primaries[0]], {"a": one})


@pytest.mark.parametrize(
    ("primary", "value", "p", "outcome"),
    [
        (Primary("x", "greater"), 0.2, 0.01, "shown"),
        (Primary("x", "less"), 0.2, 0.01, "opposite"),
        (Primary("x", "less"), 0.2, 0.05, "undecided"),
        (Primary("x"), -0.2, 0.01, "shown"),
        (Primary("x", "less", margin=0.1), 0.02, 0.01, "shown"),
        (Primary("x", margin=0.1), 0.02, 0.2, "undecided"),
        (Primary("x"), 0.2, math.nan, "undecided"),
    ],
)
def test_outcomes(primary, value, p, outcome):
    assert outcome_of(primary, Estimate(value, value - 0.1, value + 0.1), p) == outcome


def test_every_undecided_verdict_has_its_power_line():
    weak = decide([Primary("x")], {"x": Measured(Estimate(0.012, -0.03, 0.054, 30), 0.4, 0.061)})["x"]
    assert verdict_text(weak, digits=1, scale=100.0, unit=" points") == (
        "undecided: +1.2 [-3.0, +5.4] points, p 0.400 (Holm); 80 % power from 6.1 points"
    )
    keeps = Primary("keeps", "less", margin=0.05)
    held = decide([keeps], {"keeps": Measured(Estimate(0.01, -0.02, 0.04, 30), 0.01, 0.06)})["keeps"]
    assert verdict_text(held, digits=2).startswith("shown to stay by less than 0.05: +0.01")
    lost = decide([keeps], {"keeps": Measured(Estimate(0.04, -0.02, 0.1, 30), 0.3, 0.06)})["keeps"]
    assert verdict_text(lost, digits=2).endswith("p 0.300 (Holm); 80 % power for a margin of 0.06")
    assert power_text(math.inf) == "too few samples to decide at all"


def test_primaries_are_checked_where_they_are_named():
    with pytest.raises(ShapeMismatch, match="positive margin"):
        Primary("x", margin=-0.1)
    with pytest.raises((MMHooksError, TypeError), match="alternative"):
        Primary("x", "up")  # type: ignore[arg-type]
