"""Several captions of an image: which become texts, the families they are, and images without texts."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch

import mmhooks as mm
from data.tiny import encoded, tiny_clip
from mmhooks.data import families
from mmhooks.data.sources.caption_choice import check_choice, chosen_texts
from mmhooks.errors import DataError, MMHooksError

CAPTIONS = [["a cat", "a grey cat", "an animal"], ["a dog"], ["a cup", "a white cup"]]
EVERY = [text for texts in CAPTIONS for text in texts]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def source(tmp_path):
    """A tar whose captions lie in JSON files, as lists."""
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for i, texts in enumerate(CAPTIONS):
            for name, data in ((f"{i}.png", encoded(i)), (f"{i}.json", json.dumps({"c": texts}).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def read(source, captions, **options):
    return mm.data.pairs(source, text_column="json.c", captions=captions, progress=False, **options)


def test_the_first_caption_is_the_default(source):
    pairs = mm.data.pairs(source, text_column="json.c", progress=False)
    assert pairs.texts == ["a cat", "a dog", "a cup"] and pairs.ids == ["s/0", "s/1", "s/2"]
    assert [meta["captions"] for meta in pairs.meta] == CAPTIONS


def test_every_caption_is_a_pair_and_those_of_one_image_a_family(source):
    pairs = read(source, "all")
    assert pairs.texts == EVERY
    assert pairs.ids == ["s/0#0", "s/0#1", "s/0#2", "s/1#0", "s/2#0", "s/2#1"]
    assert pairs.image_numbers == families(pairs).tolist() == [0, 0, 0, 1, 2, 2]
    assert pairs.image(1).tobytes() == pairs.image(0).tobytes() != pairs.image(3).tobytes()
    # A limit counts images, so that families stay whole; captions of one image are in one split, as the first one is.
    assert read(source, "all", limit=1).texts == CAPTIONS[0]
    by_first = mm.data.pairs(source, text_column="json.c", progress=False).splits
    assert pairs.splits == [by_first[number] for number in pairs.image_numbers]


def test_retrieval_counts_every_caption(source):
    pairs = read(source, "all")
    images = torch.eye(3)[torch.tensor(pairs.image_numbers)]
    texts = images.clone()
    texts[0] = -texts[0]  # one wrong caption of three
    found = mm.retrieval(images, texts, ks=(1,), images=torch.tensor(pairs.image_numbers))
    assert found.image_to_text[1].value == 1 and found.text_to_image[1].value == pytest.approx(5 / 6)


def test_a_random_caption_depends_on_seed_and_id_alone(source):
    drawn = {seed: read(source, "random", seed=seed).texts for seed in range(20)}
    assert read(source, "random", seed=3).texts == drawn[3]
    assert {texts[0] for texts in drawn.values()} == set(CAPTIONS[0])
    assert read(source, "random", seed=3, limit=1).texts == drawn[3][:1]
    assert all(text in texts for found in drawn.values() for text, texts in zip(found, CAPTIONS, strict=True))
    counts = [0, 0, 0]
    for i in range(3000):
        ((_, text),) = chosen_texts(f"id {i}", ["0", "1", "2"], "random", 7)
        counts[int(text)] += 1
    assert min(counts) > 900  # 1000 expected, with a standard deviation of 26


@pytest.mark.parametrize("captions", ["first", "all", "random", "none"])
def test_a_stream_reads_the_same(source, captions):
    pairs = read(source, captions, seed=5)
    stream = mm.data.pair_stream(source, text_column="json.c", captions=captions, seed=5)
    found = list(stream)
    assert [pair.id for pair in found] == pairs.ids
    assert [pair.text for pair in found] == (pairs.texts if captions != "none" else [""] * 3)
    assert [row.id for row in stream.raw(skip=2)] == pairs.ids[2:]
    of_both = [row.text for rank in (0, 1) for row in stream.raw(rank=rank, world=2)]
    assert sorted(of_both) == sorted(pair.text for pair in found)
    other = mm.data.pair_stream(source, text_column="json.c", captions=captions, seed=6)
    assert (other.fingerprint == stream.fingerprint) == (captions == "first")


def test_images_alone(source, tmp_path):
    pairs = mm.data.pairs(source, captions="none", progress=False)
    assert not pairs.has_texts and len(pairs) == 3 and pairs[0].text == ""
    assert len(pairs[1:].split(pairs[1:].splits[0])) >= 1
    with pytest.raises(DataError, match="expected pairs with texts, got 3 images without"):
        _ = pairs.texts
    model = tiny_clip()
    store = mm.extract(model, pairs, ["image.embed"], out=tmp_path / "images", progress=False)
    both = mm.extract(model, read(source, "first"), ["image.embed"], out=tmp_path / "both", progress=False)
    assert torch.equal(store["image.embed"][:], both["image.embed"][:])
    for given in (pairs, mm.data.pair_stream(source, captions="none")):
        with pytest.raises(
            MMHooksError, match="expected pairs with texts for sites of the text tower.*got images"
        ):
            mm.extract(model, given, ["text.embed"], out=tmp_path / "texts", progress=False)
    assert not (tmp_path / "texts").exists()


def test_a_model_that_reads_both_needs_texts(source, tmp_path):
    pairs = mm.data.pairs(source, captions="none", progress=False)
    with pytest.raises(MMHooksError, match="a model that reads both together, got images without"):
        mm.extract(
            mm.load("mini-vlm"), pairs, ["image.blocks.0.resid_pre"], out=tmp_path / "vlm", progress=False
        )
    assert not (tmp_path / "vlm").exists()


def test_captions_are_a_known_word():
    with pytest.raises(
        DataError, match="captions: expected one of 'first', 'all', 'random', 'none', got 'every'"
    ):
        check_choice("every")
