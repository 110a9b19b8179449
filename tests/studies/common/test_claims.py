"""Comparison with the paper: differences, magnitudes, and verdicts that follow the interval."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmhooks.report import Estimate
from mmhooks.studies.common.claims import agreement, difference, magnitude

numbers = st.floats(-5, 5, allow_nan=False)
widths = st.floats(0.001, 2)


@given(numbers, widths, numbers, widths)
def test_difference_against_the_normal_formula(a: float, wa: float, b: float, wb: float) -> None:
    d = difference(Estimate(a, a - wa, a + wa, 9), Estimate(b, b - wb, b + wb, 4))
    assert d.value == pytest.approx(a - b) and d.n == 4
    assert d.high - d.value == pytest.approx(math.sqrt(wa**2 + wb**2), abs=1e-9)


@given(numbers, widths)
def test_size_contains_the_absolute_value(a: float, w: float) -> None:
    s = magnitude(Estimate(a, a - w, a + w, 3))
    assert s.value == abs(a) and 0 <= s.low <= s.value <= s.high


@given(numbers, widths, st.floats(0.01, 1))
def test_agreement_mirrors(a: float, w: float, p: float) -> None:
    e, mirrored = Estimate(a, a - w, a + w), Estimate(-a, -a - w, -a + w)
    assert agreement(e, p) == agreement(mirrored, -p)
    swapped = {"same": "differs", "differs": "same", "open": "open"}
    assert agreement(e, -p) == swapped[agreement(e, p)]
