"""One bad row, file or name in a source of pairs: told with its place, left out with ``on_error="skip"``, never read."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mmhooks as mm
from mmhooks.errors import DataError, MMHooksError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


def image_bytes(shade=100, form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, form)
    return buffer.getvalue()


def read(source, on_error="raise", **options):
    return mm.data.pairs(source, on_error=on_error, progress=False, **options)


def folder_of(place, table, names=("a.png", "b.png", "c.png")):
    place.mkdir(exist_ok=True)
    for name in names:
        (place / name).write_bytes(image_bytes())
    (place / "metadata.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    return place


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def headers(tar):
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return [member.offset for member in file]


def samples(*texts, first=0):
    return [
        member
        for i, text in enumerate(texts, start=first)
        for member in ((f"{i:03d}.jpg", image_bytes(form="JPEG")), (f"{i:03d}.txt", text))
    ]


# -- CSV -----------------------------------------------------------------------------------------------------

GOOD_ROWS = "b.png,second\nc.png,third\n"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("a.png,a man, a dog and a boat\n", "line 2: expected 2 fields (file_name, text), got 3"),
        ("a.png\n", "line 2: expected 2 fields (file_name, text), got 1"),
        ('a.png,"12 inch pizza\n', "line 2: an unclosed quote"),
        ('a.png,"a "big" dog"\n', "line 2: an unclosed quote, or a quote inside"),
        ("a.png," + "word " * 40_000 + "\n", "line 2: field larger than field limit"),
        (",no file\n", "line 2: file_name is empty"),
        (b"a.png,caf\xe9\n", "line 2: it is not UTF-8"),
    ],
)
def test_a_broken_line_of_a_table_costs_no_other(tmp_path, bad, said):
    table = b"file_name,text\n" + (bad if isinstance(bad, bytes) else bad.encode()) + GOOD_ROWS.encode()
    place = folder_of(tmp_path / "photos", table)
    with pytest.raises(DataError) as caught:
        read(place)
    assert said in str(caught.value) and 'on_error="skip"' in str(caught.value)
    pairs = read(place, "skip")
    assert pairs.texts == ["second", "third"] and list(pairs.skipped) == ["line 2"]


def test_texts_in_quotes_may_hold_commas_quotes_and_lines(tmp_path):
    table = '\ufefffile_name,text\r\na.png,"a man, a ""big"" dog\r\nand a boat"\r\n\r\nb.png,plain "quote\r\n'
    assert read(folder_of(tmp_path / "photos", table)).texts == [
        'a man, a "big" dog\r\nand a boat',
        'plain "quote',
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), max_size=8))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, texts):
    import csv

    from mmhooks.data.sources.tables import read_table

    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("file_name", "text"), *((f"{i}.png", text) for i, text in enumerate(texts))])
    lines = read_table(path, ("file_name", "text"))
    assert [line.entry.get("text") for line in lines] == texts and not any(line.fault for line in lines)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file_name,text,text\na.png,x,y\n", "got 'text' twice"),
        ("", "got (none)"),
        (b"file_name,te\xe9xt\n", "UTF-8"),
        ("file_name,text\na.png,x\n".encode("utf-16"), "UTF-8"),
    ],
)
def test_a_damaged_header_is_told(tmp_path, table, said):
    with pytest.raises(DataError) as caught:
        read(folder_of(tmp_path / "photos", table), "skip")
    assert said in str(caught.value)


# -- what lies outside ---------------------------------------------------------------------------------------


def outside_of(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(image_bytes(7))
    return secret


NAMES = ["../secret.png", "sub/../../secret.png", "{secret}", "link.png", "folder/secret.png"]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_reads_files_of_its_folder_only(tmp_path, name):
    secret = outside_of(tmp_path)
    name = name.format(secret=secret)
    place = folder_of(tmp_path / "photos", f"file_name,text\n{name},secret\nb.png,fine\n")
    (place / "link.png").symlink_to(secret)
    (place / "folder").symlink_to(tmp_path)
    with pytest.raises(DataError, match="expected a file inside.*allow_outside=True"):
        read(place)
    pairs = read(place, "skip")
    assert pairs.texts == ["fine"] and list(pairs.skipped) == [name]
    meant = read(place, allow_outside=True)
    assert meant.texts == ["secret", "fine"] and meant[0].image.getpixel((0, 0)) == (7, 7, 7)


def test_links_within_the_folder_and_a_folder_that_is_a_link_are_read(tmp_path):
    place = folder_of(tmp_path / "photos", "file_name,text\nlink.png,x\n")
    (place / "link.png").symlink_to(place / "a.png")
    (tmp_path / "other").symlink_to(place)
    assert read(place).texts == read(tmp_path / "other").texts == ["x"]


def special(place):
    os.mkfifo(place / "pipe.png")
    (place / "zero.png").symlink_to("/dev/zero")
    (place / "folder.png").mkdir()
    (place / "loop.png").symlink_to(place / "loop.png")
    with (place / "sparse.png").open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    "name", ["pipe.png", "zero.png", "folder.png", "loop.png", "sparse.png", "x" * 300, "a\\b.png"]
)
def test_only_regular_files_of_some_size_are_read(tmp_path, name):
    place = folder_of(tmp_path / "photos", f"file_name,text\n{name},x\nb.png,fine\n")
    special(place)
    with pytest.raises(DataError):
        read(place, allow_outside=True)
    for outside in (False, True):
        pairs = read(place, "skip", allow_outside=outside)
        assert pairs.texts == ["fine"] and list(pairs.skipped) == [name]


@pytest.mark.parametrize("what", ["metadata.csv", "LICENSE"])
def test_table_and_licence_are_not_read_elsewhere(tmp_path, what):
    secret = tmp_path / "secret.txt"
    secret.write_text("file_name,text\nb.png,secret words\n")
    place = folder_of(tmp_path / "photos", "file_name,text\nb.png,fine\n")
    (place / what).unlink(missing_ok=True)
    (place / what).symlink_to(secret)
    if what == "LICENSE":
        assert "not stated" in read(place).licence
    else:
        with pytest.raises(DataError, match="expected a file inside"):
            read(place, "skip")


def parquet(path, images, texts=None, **more):
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    texts = texts or [f"text {i}" for i in range(len(images))]
    pq.write_table(pa.table({"image": pa.array(images, kind), "text": texts, **more}), path)
    return path


def both(source, **options):
    """Texts of pairs and of the stream, and how many each left out."""
    pairs = read(source, "skip", **options)
    stream = mm.data.pair_stream(source, on_error="skip", **options)
    texts = [pair.text for pair in stream]
    assert texts == pairs.texts and len(stream.skipped) == len(pairs.skipped)
    return texts, len(pairs.skipped)


def test_rows_of_parquet_that_name_a_path(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    (place / "here.png").write_bytes(image_bytes(50))
    os.mkfifo(place / "pipe.png")
    secret = outside_of(tmp_path)
    names = [str(secret), "../secret.png", "/dev/zero", "missing.png", "pipe.png", "zip://a.png::/etc/passwd",
             "file:///etc/passwd", "https://localhost:1/a.png", "hf://datasets/other/set@main/a.png",
             "simplecache::file:///etc/passwd", "a\0b"]  # fmt: skip
    rows = [{"bytes": image_bytes(), "path": "/etc/passwd"}, {"bytes": None, "path": "here.png"}]
    source = parquet(place / "x.parquet", rows + [{"bytes": None, "path": name} for name in names])
    assert both(source) == (["text 0", "text 1"], len(names))
    with pytest.raises(DataError, match="row 2.*expected a file inside.*allow_outside=True"):
        read(source)
    two = parquet(
        place / "y.parquet", [{"bytes": None, "path": str(secret)}, {"bytes": None, "path": "here.png"}]
    )
    assert both(two, allow_outside=True) == (["text 0", "text 1"], 0)


def test_an_image_folder_as_a_zip_and_its_bad_rows(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    with zipfile.ZipFile(place / "train.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.png", image_bytes())
        file.writestr("1.png", b"no image")
        file.writestr("2.png", image_bytes())
        file.writestr("metadata.csv", "file_name,text\n0.png,zero\n1.png,one\n2.png,two\n")
    assert both(place) == (["zero", "two"], 1)


def test_a_folder_read_by_datasets_stays_inside(tmp_path):
    secret = tmp_path / "elsewhere" / "x.parquet"
    secret.parent.mkdir()
    parquet(secret, [{"bytes": image_bytes(), "path": None}])
    place = tmp_path / "set"
    place.mkdir()
    (place / "x.parquet").symlink_to(secret)
    with pytest.raises(DataError, match="expected a file inside"):
        read(place)
    assert read(place, allow_outside=True).texts == ["text 0"]
    (place / "x.parquet").unlink()
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {secret}\n---\n")
    with pytest.raises(DataError, match="expected a file inside"):
        read(place)


def test_images_of_other_columns_are_not_decoded(tmp_path):
    """datasets would hand them to any decoder of Pillow's."""
    import datasets

    rows = {
        "image": [{"bytes": image_bytes(), "path": None}],
        "other": [{"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "path": None}],
        "text": ["a"],
    }
    found = datasets.Dataset.from_dict(rows)
    for column in ("image", "other"):
        found = found.cast_column(column, datasets.Image())
    found.to_parquet(tmp_path / "x.parquet")
    found.save_to_disk(tmp_path / "saved")
    assert both(tmp_path / "x.parquet") == both(tmp_path / "saved") == (["a"], 0)


# -- tars ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            [("001.jpg", image_bytes()), ("001.txt", "café".encode("latin-1"))],
            "its txt is not UTF-8 (byte 0xe9 at 3)",
        ),
        ([("001.jpg", image_bytes())], "it has no 'txt', only jpg"),
        ([("001.jpg", b"no image"), ("001.txt", b"x")], "cannot identify image file"),
        ([("001.jpg", image_bytes()), ("001.txt", b" ")], "its text is empty"),
        ([("001.txt", b"x")], "expected an image in it"),
        ([("001.jpg", image_bytes()), ("001.jpg", image_bytes()), ("001.txt", b"x")], "two files .jpg"),
        (samples(b"again"), "its key is a duplicate"),
    ],
)
def test_a_bad_sample_of_a_tar_costs_no_other(tmp_path, bad, said):
    whole = tar_bytes([*samples(b"zero"), *bad, *samples(b"two", first=2)])
    (tmp_path / "s.tar").write_bytes(whole)
    if said == "its key is a duplicate":  # two of one key that follow each other are one sample
        whole = tar_bytes([*samples(b"zero"), *samples(b"two", first=2), *bad])
        (tmp_path / "s.tar").write_bytes(whole)
    assert both(tmp_path / "s.tar") == (["zero", "two"], 1)
    for read_it in (read, lambda s: list(mm.data.pair_stream(s))):
        with pytest.raises(DataError) as caught:
            read_it(tmp_path / "s.tar")
        assert said in str(caught.value) and "s/00" in str(caught.value)


def test_broken_json_in_a_tar(tmp_path):
    members = [m for i, text in enumerate((b'{"caption": "zero"}', b'{"caption": "on', b'{"caption": "two"}'))
               for m in ((f"{i}.jpg", image_bytes()), (f"{i}.json", text))]  # fmt: skip
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    assert both(tmp_path / "s.tar", text_column="json.caption") == (["zero", "two"], 1)
    with pytest.raises(DataError, match=r"row 1 \(s/1\): its json is not JSON"):
        read(tmp_path / "s.tar", text_column="json.caption")


def test_a_truncated_tar_is_always_told(tmp_path):
    """Cut in every member's header and data and between members: the samples before are read, the cut is counted."""
    whole = tar_bytes(samples(b"zero", b"one", b"two"))
    starts = headers(whole)
    end = -(-(starts[-1] + 513) // 512) * 512  # of the last file
    cuts = sorted({at + by for at in starts for by in (0, 1, 300, 511, 512, 513)} | {end - 511, end})
    for cut in cuts:
        (tmp_path / "s.tar").write_bytes(whole[:cut])
        stream = None
        try:
            stream = mm.data.pair_stream(tmp_path / "s.tar", on_error="skip")
            texts = [pair.text for pair in stream]
        except DataError as fault:
            assert "s.tar" in str(fault)
            continue
        assert len(stream.skipped) == 1 and texts == ["zero", "one", "two"][: len(texts)] and len(texts) < 3
        with pytest.raises(DataError, match="truncated or damaged"):
            list(mm.data.pair_stream(tmp_path / "s.tar"))


@pytest.mark.parametrize("member", range(4))
@pytest.mark.parametrize("by", [0, 124, 148, 156])  # in the name, size, checksum, type
def test_a_damaged_header_in_a_tar_is_told_and_the_next_tar_follows(tmp_path, member, by):
    whole = bytearray(tar_bytes(samples(b"zero", b"one")))
    whole[headers(bytes(whole))[member] + by] ^= 0x41
    (tmp_path / "a.tar").write_bytes(bytes(whole))
    (tmp_path / "b.tar").write_bytes(tar_bytes(samples(b"three")))
    stream = mm.data.pair_stream(str(tmp_path / "*.tar"), on_error="skip")
    texts = [pair.text for pair in stream]
    assert texts[-1] == "three" and set(texts) <= {"zero", "three"} and len(stream.skipped) == 1
    with pytest.raises(DataError, match="a.tar"):
        list(mm.data.pair_stream(str(tmp_path / "*.tar")))


def test_two_tars_in_one_file_are_told(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_bytes(samples(b"zero")) + tar_bytes(samples(b"one", first=1)))
    with pytest.raises(DataError, match="several tars in one file"):
        read(tmp_path / "s.tar")


def test_ids_carry_the_tar(tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for k in range(2):
        (tars / f"{k}.tar").write_bytes(tar_bytes(samples(*(b"%d-%d" % (k, i) for i in range(2)))))
    wanted = {"0/000": "0-0", "0/001": "0-1", "1/000": "1-0", "1/001": "1-1"}
    for source in (str(tars / "*.tar"), tars):
        pairs = read(source)
        assert dict(zip(pairs.ids, pairs.texts, strict=True)) == wanted
        assert {p.id: p.text for p in mm.data.pair_stream(source)} == wanted


@pytest.mark.parametrize("ids", [["a", None, "c"], ["a", "", "c"], [1.0, float("nan"), 3.0]])
def test_a_row_without_an_id_is_told(tmp_path, ids):
    rows = [{"bytes": image_bytes(), "path": None}] * 3
    source = parquet(tmp_path / "x.parquet", rows, id=ids)
    assert both(source) == (["text 0", "text 2"], 1)
    with pytest.raises(DataError, match="row 1.*its id is empty"):
        read(source)


def test_an_id_that_occurs_twice_in_a_stream_is_told(tmp_path):
    rows = [{"bytes": image_bytes(), "path": None}] * 3
    source = parquet(tmp_path / "x.parquet", rows, id=["a", "b", "a"])
    assert both(source) == (["text 0", "text 1"], 1)
    with pytest.raises(DataError, match="a: its id is a duplicate"):
        list(mm.data.pair_stream(source))


def test_repeated_ids_are_found_among_many(monkeypatch):
    from mmhooks.data import seen_ids

    monkeypatch.setattr(seen_ids, "_RECENT", 64)
    seen = seen_ids.SeenIds()
    assert all(seen.add(f"id {i}") for i in range(5_000)) and len(seen._runs) < 12
    assert not any(seen.add(f"id {i}") for i in range(5_000)) and seen.add("another")


# -- texts ---------------------------------------------------------------------------------------------------


def test_several_captions_in_a_text_file(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_bytes(samples(b"a cat\na small cat\n\n", b"a dog\na big dog\n")))
    with pytest.raises(
        DataError, match=r"2 lines: text_column='txt.lines' reads each.*'txt.whole' all of them as one text"
    ):
        read(tmp_path / "s.tar")
    pairs = read(tmp_path / "s.tar", text_column="txt.lines")
    assert pairs.texts == ["a cat", "a dog"] and pairs[1].meta["captions"] == ["a dog", "a big dog"]
    assert read(tmp_path / "s.tar", text_column="txt.whole").texts[0] == "a cat\na small cat"
    for read_it in (lambda: read(tmp_path / "s.tar", "skip"),
                    lambda: list(mm.data.pair_stream(tmp_path / "s.tar", on_error="skip"))):  # fmt: skip
        with pytest.raises(
            DataError, match=r"none of its rows can be used \(2 skipped, the first is .*txt.lines"
        ):
            read_it()


@pytest.mark.parametrize(
    ("value", "found", "column"),
    [
        (3, "a number (3)", None),
        ({"en": ["a cat"], "de": ["eine Katze"]}, "a record of en, de", "text.en"),
        ([{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a cat"}],
         "a list of 2, the first a record of from, value", "text.1.value"),
        ({"content": {"parts": ["a cat"]}}, "a record of content", "text.content.parts"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_described_and_how_to_name_it(tmp_path, value, found, column):
    source = parquet(tmp_path / "x.parquet", [{"bytes": image_bytes(), "path": None}], [value])
    with pytest.raises(DataError) as caught:
        read(source)
    assert found in str(caught.value) and (column is None or f"text_column={column!r}" in str(caught.value))
    with pytest.raises(DataError, match="none of its rows can be used"):
        list(mm.data.pair_stream(source, on_error="skip"))
    if column:
        assert read(source, text_column=column).texts == ["a cat"]


def test_a_class_number_in_a_tar(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_bytes([("0.jpg", image_bytes()), ("0.cls", b"7")]))
    with pytest.raises(DataError, match="has columns jpg, cls; no text column among them"):
        read(tmp_path / "s.tar")
    with pytest.raises(DataError, match="its cls is a class number"):
        read(tmp_path / "s.tar", text_column="cls")


# -- caches and damaged sources ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "no json", "bad json", "list json", "fewer rows", "noise"]
)
def test_a_damaged_copy_in_the_cache_is_told(tmp_path, damage):
    source = parquet(tmp_path / "x.parquet", [{"bytes": image_bytes(), "path": None}] * 3)
    read(source)
    (stored,) = (tmp_path / "cache" / "pairs").glob("*.arrow")
    about, data = stored.with_suffix(".json"), stored.read_bytes()
    if damage == "no json":
        about.unlink()
    elif damage.endswith("json"):
        about.write_text("[]" if damage.startswith("list") else "{")
    elif damage == "fewer rows":
        about.write_text(json.dumps({**json.loads(about.read_text()), "rows": 4}))
    else:
        stored.write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "noise": np.random.bytes(500)}[damage]
        )
    with pytest.raises(DataError) as caught:
        read(source)
    assert str(stored) in str(caught.value) and "delete it" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other tensors"])
def test_a_damaged_copy_of_the_embedded_corpus_is_told(tmp_path, monkeypatch, damage):
    from safetensors.numpy import save

    from mmhooks.data.sources import openmoji

    path = tmp_path / "kept.safetensors"
    data = save(
        {"rgba": np.zeros((2, 4, 4, 4), np.uint8)}, {"rows": "[]"} if damage == "other tensors" else {}
    )
    path.write_bytes({"cut": data[:40], "empty": b"", "noise": np.random.bytes(500)}.get(damage, data))
    monkeypatch.setattr(openmoji, "cache_dir", lambda *_: OnePath(path))
    with pytest.raises(DataError, match=r"kept\.safetensors.*delete it"):
        openmoji.openmoji()


class OnePath:
    """A folder in which every name is the one path."""

    def __init__(self, path):
        self._path = path

    def __truediv__(self, name):
        return self._path


def test_a_damaged_parquet_is_told(tmp_path):
    source = parquet(tmp_path / "x.parquet", [{"bytes": np.random.bytes(5000), "path": None}] * 3)
    data = source.read_bytes()
    for damaged in (data[:100], data[:-20], data[:200] + bytes(4000) + data[4200:], b""):
        source.write_bytes(damaged)
        for read_it in (read, lambda s, e="raise": list(mm.data.pair_stream(s, on_error=e))):
            for on_error in ("raise", "skip"):
                with pytest.raises(MMHooksError, match="x.parquet"):
                    read_it(source, on_error)


def test_a_list_of_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt.*UTF-8"):
        mm.data.text_pool(tmp_path / "latin.txt")
