"""Groups that always have members: mu ± sigma where it parts, else ranks, against sorting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmhooks as mm
from mmhooks.analysis.measures.groups import BY_RANK, BY_SIGMA, groups_of
from mmhooks.errors import MMHooksError

NAMES = ("ImgD", "TextD", "CrossD")


def scored(shares: list[float | None]) -> mm.analysis.mds.MDSResult:
    """A feature of each share of pictures; None is a dead one."""
    image = torch.tensor([[0.0 if s is None else 100 * s for s in shares]], dtype=torch.float64)
    text = torch.tensor([[0.0 if s is None else 100 * (1 - s) for s in shares]], dtype=torch.float64)
    return mm.mds(image, text, head="h", data="d")


@given(st.lists(st.one_of(st.none(), st.integers(1, 49).map(lambda n: n / 50)), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_parts_are_whole_ordered_and_by_the_rule_that_is_told(shares: list[float | None]) -> None:
    result = scored(shares)
    live = sorted((s, i) for i, s in enumerate(shares) if s is not None)
    sixth = len(live) // 6
    by_sigma = all(len(g) for g in result.groups)
    apart = sixth and live[-sixth][0] > live[sixth - 1][0]
    if not by_sigma and not apart:
        with pytest.raises(MMHooksError, match="too few" if not sixth else "do not part"):
            groups_of(result)
        return
    groups, rule = groups_of(result)
    assert tuple(groups) == NAMES and all(len(g) for g in groups.values())
    found = [i for g in groups.values() for i in g]
    assert sorted(found) == sorted(i for _, i in live)  # each live feature in one group, no dead one
    if by_sigma:
        assert rule == BY_SIGMA and tuple(groups.values()) == result.groups
        return
    assert rule == BY_RANK
    assert set(groups["TextD"]) == {i for _, i in live[:sixth]}
    assert set(groups["ImgD"]) == {i for _, i in live[-sixth:]}
    assert {g.name for g in groups.values()} == set(NAMES) and {g.head for g in groups.values()} == {"h"}
    assert groups["TextD"].info["rule"] == rule and groups["TextD"].info["lowest"] == live[sixth - 1][0]


def test_a_skewed_head_has_all_three() -> None:
    result = scored([0.02] * 45 + [0.95] * 15 + [None] * 4)
    assert not len(result.groups[1])
    groups, rule = groups_of(result)
    assert rule == BY_RANK and [len(groups[n]) for n in NAMES] == [10, 10, 40]
    assert result.R[groups["TextD"].indices].max() < 0.1 < 0.9 < result.R[groups["ImgD"].indices].min()
