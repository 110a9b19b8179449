"""Orthogonal matching pursuit against a naive greedy loop; what its scales mean; errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import SparseCoder

import mmhooks as mm
from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch


def sample(n=6, d=24, t=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(t, d, generator=g) + 0.5


def greedy(target, atoms, k):
    """The atom with the largest inner product with what is left, then least squares on all chosen so far."""
    chosen, left = [], target
    for _ in range(k):
        chosen.append(int(np.abs(atoms @ left).argmax()))
        weights = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        left = target - weights @ atoms[chosen]
    return dict(zip(chosen, weights, strict=True))


@pytest.mark.parametrize("scale", ["texts", "coordinates"])
@pytest.mark.parametrize("k", [1, 5, 24])
def test_equals_a_greedy_loop_and_the_public_coder(scale, k):
    directions, texts = sample()
    code = mm.orthogonal_text_code(directions, texts, [str(i) for i in range(60)], n_texts=k, scale=scale)
    unit = texts.double().numpy() / np.linalg.norm(texts.double().numpy(), axis=1, keepdims=True)
    moved = unit - unit.mean(axis=0)
    atoms = moved / np.linalg.norm(moved, axis=1 if scale == "texts" else 0, keepdims=True)
    if scale == "texts":  # scikit-learn's coder takes atoms of unit length
        coder = SparseCoder(dictionary=atoms, transform_algorithm="omp", transform_n_nonzero_coefs=k)
        theirs = coder.transform(directions.double().numpy())
        assert np.allclose(code.codes.dense().numpy(), theirs, atol=1e-4)
    for i, row in enumerate(directions.double().numpy()):
        expected = greedy(row, atoms, k)
        got = {int(text): w for text, w in code.top(i, None)}
        assert got.keys() == expected.keys()
        assert all(got[j] == pytest.approx(w, abs=1e-3) for j, w in expected.items())
        rebuilt = sum(w * atoms[j] for j, w in expected.items())
        assert np.allclose(code.reconstruct()[i].numpy(), rebuilt, atol=1e-3)
        sizes = [abs(w) for _, w in code.top(i, None)]
        assert sizes == sorted(sizes, reverse=True)
    if k == 24:
        assert float(code.cosine.min()) > 0.999  # as many texts as dimensions
    assert [row["measure"] for row in code.table()] == ["cosine", "texts"]


def test_texts_on_both_sides_are_found(tmp_path):
    _, texts = sample(seed=1)
    names = [f"text {i}" for i in range(60)]
    unit = torch.nn.functional.normalize(texts, dim=1)
    atoms = torch.nn.functional.normalize(unit - unit.mean(0), dim=1)
    code = mm.orthogonal_text_code((2 * atoms[3] - atoms[8])[None], texts, names, n_texts=2)
    assert [text for text, _ in code.top(0)] == ["text 3", "text 8"]
    assert [w for _, w in code.top(0)] == pytest.approx([2, -1], abs=1e-3)
    assert "text 3" in code.save(tmp_path / "code.json").read_text()


def test_wrong_input_is_named():
    directions, texts = sample()
    names = [str(i) for i in range(60)]
    with pytest.raises(ShapeMismatch, match="n_texts: expected 1 to 24, .* got 25"):
        mm.orthogonal_text_code(directions, texts, names, n_texts=25)
    with pytest.raises(ShapeMismatch, match="for 2 texts"):
        mm.orthogonal_text_code(directions, texts, names[:2])
    with pytest.raises(MMHooksError, match='expected "texts" or "coordinates"'):
        mm.orthogonal_text_code(directions, texts, names, n_texts=2, scale="both")
    with pytest.raises(NotFinite):
        mm.orthogonal_text_code(directions / 0 * 0, texts, names, n_texts=2)
