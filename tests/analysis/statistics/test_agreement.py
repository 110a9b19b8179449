"""Krippendorff's alpha against his worked example and a naive count of pairs."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from mmhooks.analysis.statistics.agreement import krippendorff_alpha
from mmhooks.errors import ShapeMismatch

# Krippendorff 2011, section C: four observers, twelve units, missing data; 0 stands for none.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def naive(labels: list[list[int]]) -> float:
    """Disagreeing pairs within items, each item's pairs weighing as its labels, over those of all labels."""
    items = [[x for x in item if x >= 0] for item in labels]
    items = [item for item in items if len(item) > 1]
    values = [x for item in items for x in item]
    observed = sum(sum(a != b for a, b in permutations(item, 2)) / (len(item) - 1) for item in items) / len(
        values
    )
    expected = sum(a != b for a, b in permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


def test_the_published_example() -> None:
    found = krippendorff_alpha(torch.tensor(PUBLISHED).T - 1)
    assert found.value == pytest.approx(0.743, abs=5e-4) and found.n == 11
    assert found.low < found.value < found.high


@pytest.mark.parametrize("seed", range(4))
def test_a_naive_count_of_pairs(seed: int) -> None:
    labels = torch.randint(-1, 4, (15, 5), generator=torch.Generator().manual_seed(seed))
    assert krippendorff_alpha(labels).value == pytest.approx(naive(labels.tolist()))


def test_chance_agreement_and_nothing_to_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    guesses = krippendorff_alpha(torch.randint(0, 5, (200, 6), generator=generator))
    assert guesses.low < 0 < guesses.high and abs(guesses.value) < 0.03
    equal = torch.randint(0, 5, (20, 1), generator=generator).expand(20, 6)
    assert krippendorff_alpha(equal).value == 1
    assert math.isnan(krippendorff_alpha(torch.zeros(5, 3, dtype=torch.long)).value)
    assert krippendorff_alpha(torch.full((5, 3), -1)).n == 0
    one = krippendorff_alpha(torch.tensor([[0, 1, 1]]))
    assert one.n == 1 and not one.has_interval
    with pytest.raises(ShapeMismatch, match="got -2"):
        krippendorff_alpha(torch.tensor([[-2, 1]]))


def test_intervals_cover() -> None:
    """Over samples of items from one population, whose alpha many items tell."""

    def sample(n: int, seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        truth = torch.randint(0, 5, (n, 1), generator=g)
        return torch.where(
            torch.rand(n, 4, generator=g) < 0.6, truth, torch.randint(0, 5, (n, 4), generator=g)
        )

    target = krippendorff_alpha(sample(20_000, 0), draws=10).value
    covered = [
        (e := krippendorff_alpha(sample(40, i), draws=300)).low <= target <= e.high for i in range(1, 151)
    ]
    assert 0.87 <= sum(covered) / len(covered) <= 0.99
