"""Sparse text codes against scikit-learn's Lasso; certified gaps; errors."""

from __future__ import annotations

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from sklearn.linear_model import Lasso

import mmhooks as mm
from mmhooks.analysis.decomposition.lasso import nonnegative_lasso
from mmhooks.analysis.decomposition.sparse_text_code import centred
from mmhooks.errors import DataError, MMHooksError, NotFinite, ShapeMismatch, WrongOrigin


def sample(n, d, t, seed):
    g = torch.Generator().manual_seed(seed)
    texts = torch.randn(t, d, generator=g)
    picks = torch.rand(n, t, generator=g).topk(3, dim=1).indices
    return texts[picks].sum(1) + 0.5 * torch.randn(n, d, generator=g), texts


def objective(w, z, dictionary, penalty):
    return 0.5 * np.square(w @ dictionary - z).sum(-1) + penalty * w.sum(-1)


def dense(solved, t):
    return torch.zeros(len(solved.values), t).scatter_add(1, solved.indices, solved.values).numpy()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.floats(0.02, 0.5), t=st.integers(3, 150))
def test_equals_scikit_learn(seed, penalty, t):
    image, text = sample(6, 24, t, seed)
    z, dictionary = centred(image), centred(text)
    found = nonnegative_lasso(z, dictionary, penalty)
    ours = dense(found, t)
    # scikit-learn divides the squares by the number of "samples", here the width.
    witness = Lasso(alpha=penalty / 24, positive=True, fit_intercept=False, tol=1e-10, max_iter=100_000)
    theirs = np.stack([witness.fit(dictionary.double().numpy().T, row).coef_ for row in z.double().numpy()])
    a, b = (objective(w, z.double().numpy(), dictionary.double().numpy(), penalty) for w in (ours, theirs))
    assert np.abs(a - b).max() < 2e-6 and float(found.gap.max()) <= 1e-6
    assert np.abs(ours @ dictionary.numpy() - theirs @ dictionary.numpy()).max() < 5e-3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.floats(0.003, 0.02), spread=st.floats(0.05, 1.0))
def test_small_penalties_over_nearly_dependent_texts(seed, penalty, spread):
    """More texts than dimensions, in clusters, some of them twice: the gap is certified and scikit-learn agrees."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 24, generator=g)
    texts = centres[torch.randint(12, (90,), generator=g)] + spread * torch.randn(90, 24, generator=g)
    z, dictionary = centred(torch.randn(5, 24, generator=g)), centred(torch.cat([texts, texts[:10]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is unsettled
        found = nonnegative_lasso(z, dictionary, penalty)
    assert float(found.gap.max()) <= 1e-6
    d = dictionary.double().numpy()
    witness = Lasso(alpha=penalty / 24, positive=True, fit_intercept=False, tol=1e-5, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its coordinate descent may not get there: ours is at least as good
        theirs = np.stack([witness.fit(d.T, row).coef_ for row in z.double().numpy()])
    a, b = (objective(w, z.double().numpy(), d, penalty) for w in (dense(found, 100), theirs))
    assert (a - b).max() < 2e-6


def test_a_row_that_does_not_converge_is_reported_and_none_is_lost(monkeypatch):
    image, text = sample(20, 24, 150, 5)
    names = [str(i) for i in range(150)]
    settled = mm.sparse_text_code(image, text, names, penalty=0.02)
    assert bool(settled.settled.all())
    monkeypatch.setattr("mmhooks.analysis.decomposition.lasso._ROUNDS", 1)
    with pytest.warns(
        UserWarning, match=r"\d+ of 20 sparse codes did not converge: worst duality gap .*tolerance 1e-06"
    ):
        code = mm.sparse_text_code(image, text, names, penalty=0.02)
    assert int((~code.settled).sum()) > 0 and len(code.cosine) == 20 and float(code.cosine.min()) > 0.5
    assert code.to_json()["unsettled"] == (code.gap > 1e-6).nonzero().flatten().tolist()
    for i in code.settled.nonzero().flatten().tolist():
        assert code.top(i) == settled.top(i)


def test_zero_rows_and_one_row():
    z, dictionary = (centred(x) for x in sample(3, 16, 30, 0))
    assert nonnegative_lasso(z[:0], dictionary, 0.2).values.shape == (0, 1)
    together, alone = nonnegative_lasso(z, dictionary, 0.01), nonnegative_lasso(z[1:2], dictionary, 0.01)
    assert torch.allclose(torch.from_numpy(dense(together, 30))[1], torch.from_numpy(dense(alone, 30))[0])


def test_code_of_embeddings_made_of_texts():
    g = torch.Generator().manual_seed(0)
    texts = torch.randn(300, 64, generator=g)
    picks = torch.rand(40, 300, generator=g).topk(3, dim=1).indices
    code = mm.sparse_text_code(
        texts[picks].sum(1),
        texts,
        [str(i) for i in range(300)],
        mean=torch.zeros(64),
        text_mean=torch.zeros(64),
    )
    top = [{int(t) for t, _ in code.top(i, 3)} for i in range(40)]
    assert sum(a == set(b.tolist()) for a, b in zip(top, picks, strict=True)) >= 38
    assert float(code.cosine.min()) > 0.8 and float(code.l0.mean()) < 10
    rebuilt = torch.nn.functional.cosine_similarity(
        code.reconstruct(), centred(texts[picks].sum(1), torch.zeros(64))
    )
    assert torch.allclose(rebuilt, code.cosine, atol=1e-5)
    group = code.top_of([3, 3, 3], 3)
    assert [t for t, _ in group] == [t for t, _ in code.top(3, 3)]
    assert [row["measure"] for row in code.table()] == ["cosine", "L0"]


def test_a_larger_penalty_uses_fewer_texts_and_a_full_one_none():
    image, text = sample(30, 32, 200, 1)
    names = [str(i) for i in range(200)]
    l0 = [float(mm.sparse_text_code(image, text, names, penalty=p).l0.mean()) for p in (0.05, 0.2, 0.4)]
    assert l0[0] > l0[1] > l0[2] > 0
    none = mm.sparse_text_code(image, text, names, penalty=1.0)
    assert float(none.l0.max()) == 0 and none.top(0) == []


def test_result_as_a_file(tmp_path):
    import json

    image, text = sample(5, 16, 30, 2)
    code = mm.sparse_text_code(image, text, [f"text {i}" for i in range(30)])
    content = json.loads(code.save(tmp_path / "code.json").read_text())
    assert content["texts"][0][0][0] == code.top(0)[0][0] and len(content["cosine"]) == 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_embeddings": torch.randn(5, 7)}, ShapeMismatch, r"widths \[4, 7\]"),
        ({"texts": ["one"]}, ShapeMismatch, "for 1 texts"),
        ({"penalty": 0.0}, ShapeMismatch, "penalty: expected a number above 0"),
        ({"embeddings": torch.randn(1, 4)}, ShapeMismatch, "give mean="),
        ({"embeddings": torch.full((3, 4), torch.nan)}, NotFinite, "embeddings"),
        (
            {"mean": torch.full((4,), 9.0)},
            WrongOrigin,
            r"mean=: expected the mean of unit embeddings, got a norm of 18",
        ),
        ({"text_mean": torch.full((4,), 9.0)}, WrongOrigin, "text_mean=: expected the mean of unit"),
        ({"mean": torch.full((4,), torch.inf)}, NotFinite, "mean="),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "embeddings": torch.randn(9, 4),
        "text_embeddings": torch.randn(5, 4),
        "texts": list("abcde"),
    }
    with pytest.raises(error, match=message):
        mm.sparse_text_code(**{**arguments, **change})


def test_float32_certifies_no_smaller_gap():
    z, dictionary = (centred(x) for x in sample(4, 16, 30, 3))
    with pytest.raises(MMHooksError, match="no gap below 1e-6"):
        nonnegative_lasso(z, dictionary, 0.2, tolerance=1e-8)
    assert float(nonnegative_lasso(z.double(), dictionary.double(), 0.2, tolerance=1e-10).gap.max()) <= 1e-10


def splice_admm(dictionary, z, l1_penalty, rho=5.0, rounds=20_000):
    """SpLiCE's ``admm.py``, written naively: ‖wC - z‖² + l1 · Σw, w >= 0; one row."""
    c = dictionary @ dictionary.T
    factor = np.linalg.inv(2 * c + rho * np.eye(len(c)))
    w, u = np.zeros(len(c)), np.zeros(len(c))
    for _ in range(rounds):
        x = factor @ (2 * dictionary @ z + rho * (w - u))
        old, w = w, np.maximum(x + u - l1_penalty / rho, 0)
        u = u + x - w
        if np.linalg.norm(x - w) < 1e-9 and rho * np.linalg.norm(w - old) < 1e-9:
            break
    return w


@pytest.mark.parametrize("l1_penalty", [0.05, 0.3])
def test_the_penalty_in_splices_own_scale(l1_penalty):
    image, text = sample(4, 24, 60, 7)
    code = mm.sparse_text_code(image, text, [str(i) for i in range(60)], l1_penalty=l1_penalty)
    assert code.penalty == pytest.approx(l1_penalty / 2)
    z, dictionary = centred(image).double().numpy(), centred(text).double().numpy()
    ours = code.codes.dense().double().numpy()
    lasso = Lasso(
        alpha=l1_penalty / (2 * 24), fit_intercept=False, positive=True, max_iter=100_000, tol=1e-10
    )
    for i, row in enumerate(z):
        for theirs in (splice_admm(dictionary, row, l1_penalty), lasso.fit(dictionary.T, row).coef_):
            assert np.abs(ours[i] @ dictionary - theirs @ dictionary).max() < 5e-3
            gap = objective(ours[i], row, dictionary, l1_penalty / 2) - objective(
                theirs, row, dictionary, l1_penalty / 2
            )
            assert abs(gap) < 2e-6
    with pytest.raises(ShapeMismatch, match="one of them, got both"):
        mm.sparse_text_code(image, text, list(map(str, range(60))), penalty=0.1, l1_penalty=0.2)
    with pytest.raises(ShapeMismatch, match="penalty: expected a number above 0"):
        mm.sparse_text_code(image, text, list(map(str, range(60))), l1_penalty=-0.2)


def test_recomposed_embeddings_are_splices():
    """``SPLICE.encode_image`` and ``intervene_image`` by hand, row by row."""
    image, text = sample(12, 24, 60, 3)
    image = image + 2  # far from the origin, as embeddings of a modality are
    names = [f"t{i}" for i in range(60)]
    code = mm.sparse_text_code(image, text, names, penalty=0.1)
    unit = image / image.norm(dim=1, keepdim=True)
    mean, dictionary, weights = unit.mean(0), centred(text), code.codes.dense()
    gone = [code.top(0)[0][0], code.top(5)[0][0]]

    def by_hand(weights):
        rows = []
        for row in weights:
            rebuilt = sum(w * dictionary[j] for j, w in enumerate(row.tolist()))
            rebuilt = rebuilt / rebuilt.norm() + mean
            rows.append(rebuilt / rebuilt.norm())
        return torch.stack(rows)

    torch.testing.assert_close(code.recompose(), by_hand(weights), atol=1e-5, rtol=1e-4)
    similar = torch.cosine_similarity(code.recompose(), unit)
    assert float(similar.min()) > float((unit @ mean / mean.norm()).max())  # closer than the mean alone
    less = weights.clone()
    less[:, [names.index(name) for name in gone]] = 0
    expected = by_hand(less)
    torch.testing.assert_close(code.intervene(gone), expected, atol=1e-5, rtol=1e-4)
    places = [names.index(name) for name in gone]
    mask = torch.zeros(60, dtype=torch.bool)
    mask[places] = True
    for same in (places, mask, torch.tensor(places)):
        assert torch.equal(code.intervene(same), code.intervene(gone))
    everything = code.intervene(names)
    torch.testing.assert_close(everything, (mean / mean.norm()).expand(12, -1))
    given = mm.sparse_text_code(image[:1], text, names, mean=mean, penalty=0.1)
    torch.testing.assert_close(given.recompose(), code.recompose()[:1], atol=1e-5, rtol=1e-4)


def test_an_intervention_that_does_nothing_is_refused():
    image, text = sample(5, 24, 60, 3)
    names = [f"t{i}" for i in range(60)]
    code = mm.sparse_text_code(image, text, names, penalty=0.3)
    unused = next(i for i in range(60) if not bool((code.codes.dense()[:, i] > 0).any()))
    for nothing in ([names[unused]], [unused], []):
        with pytest.raises(DataError, match="intervene: expected concepts that an embedding is written in"):
            code.intervene(nothing)
    with pytest.raises(DataError, match=r"texts of the pool, got \['water'\]"):
        code.intervene(["water", code.top(0)[0][0]])
    with pytest.raises(ShapeMismatch):
        code.intervene([60])


def test_vocabulary_of_splices_code(tmp_path):
    path = tmp_path / "laion.txt"
    path.write_text("rare, 3\n#hashtag\n't\nred dog, 90\ncat, 100\ncat, 100\n\nthe, 900\n")
    pool = mm.data.splice_vocabulary(path)
    assert pool.texts == ("rare", "#hashtag", "'t", "red dog", "cat", "the")
    assert pool.name == "laion.txt" and pool.kinds is None
    assert mm.data.splice_vocabulary(path, size=3).texts == (
        "cat",
        "the",
    )  # of the last lines, as its load takes
    with pytest.raises(DataError, match="at least 1 concept"):
        mm.data.splice_vocabulary(path, size=0)
    with pytest.raises(DataError, match="no vocabulary"):
        mm.data.splice_vocabulary(tmp_path / "no.txt")
