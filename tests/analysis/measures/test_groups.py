"""Groups that are never empty: by mu ± sigma where possible, else by rank, against a sort."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.measures.groups import BY_RANK, BY_SIGMA, groups_of
from mmhooks.errors import MMHooksError

NAMES = ("ImgD", "TextD", "CrossD")


def scored(shares: list[float | None]) -> mm.analysis.mds.MDSResult:
    """Makes one feature per image share; None is a dead one."""
    image = torch.tensor([[0.0 if s is None else 100 * s for s in shares]], dtype=torch.float64)
    text = torch.tensor([[0.0 if s is None else 100 * (1 - s) for s in shares]], dtype=torch.float64)
    return mm.mds(image, text, head="h", data="d")


@given(st.lists(st.one_of(st.none(), st.integers(1, 49).map(lambda n: n / 50)), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_groups_are_complete_ordered_and_follow_the_returned_rule(shares: list[float | None]) -> None:
    result = scored(shares)
    live = sorted((s, i) for i, s in enumerate(shares) if s is not None)
    sixth = len(live) // 6
    by_sigma = all(len(g) for g in result.groups)
    apart = sixth and live[-sixth][0] > live[sixth - 1][0]
    if not by_sigma and not apart:
        with pytest.raises(
            MMHooksError, match="at least 6 alive features" if not sixth else "scores that differ"
        ):
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


def test_a_skewed_head_has_all_three_groups() -> None:
    result = scored([0.02] * 45 + [0.95] * 15 + [None] * 4)
    assert not len(result.groups[1])
    groups, rule = groups_of(result)
    assert rule == BY_RANK and [len(groups[n]) for n in NAMES] == [10, 10, 40]
    assert result.R[groups["TextD"].indices].max() < 0.1 < 0.9 < result.R[groups["ImgD"].indices].min()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.index_fill(0, torch.tensor([3]), math.nan), "1 of 60 alive .* feature 3"),
        (lambda r: r.index_fill(0, torch.tensor([3]), math.inf), "1 of 60 alive .* feature 3"),
        (lambda r: r[:-1], "each of 64 features, got 63"),
        (lambda r: r[:0], "each of 64 features, got 0"),
        (lambda r: r[None], "expected 1 dimensions"),
        (lambda r: r > 0, "floating-point numbers, got torch.bool"),
        (lambda r: r.tolist(), "expected a tensor, got a list"),
    ],
    ids=["NaN", "infinity", "other width", "empty", "two dimensions", "bools", "a list"],
)
def test_damaged_scores_are_refused(change, message) -> None:
    result = unchecked(scored([0.02] * 45 + [0.95] * 15 + [None] * 4), change)
    with pytest.raises(MMHooksError, match=message):
        groups_of(result)


@pytest.mark.parametrize(
    "change",
    [lambda r: r.half(), lambda r: r.clone().requires_grad_(), lambda r: torch.stack([r, r], 1)[:, 0]],
    ids=["half", "requires grad", "strided"],
)
def test_scores_of_another_dtype_or_layout_give_the_same_groups(change) -> None:
    result = scored([0.02] * 45 + [0.95] * 15 + [None] * 4)
    groups, _ = groups_of(unchecked(result, change))
    assert {k: list(g) for k, g in groups.items()} == {k: list(g) for k, g in groups_of(result)[0].items()}


def test_only_the_result_of_mds_has_groups() -> None:
    with pytest.raises((MMHooksError, TypeCheckError), match="got a Tensor|Type-check error"):
        groups_of(torch.rand(12))  # type: ignore[arg-type]


def unchecked(
    result: mm.analysis.mds.MDSResult, change: Callable[[Tensor], Any]
) -> mm.analysis.mds.MDSResult:
    """The result with other scores, past the type checks of the tests, which users do not have."""
    copied = copy.copy(result)
    object.__setattr__(copied, "R", change(result.R))
    return copied
