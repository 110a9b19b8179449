"""Folders, and tiny local copies of the formats that ``datasets`` streams."""

from __future__ import annotations

import csv
import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import mmhooks as mm
from mmhooks.data.sources import hub as stream
from mmhooks.errors import DataError, MissingWeights

TEXTS = ["a red square", "a green square", "a blue square", "a grey square"]
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


def encoded(colour, form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), colour).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    for i, colour in enumerate(COLOURS):
        (place / f"{i}.png").write_bytes(encoded(colour))
    write(place, [{"file_name": f"{i}.png", "text": t, "artist": "me"} for i, t in enumerate(TEXTS)])
    return place


def write(place, rows):
    with (place / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def check_all(pairs, n=4, tolerance=0):
    assert pairs.texts == TEXTS[:n]
    for i in range(n):
        colour = np.asarray(pairs[i].image)[6, 6].astype(int)
        assert np.abs(colour - COLOURS[i]).max() <= tolerance


def test_folder(folder):
    pairs = mm.data.pairs(folder)
    check_all(pairs)
    assert pairs.ids == ["0.png", "1.png", "2.png", "3.png"] and pairs[1].meta == {"artist": "me"}
    assert len(mm.data.pairs(folder, limit=2)) == 2
    before = pairs.fingerprint
    assert mm.data.pairs(folder).fingerprint == before
    (folder / "0.png").write_bytes(encoded((1, 2, 3)))
    assert mm.data.pairs(folder).fingerprint != before


def test_folder_keeps_its_own_ids_and_splits(folder):
    write(
        folder,
        [
            {"file_name": f"{i}.png", "text": t, "id": f"no{i}", "split": "ab"[i % 2]}
            for i, t in enumerate(TEXTS)
        ],
    )
    assert mm.data.pairs(folder, split="b").ids == ["no1", "no3"]
    with pytest.raises(DataError, match=r"no pair in split 'c'; it has a \(2\), b \(2\)"):
        mm.data.pairs(folder, split="c")


def test_unreadable_and_missing_pictures_are_named_or_skipped(folder):
    (folder / "1.png").write_bytes(b"no picture")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "2.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:2000])
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r'3 of 4 images.*first is 1\.png: cannot identify.*on_error="skip"'):
        mm.data.pairs(folder)
    pairs = mm.data.pairs(folder, on_error="skip")
    assert pairs.ids == ["0.png"] and set(pairs.skipped) == {"1.png", "2.png", "3.png"}
    assert pairs.skipped["3.png"] == "there is no such file" and "truncated" in pairs.skipped["2.png"].lower()
    for i in (0,):
        (folder / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"at least one usable pair, got none.*4 skipped"):
        mm.data.pairs(folder, on_error="skip")


def test_truncated_jpeg_is_found(folder):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0.png", "JPEG", quality=95)
    data = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"1 of 4 images.*0\.png: .*truncated"):
        mm.data.pairs(folder)


def test_a_picture_that_goes_away_later_is_named(folder):
    pairs = mm.data.pairs(folder)
    (folder / "2.png").unlink()
    with pytest.raises(DataError, match=r"pair '2\.png'.*has it changed since"):
        pairs[2]


def test_empty_texts_and_repeated_ids(folder):
    rows = [{"file_name": f"{i}.png", "text": t, "id": i} for i, t in enumerate(TEXTS)]
    rows[1]["text"] = "  "
    write(folder, rows)
    with pytest.raises(DataError, match=r"got 1 empty ones, the first is that of '1'"):
        mm.data.pairs(folder)
    rows[3]["id"] = 0
    write(folder, rows)
    with pytest.raises(
        DataError, match=r"unique ids, got 1 that occur more than once, the first is '0' \(2 times\)"
    ):
        mm.data.pairs(folder)
    pairs = mm.data.pairs(folder, on_error="skip")
    assert pairs.ids == ["0", "2"] and len(pairs.skipped) == 2


def test_a_table_without_the_columns(folder):
    write(folder, [{"file": "0.png", "text": "x"}])
    with pytest.raises(
        DataError, match="expected columns file_name and text, got file, text; missing file_name"
    ):
        mm.data.pairs(folder)


def test_transparent_pictures_lie_on_white(folder):
    Image.new("RGBA", (12, 12), (255, 0, 0, 0)).save(folder / "0.png")
    pairs = mm.data.pairs(folder)
    assert pairs[0].image.getpixel((3, 3)) == (255, 255, 255) and pairs.rgba(0).getpixel((3, 3))[3] == 0


# -- datasets ------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """COCO-Caption2017's columns, as Parquet of one split, in place of the Hub's."""
    import datasets

    place = tmp_path / "coco"
    (place / "data").mkdir(parents=True)
    rows = {
        "question_id": [f"{i:012d}.jpg" for i in range(4)],
        "image": [{"bytes": encoded(c, "JPEG"), "path": None} for c in COLOURS],
        "question": ["Describe."] * 4,
        "answer": [[t, t + ", again"] for t in TEXTS],
        "id": [0] * 4,
    }
    found = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    found.to_parquet(place / "data" / "val-00000-of-00001.parquet")
    monkeypatch.setitem(stream.KNOWN, "coco", replace(stream.KNOWN["coco"], path=str(place)))
    return place


def test_coco_as_parquet(coco):
    pairs = mm.data.pairs("coco", progress=False)
    check_all(pairs, tolerance=4)
    assert pairs.ids[1] == "000000000001.jpg" and pairs[1].meta["captions"] == [
        TEXTS[1],
        TEXTS[1] + ", again",
    ]
    every = mm.data.pairs("coco", captions="all", progress=False)
    assert every.ids[:3] == ["000000000000.jpg#0", "000000000000.jpg#1", "000000000001.jpg#0"]
    assert every.image_numbers == [0, 0, 1, 1, 2, 2, 3, 3]
    assert "COCO" in pairs.attribution and "CC BY" in pairs.licence
    some = mm.data.pairs("coco", limit=2, progress=False)
    check_all(some, 2, tolerance=4)
    # Read back from the cache, the source is not touched; sources of other content are not mixed up.
    assert mm.data.pairs("coco", progress=False).fingerprint == pairs.fingerprint != some.fingerprint


def test_a_folder_of_the_same_name_is_not_read_instead(coco, tmp_path, monkeypatch):
    (tmp_path / "here" / "coco").mkdir(parents=True)
    (tmp_path / "here" / "coco" / "x.png").write_bytes(encoded((1, 2, 3)))
    monkeypatch.chdir(tmp_path / "here")
    assert len(mm.data.pairs("coco", progress=False)) == len(list(mm.data.pair_stream("coco"))) == 4
    assert mm.data.pairs("./coco", progress=False).ids == ["x.png"]


def test_cc3m_as_webdataset_tar(tmp_path, monkeypatch):
    place = tmp_path / "cc3m"
    place.mkdir()
    with tarfile.open(place / "cc3m-validation-0000.tar", "w") as tar:
        for i, (colour, text) in enumerate(zip(COLOURS, TEXTS, strict=True)):
            for end, data in (("jpg", encoded(colour, "JPEG")), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{i:09d}.{end}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    monkeypatch.setitem(stream.KNOWN, "cc3m", replace(stream.KNOWN["cc3m"], path=str(place)))
    pairs = mm.data.pairs("cc3m", progress=False)
    check_all(pairs, tolerance=4)
    assert pairs.ids[2].endswith("000000002")


def test_any_name_image_folder_and_saved_arrow(tmp_path):
    import datasets

    place = tmp_path / "imagefolder" / "train"
    place.mkdir(parents=True)
    lines = []
    for i, colour in enumerate(COLOURS):
        (place / f"{i}.png").write_bytes(encoded(colour))
        lines.append(f'{{"file_name": "{i}.png", "caption": "{TEXTS[i]}"}}')
    (place / "metadata.jsonl").write_text("\n".join(lines))
    check_all(mm.data.pairs(tmp_path / "imagefolder", progress=False))

    rows = {"picture": [{"bytes": encoded(c), "path": None} for c in COLOURS], "words": TEXTS}
    saved = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"columns picture, words; no text column among them.*text_column="):
        mm.data.pairs(tmp_path / "saved", progress=False)
    check_all(mm.data.pairs(tmp_path / "saved", text_column="words", progress=False))
    saved.to_parquet(tmp_path / "one.parquet")
    check_all(mm.data.pairs(tmp_path / "one.parquet", text_column="words", progress=False))


def test_columns_of_a_data_set_are_kept_by_the_names_of_their_classes(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "gender": datasets.ClassLabel(names=["male", "female"]),
            "age": datasets.Value("int64"),
        }
    )
    rows = {
        "image": [{"bytes": encoded(c), "path": None} for c in COLOURS[:2]],
        "text": ["a", "b"],
        "gender": [1, 0],
        "age": [30, 7],
    }
    place = tmp_path / "people.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(place)
    pairs = mm.data.pairs(place, meta_columns=["gender", "age"], progress=False)
    assert [(m["gender"], m["age"]) for m in pairs.meta] == [("female", "30"), ("male", "7")]
    assert "gender" not in mm.data.pairs(place, progress=False).meta[0]
    with pytest.raises(DataError, match="expected columns tone, got"):
        mm.data.pairs(place, meta_columns=["tone"], progress=False)


def test_bad_rows_of_a_stream_are_named_or_skipped(tmp_path):
    import datasets

    images = [encoded(COLOURS[0]), b"no picture", encoded(COLOURS[2]), encoded(COLOURS[3])]
    rows = {"image": [{"bytes": b, "path": None} for b in images], "text": [*TEXTS[:3], ""]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match=r"row 1 \(000000001\): its image cannot be read"):
        mm.data.pairs(tmp_path / "bad", progress=False)
    pairs = mm.data.pairs(tmp_path / "bad", on_error="skip", progress=False)
    assert pairs.texts == [TEXTS[0], TEXTS[2]]
    assert list(pairs.skipped.values())[1] == "its text is empty" and len(pairs.skipped) == 2
    assert not list((tmp_path / "cache" / "pairs").glob("*.part"))


def test_unknown_split(coco):
    with pytest.raises(DataError, match="expected a split among val, got 'test'"):
        mm.data.pairs("coco", split="test", progress=False)


@pytest.mark.parametrize("name", ["coco", "cc3m", "someone/images-with-texts"])
def test_without_network_one_sentence(name, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        MissingWeights, match=r"not a local folder and cannot be downloaded.*Couldn't reach"
    ) as caught:
        mm.data.pairs(name, progress=False)
    assert "\n" not in str(caught.value) and 'pairs("mini")' in str(caught.value)
