"""The embedded corpus, built from the installed packages."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

import mmhooks as mm
from mmhooks.data.sources import openmoji as source
from mmhooks.data.splits import split_of
from mmhooks.errors import DataError, MissingWeights
from mmhooks.utils.files import atomic_path, cache_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, folder):
    monkeypatch.setenv("MMHOOKS_CACHE", str(folder))


@pytest.fixture(scope="module")
def corpus(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMHOOKS_CACHE", str(folder))
        return mm.data.pairs("mini", progress=False)


def test_every_named_drawing_is_there_once(corpus):
    assert len(corpus) > 3_900
    assert len(set(corpus.ids)) == len(corpus) and all(text.strip() for text in corpus.texts)
    for name in ("cat", "red apple", "keycap 3"):
        assert corpus.texts.count(name) == 1
    assert "CC BY-SA" in corpus.licence and "OpenMoji" in corpus.attribution


def test_pictures_are_the_packages_drawings_on_white(corpus):
    from resvg_py import svg_to_bytes

    i = corpus.texts.index("cat")
    pair = corpus[i]
    assert pair.image.mode == "RGB" and pair.image.size == (64, 64) and pair.id == "openmoji/1f408"
    rgba = corpus.rgba(i)
    assert rgba.mode == "RGBA" and rgba.getextrema()[3] == (0, 255)
    file = source._folder() / "1F408.svg"
    white = svg_to_bytes(svg_path=str(file), width=64, height=64, background="#ffffff")
    import io

    expected = np.asarray(Image.open(io.BytesIO(bytes(white))).convert("RGB")).astype(int)
    assert np.abs(np.asarray(pair.image).astype(int) - expected).max() <= 2


def test_splits_are_those_of_the_hash_and_cover_everything(corpus):
    parts = [corpus.split(s) for s in ("train", "heldout_pictures", "heldout_concepts")]
    assert sum(len(p) for p in parts) == len(corpus)
    assert len(parts[1]) > 150 and len(parts[2]) > 250
    for part, name in zip(parts, ("train", "heldout_pictures", "heldout_concepts"), strict=True):
        assert all(split_of("openmoji", text) == name for text in part.texts)
    assert mm.data.pairs("mini", split="heldout_concepts").ids == parts[2].ids
    with pytest.raises(DataError, match=r"no pair in split 'test'.*train \(\d+\)"):
        corpus.split("test")


def test_fingerprint_is_of_the_content(corpus):
    again = mm.data.pairs("mini")
    assert again.fingerprint == corpus.fingerprint and again.ids == corpus.ids
    assert corpus[:10].fingerprint != corpus[:11].fingerprint
    assert corpus[:10].fingerprint == corpus.select(range(10)).fingerprint
    assert corpus[:10].fingerprint != corpus.select(range(9, -1, -1)).fingerprint


def test_limit_is_a_fixed_choice(corpus):
    some = mm.data.pairs("mini", limit=20, seed=3)
    assert len(some) == 20 and some.ids == mm.data.pairs("mini", limit=20, seed=3).ids
    assert some.ids != mm.data.pairs("mini", limit=20, seed=4).ids
    assert sorted(corpus.ids.index(i) for i in some.ids) == [corpus.ids.index(i) for i in some.ids]
    with pytest.raises(DataError, match="at least 1, got 0"):
        mm.data.pairs("mini", limit=0)


def test_workers_can_have_a_copy(corpus):
    corpus.image(3)  # the file is open here
    copy = pickle.loads(pickle.dumps(corpus[:8]))
    assert copy.ids == corpus.ids[:8] and copy.image(3).tobytes() == corpus.image(3).tobytes()
    assert [p.size for p in copy.images()[2:4]] == [(64, 64)] * 2 and len(list(copy)) == 8


def test_a_build_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "_rasterise", lambda file, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mm.data.pairs("mini", progress=False)
    with pytest.raises(RuntimeError), atomic_path(cache_dir("pairs") / "x") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert list((tmp_path / "pairs").iterdir()) == []


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda module: None if module == "resvg_py" else object())
    with pytest.raises(MissingWeights, match=r"pip install resvg-py$"):
        mm.data.pairs("mini")
