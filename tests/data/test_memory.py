"""Pairs of objects in memory, against what was put into them, and against the same content on disk."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import mmhooks as mm
from data.layout_files import images, put, read, shown
from data.tiny import encoded, tiny_clip
from mmhooks.data import families
from mmhooks.errors import DataError

TEXTS = [["a cat", "a grey cat"], ["a dog"], ["a cup"]]


def drawn(i):
    return Image.open(io.BytesIO(encoded(i))).convert("RGB")


class Torch(torch.utils.data.Dataset):
    """As torchvision's CocoCaptions: (image, captions)."""

    def __init__(self, make, n=3):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        return self.make(i)


def hub(**more):
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(3)], "caption": TEXTS, **more}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


SOURCES = {
    "datasets.Dataset": hub,
    "torch Dataset": lambda: Torch(lambda i: (drawn(i), TEXTS[i])),
    "records": lambda: Torch(lambda i: {"image": drawn(i), "caption": TEXTS[i]}),
    "list": lambda: [(drawn(i), TEXTS[i]) for i in range(3)],
    "arrays": lambda: [(np.asarray(drawn(i)), TEXTS[i]) for i in range(3)],
    "tensors": lambda: [(torch.from_numpy(np.array(drawn(i))).permute(2, 0, 1), TEXTS[i]) for i in range(3)],
    "bytes": lambda: [(encoded(i), TEXTS[i]) for i in range(3)],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_objects_in_memory(kind):
    make = SOURCES[kind]
    pairs = read(make())
    assert pairs.texts == ["a cat", "a dog", "a cup"] and shown(pairs) == [0, 1, 2]
    assert pairs.ids == ["000000000", "000000001", "000000002"] and pairs[0].meta["captions"] == TEXTS[0]
    every = read(make(), captions="all")
    assert every.texts == ["a cat", "a grey cat", "a dog", "a cup"] and families(every).tolist() == [
        0,
        0,
        1,
        2,
    ]
    assert read(make(), captions="none").has_texts is False
    assert len(read(make(), limit=2, captions="all").image_numbers) in (2, 3)
    assert set(read(make(), limit=2).ids) < set(pairs.ids)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_fingerprint_is_of_the_content(kind):
    expected = read([(drawn(i), TEXTS[i]) for i in range(3)]).fingerprint
    assert read(SOURCES[kind]()).fingerprint == expected
    assert read([(drawn(i + 1), TEXTS[i]) for i in range(3)]).fingerprint != expected
    assert read([(drawn(i), ["x", *TEXTS[i]]) for i in range(3)]).fingerprint != expected


def test_rows_of_a_model_are_those_from_disk(tmp_path):
    images(tmp_path / "photos", "0.png", "1.png", "2.png")
    for i, texts in enumerate(TEXTS):
        put(tmp_path / "photos" / f"{i}.txt", texts[0])
    model, sites = tiny_clip(), ["image.embed", "text.embed"]
    disk = mm.extract(model, read(tmp_path / "photos"), sites, out=tmp_path / "disk", progress=False)
    memory = mm.extract(model, read(hub()), sites, out=tmp_path / "memory", workers=1, progress=False)
    assert all(torch.equal(disk[site][:], memory[site][:]) for site in sites)


def test_paths_in_a_list_and_in_a_data_set(tmp_path):
    images(tmp_path, "a.png", "b.png")
    names = [tmp_path / "a.png", str(tmp_path / "b.png")]
    assert shown(read([(name, "x") for name in names])) == [0, 1]
    with pytest.raises(DataError, match="item 0: there is no such file"):
        read([(tmp_path / "gone.png", "x")])
    found = datasets.Dataset.from_dict({"image": list(map(str, names)), "text": ["x", "y"]})
    found = found.cast_column("image", datasets.Image())
    with pytest.raises(DataError, match=r"its image is in a file \(.*a\.png\); allow_outside=True"):
        read(found)
    assert shown(read(found, allow_outside=True)) == [0, 1]


def test_splits_and_columns_of_a_data_set():
    features = datasets.ClassLabel(names=["indoors", "outdoors"])
    found = hub(id=["x", "y", "z"], place=[1, 0, 1]).cast_column("place", features)
    pairs = read(found, meta_columns=["place"])
    assert pairs.ids == ["x", "y", "z"] and [meta["place"] for meta in pairs.meta] == [
        "outdoors",
        "indoors",
        "outdoors",
    ]
    splits = datasets.DatasetDict(train=found, test=found.select([1]))
    assert read(splits).ids == ["y"] and read(splits, split="train").ids == ["x", "y", "z"]
    with pytest.raises(DataError, match="expected a split among train, test, got 'val'"):
        read(splits, split="val")
    with pytest.raises(
        DataError, match="Dataset has columns picture, words; no image and no text column among them"
    ):
        read(datasets.Dataset.from_dict({"picture": ["x"], "words": ["y"]}))
    with pytest.raises(DataError, match="expected columns tone, got image, caption"):
        read(hub(), meta_columns=["tone"])
    with pytest.raises(
        DataError, match="Torch has columns pixels, label; no image and no text column among them"
    ):
        read(Torch(lambda i: {"pixels": drawn(i), "label": "a"}))
    assert (
        read(Torch(lambda i: {"p": drawn(i), "t": {"en": "a"}}), image_column="p", text_column="t.en").texts
        == ["a"] * 3
    )


def test_what_cannot_be_used_is_told_or_skipped():
    def make(i):
        if i == 1:
            raise KeyError("lost")
        return drawn(i), ["a cat", "", " "][i]

    with pytest.raises(
        DataError, match=r"Torch, item 1: reading item 1 failed \(KeyError: 'lost'\).*on_error=\"skip\""
    ):
        read(Torch(make))
    pairs = read(Torch(make), on_error="skip")
    assert (
        pairs.texts == ["a cat"]
        and pairs.skipped["item 2"] == "its text is empty"
        and len(pairs.skipped) == 2
    )
    with pytest.raises(DataError, match="expected unique ids, got 1"):
        read(hub(id=["x", "x", "y"]))
    assert read(hub(id=["x", "x", "y"]), on_error="skip").ids == ["x", "y"]
    for image, said in (
        (torch.zeros(3, 4, 4), r"a tensor of torch\.float32; mm\.data\.from_tensors"),
        (np.zeros((4, 4)), "an array of float64"),
        (np.zeros((4, 4, 5), dtype=np.uint8), r"got \[4, 4, 5\]"),
        (Image.new("I;16", (4, 4)), "mode 'I;16'"),
        (None, "got a NoneType"),
        (b"no image", "cannot identify image"),
    ):
        with pytest.raises(DataError, match=said):
            read([(image, "x")])
    for source, said in (
        ([], "got a list of none"),
        ([("x",)], "got a tuple of 1 as item 0"),
        ([drawn(0)], "got a Image as item 0"),
        (7, "got int"),
        ({"image": "text"}, "got dict"),
        (iter([]), "got list_iterator"),
        (hub().to_iterable_dataset(), "got IterableDataset"),
    ):
        with pytest.raises(DataError, match=said):
            read(source)
    with pytest.raises(DataError, match="expected it with a file of captions, got it with a list"):
        read([(drawn(0), "x")], images="photos")


def test_random_augmentation_is_noticed():
    calls = iter(range(100))
    with pytest.raises(DataError, match="its pixels differ from those read first"):
        read(Torch(lambda i: (drawn(next(calls) % 7), "a cat"), n=1))[0]
