"""Families of pairs: by column, by the names of drawings, and near-duplicates against a naive search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmhooks as mm
from mmhooks.data import families, near_duplicates
from mmhooks.data import families as families_of
from mmhooks.errors import DataError, NotFinite, OutOfRange


class Made:
    def __init__(self, meta):
        self.meta, self.texts, self.ids = (
            meta,
            [f"text {i}" for i in range(len(meta))],
            list("abcdef")[: len(meta)],
        )

    def __len__(self):
        return len(self.meta)


def test_a_column_names_the_families():
    pairs = Made([{"film": "x"}, {"film": "y"}, {"film": "x"}])
    assert families(pairs, "film").tolist() == [0, 1, 0]
    with pytest.raises(
        DataError, match=r"column 'actor' in every pair, got 3 of 3 without it \(first: 'a'\).*film"
    ):
        families(pairs, "actor")


def test_drawings_are_grouped_by_what_they_show():
    pairs = mm.data.pairs("mini")
    labels = families_of(pairs)
    of = dict(zip(pairs.texts, labels.tolist(), strict=True))
    assert of["man farmer dark skin tone"] == of["woman farmer"] != of["cooking"]
    assert len(labels.unique()) == 1724


def test_others_are_their_own_family_unless_vectors_are_given():
    pairs = Made([{}, {}, {}])
    assert families(pairs).tolist() == [0, 1, 2]
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    assert families(pairs, vectors=vectors).tolist() == [0, 0, 1]


@given(st.integers(0, 10_000), st.integers(0, 25), st.sampled_from([0.5, 0.9]))
@settings(deadline=None, max_examples=30)
def test_near_duplicates_are_the_connected_parts(seed, n, threshold):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(x, dim=1)
    near = (unit @ unit.T) >= threshold
    labels = list(range(n))
    for _ in range(n):  # naive: take over the smallest label of every neighbour until nothing moves
        labels = [min([labels[j] for j in range(n) if near[i, j]] + [labels[i]]) for i in range(n)]
    found = near_duplicates(x, threshold).tolist()
    assert [[a == b for b in labels] for a in labels] == [[a == b for b in found] for a in found]


def test_blocks_do_not_matter(monkeypatch):
    from mmhooks.data import families as module_function  # the package exports the function of this name

    module = __import__(module_function.__module__, fromlist=["BLOCK"])
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole = near_duplicates(x, 0.8)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert torch.equal(near_duplicates(x, 0.8), whole)


def test_bad_vectors_are_refused():
    with pytest.raises(NotFinite, match="expected finite vectors"):
        near_duplicates(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(OutOfRange, match="between 0 and 1, got 1.5"):
        near_duplicates(torch.eye(2), 1.5)
