"""Tiny copies of what img2dataset and CLIP-benchmark write, braces, streams of listed files, and the commands for them."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import mmhooks as mm
from data.layout_files import NAMES, coco, images, put, read, shown
from data.tiny import encoded
from mmhooks.cli import app
from mmhooks.data import families
from mmhooks.data.sources.braces import expand_braces
from mmhooks.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


# -- shards --------------------------------------------------------------------------------------------------


def tar(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))


def img2dataset_tars(place, shards=2):
    """--output_format webdataset: a tar, a table without images and a file of statistics a shard."""
    for shard in range(shards):
        name, members = f"{shard:05d}", []
        for i in range(2):
            key, number = f"{shard:05d}{i:04d}", 2 * shard + i
            about = {
                "caption": f"text {number}",
                "url": f"https://x/{number}",
                "key": key,
                "status": "success",
            }
            members += [(f"{key}.jpg", encoded(number)), (f"{key}.txt", f"text {number}".encode())]
            members += [(f"{key}.json", json.dumps(about).encode())]
        tar(place / f"{name}.tar", *members)
        rows = {"url": ["https://x/0", "https://x/1"], "caption": ["other", "other"], "key": ["0", "1"]}
        pq.write_table(pa.table(rows), place / f"{name}.parquet")
        put(place / f"{name}_stats.json", '{"count": 2}')


def test_img2dataset_tars_and_braces(tmp_path):
    place = tmp_path / "out"
    img2dataset_tars(place)
    pairs = read(place)
    assert pairs.texts == [f"text {i}" for i in range(4)] and shown(pairs) == [0, 1, 2, 3]
    assert pairs.ids == ["00000/000000000", "00000/000000001", "00001/000010000", "00001/000010001"]
    for pattern in ("*.tar", "{00000..00001}.tar", "{00000,00001}.tar", "0000?.tar"):
        assert read(f"{place}/{pattern}").ids == pairs.ids
        assert [pair.id for pair in mm.data.pair_stream(f"{place}/{pattern}")] == pairs.ids
    assert read(f"{place}/{{00001..00001}}.tar").ids == pairs.ids[2:]
    assert read(place, text_column="json.caption").texts == pairs.texts
    with pytest.raises(DataError, match=r"expected a file .*00002\.tar, there is none"):
        read(f"{place}/{{00000..00002}}.tar")
    with pytest.raises(DataError, match="expected files of this pattern, there are none"):
        read(f"{place}/*.tgz")


@pytest.mark.parametrize(
    "pattern",
    [
        "{00000..00012}.tar",
        "{8..11}",
        "{08..11}",
        "{a,b}/{1..3}.tar",
        "x{,y}",
        "none.tar",
        "{abc}",
        "{00..3}",
    ],
)
def test_braces_are_those_of_the_shell(pattern):
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    assert expand_braces(pattern) == said.stdout.splitlines()


def test_braces_that_name_too_much():
    for pattern, said in (
        ("{3..1}", "lower to a higher"),
        ("{0..9999999}", "at most"),
        ("{0..9999}" * 2, "at most"),
    ):
        with pytest.raises(DataError, match=said):
            expand_braces(pattern)


def test_img2dataset_parquet(tmp_path):
    """--output_format parquet: rows whose download failed have no image."""
    rows = {
        "url": ["https://x/0", "https://x/1", "https://x/2"],
        "caption": ["text 0", "text 1", "text 2"],
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success"],
        "txt": ["text 0", None, "text 2"],
        "jpg": [encoded(0), None, encoded(2)],
    }
    put(tmp_path / "out" / "00000_stats.json", '{"count": 3}')
    pq.write_table(pa.table(rows), tmp_path / "out" / "00000.parquet")
    with pytest.raises(DataError, match=r"row 1 \(000000001\): expected an image in it"):
        read(tmp_path / "out")
    for source in (tmp_path / "out", tmp_path / "out" / "00000.parquet"):
        pairs = read(source, on_error="skip")
        assert pairs.texts == ["text 0", "text 2"] and shown(pairs) == [0, 2]
        assert pairs.ids == ["000000000", "000000002"] and len(pairs.skipped) == 1
    rows["words"] = rows.pop("caption")
    del rows["txt"]
    pq.write_table(pa.table(rows), tmp_path / "other.parquet")
    with pytest.raises(
        DataError, match="has columns url, key, status, jpg, words; no text column among them"
    ):
        read(tmp_path / "other.parquet")


def test_clip_benchmark_tars(tmp_path):
    """webdataset_builder.py: <data set>/<split>/<n>.tar, keys s0000000; of retrieval all captions in one text file."""
    place = tmp_path / "wds_mscoco_captions"
    texts = [["a bear", "a brown bear"], ["a bed", "a bedroom"]]
    for split in ("test", "train"):
        members = [
            member
            for i, captions in enumerate(texts)
            for member in ((f"s{i:07d}.webp", encoded(i)), (f"s{i:07d}.txt", "\n".join(captions).encode()))
        ]
        tar(place / split / "0.tar", *members)
        put(place / split / "nshards.txt", "1\n")
    put(place / "dataset_type.txt", "retrieval\n")
    for source in (place, place / "test", f"{place}/test/{{0..0}}.tar"):
        every = read(source, captions="all")
        assert every.texts == [text for captions in texts for text in captions]
        assert families(every).tolist() == [0, 0, 1, 1] and every.ids[0] == "0/s0000000#0"
    with pytest.raises(DataError, match="expected a split among test, train, got 'val'"):
        read(place, split="val")


def test_clip_benchmark_classes(tmp_path):
    place = tmp_path / "wds_cifar10"
    tar(
        place / "test" / "0.tar",
        *(
            (f"s{i:07d}.{end}", data)
            for i in range(2)
            for end, data in (("webp", encoded(i)), ("cls", b"%d" % i))
        ),
    )
    put(place / "test" / "nshards.txt", "1\n")
    put(place / "classnames.txt", "airplane\nautomobile\n")
    with pytest.raises(DataError, match='has columns webp, cls; no text column among them.*captions="none"'):
        read(place)
    pairs = read(place, captions="none", meta_columns=["cls"])
    assert (
        [meta["cls"] for meta in pairs.meta] == ["0", "1"] and not pairs.has_texts and shown(pairs) == [0, 1]
    )


def test_a_part_of_a_column(tmp_path):
    """translation.en, of Parquet."""
    rows = {
        "image": [{"bytes": encoded(0), "path": None}],
        "translation": [{"en": "a cat", "de": "eine Katze"}],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", image_column="image", text_column="translation.en").texts == ["a cat"]
    with pytest.raises(DataError, match=r"there is no 'translation\.fr' in it; found a record of en, de"):
        read(tmp_path / "t.parquet", image_column="image", text_column="translation.fr")
    with pytest.raises(DataError, match="has columns image, translation; no text column"):
        read(tmp_path / "t.parquet")


# -- streams and commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", ["first", "all", "none"])
def test_a_stream_of_files_reads_the_same(tmp_path, captions):
    path = coco(tmp_path)
    images(tmp_path / "val2017", *NAMES)
    pairs, stream = read(path, captions=captions), mm.data.pair_stream(path, captions=captions)
    found = list(stream)
    assert [pair.id for pair in found] == pairs.ids and [p.text for p in found] == [p.text for p in pairs]
    assert shown(found) == shown(pairs) and stream.has_texts == (captions != "none")
    of_ranks = [row.id for rank in (0, 1) for row in stream.raw(rank=rank, world=2)]
    assert sorted(of_ranks) == sorted(pairs.ids)
    before = stream.fingerprint
    assert mm.data.pair_stream(path, captions=captions).fingerprint == before
    put(tmp_path / "val2017" / NAMES[0], encoded(9) + b"longer")
    assert mm.data.pair_stream(path, captions=captions).fingerprint != before
    (tmp_path / "val2017" / NAMES[1]).unlink()
    with pytest.raises(DataError, match="its image '000000000285.jpg' cannot be read: there is no such file"):
        list(mm.data.pair_stream(path, captions=captions))
    rest = mm.data.pair_stream(path, captions=captions, on_error="skip")
    assert {pair.id.split("#")[0] for pair in rest} == {NAMES[0], NAMES[2]}
    assert {key.split("#")[0] for key in rest.skipped} == {NAMES[1]}


def test_the_commands_take_files_of_captions(tmp_path):
    path = coco(tmp_path / "coco")
    images(tmp_path / "coco" / "val2017", *NAMES)

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    said = run("pairs", path, "--captions", "all")
    assert said.exit_code == 0 and "6 pairs" in said.output and "A big brown bear." in said.output
    said = run("pairs", path, "--captions", "none")
    assert "3 images without texts" in said.output and NAMES[0] in said.output
    assert "expected one of 'first', 'all'" in run("pairs", path, "--captions", "every").output
    for streaming in ([], ["--streaming"]):
        out = tmp_path / f"acts{len(streaming)}"
        done = run("extract", "mini", "--pairs", path, "--captions", "all", "--out", out, *streaming)
        assert done.exit_code == 0, done.output
        store = mm.Store(out)
        assert list(store.ids) == read(path, captions="all").ids
        numbers = torch.tensor(read(path, captions="all").image_numbers)
        assert mm.retrieval(store["image.embed"][:], store["text.embed"][:], images=numbers).n == 6
    done = run("extract", "mini", "--pairs", path, "--captions", "none", "--out", tmp_path / "texts")
    assert done.exit_code == 1 and "expected pairs with texts for sites of the text tower" in done.output
    done = run(
        "extract", "mini", "--pairs", path, "--captions", "none", "--site", "image.embed", "--out", tmp_path / "images"
    )  # fmt: skip
    assert done.exit_code == 0 and len(mm.Store(tmp_path / "images")) == 3, done.output
