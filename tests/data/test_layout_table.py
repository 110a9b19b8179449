"""Runs every command of the table of layouts in docs/data.md, on tiny copies with the paths that it names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import mmhooks as mm
from data.layout_files import NAMES, coco, images, put
from data.test_layouts import FLICKR, karpathy
from data.test_shards import img2dataset_tars, tar
from data.tiny import encoded
from mmhooks.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
COMMANDS = re.findall(r"`mmhooks (pairs [^`]+)`", PAGE.read_text(encoding="utf-8"))
# What each prints first, and a text or id among the rest.
EXPECTED = {
    "pairs coco/annotations/captions_val2017.json --captions all": ("6 pairs", "A big brown bear."),
    "pairs json/captions_val2017.json --images photos/val2017": ("3 pairs", "A woman in a room."),
    "pairs karpathy/dataset_coco.json --images photos --split test": ("2 pairs", "A man number 2."),
    "pairs karpathy/dataset_flickr30k.json --images flickr30k-images --split test": (
        "2 pairs",
        "A man number 0.",
    ),
    "pairs flickr8k/captions.txt": ("2 pairs", "A black dog ."),
    "pairs Flickr8k_text/Flickr8k.token.txt --images Flicker8k_Dataset": ("2 pairs", "A black dog ."),
    "pairs flickr30k/results.csv --skip-bad": ("2 pairs", "1 skipped, the first is line 5"),
    "pairs flickr30k/flickr_annotations_30k.csv --split test": ("1 pairs", "Several men."),
    "pairs train.csv": ("1 pairs", "a red bus"),
    "pairs mine.csv --image-column picture --text-column words --allow-outside": ("1 pairs", "a green bus"),
    "pairs coco_karpathy_val.json --captions all": ("2 pairs", "A person."),
    "pairs i2d_files --text-column json.caption": ("1 pairs", "a cat, again"),
    "pairs i2d_tars": ("4 pairs", "text 3"),
    "pairs i2d_parquet --skip-bad": ("1 pairs", "1 skipped, the first is row 1"),
    "pairs i2d_tars/{00000..00001}.tar": ("4 pairs", "text 3"),
    "pairs wds_flickr30k --split test --captions all": ("2 pairs", "a grey cat"),
    "pairs wds_cifar10 --captions none": ("1 images without texts", "0/s0000000"),
    "pairs photos_txt": ("1 pairs", "a cat"),
    "pairs imagenet/val": ("1 images without texts", "n01440764/x.JPEG"),
    "pairs photos_csv": ("1 pairs", "a cat"),
    "pairs multi30k.parquet --text-column translation.de": ("1 pairs", "eine Katze"),
}
FROM_THE_WEB = "pairs cc12m.tsv --allow-outside --skip-bad"  # tested with a server in test_layouts.py


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder with everything that the table names."""
    top = tmp_path_factory.mktemp("layouts")
    coco(top / "coco")
    images(top / "coco" / "val2017", *NAMES)
    put(
        top / "json" / "captions_val2017.json",
        (top / "coco" / "annotations" / "captions_val2017.json").read_bytes(),
    )
    images(top / "photos" / "val2017", *NAMES)
    _, names = karpathy(top / "karpathy", True)
    images(top / "photos", *(f"{name.split('_')[1]}/{name}" for name in names))
    plain, _ = karpathy(top / "plain", False)
    plain.rename(top / "karpathy" / "dataset_flickr30k.json")
    images(top / "flickr30k-images", *names)
    for name, folder, photos in (
        ("captions.txt", "flickr8k", "flickr8k/Images"),
        ("Flickr8k.token.txt", "Flickr8k_text", "Flicker8k_Dataset"),
        ("results.csv", "flickr30k", "flickr30k/flickr30k_images"),
        ("flickr_annotations_30k.csv", "flickr30k", "flickr30k/flickr30k_images"),
    ):
        broken = "10002456.jpg| 4   A dog .\n" if name == "results.csv" else ""
        put(top / folder / name, FLICKR[name][0] + broken)
        images(top / photos, *FLICKR[name][1])
    images(top, "bus.jpg")
    put(top / "train.csv", "filepath\ttitle\nbus.jpg\ta red bus\n")
    put(top / "mine.csv", f"picture,words\n{top / 'bus.jpg'},a green bus\n")
    put(
        top / "coco_karpathy_val.json", json.dumps([{"image": "bus.jpg", "caption": ["A man.", "A person."]}])
    )
    for end, data in (("jpg", encoded(0)), ("txt", b"a cat"), ("json", b'{"caption": "a cat, again"}')):
        put(top / "i2d_files" / "00000" / f"000000000.{end}", data)
    img2dataset_tars(top / "i2d_tars")
    (top / "i2d_parquet").mkdir()
    rows = {"key": ["0", "1"], "txt": ["a cat", None], "jpg": [encoded(0), None]}
    pq.write_table(pa.table(rows), top / "i2d_parquet" / "00000.parquet")
    for name, end, data in (("wds_flickr30k", "txt", b"a cat\na grey cat"), ("wds_cifar10", "cls", b"3")):
        tar(top / name / "test" / "0.tar", ("s0000000.webp", encoded(0)), (f"s0000000.{end}", data))
        put(top / name / "test" / "nshards.txt", "1\n")
    images(top / "photos_txt", "a.jpg")
    put(top / "photos_txt" / "a.txt", "a cat")
    images(top / "imagenet" / "val" / "n01440764", "x.JPEG")
    images(top / "photos_csv", "a.jpg")
    put(top / "photos_csv" / "metadata.csv", "file_name,text\na.jpg,a cat\n")
    row = {
        "image": [{"bytes": encoded(0), "path": None}],
        "translation": [{"en": "a cat", "de": "eine Katze"}],
    }
    pq.write_table(pa.table(row), top / "multi30k.parquet")
    return top


def test_the_table_is_complete():
    assert set(COMMANDS) == {*EXPECTED, FROM_THE_WEB}


@pytest.mark.parametrize("command", EXPECTED)
def test_commands_of_the_table(place, command, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    said = CliRunner().invoke(app, shlex.split(command))
    assert said.exit_code == 0, said.output
    first, among = EXPECTED[command]
    assert said.output.lstrip().startswith(f"{first} ·") and among in said.output


def test_the_lines_for_objects_in_memory(place, monkeypatch):
    lines = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if re.match(r"mm\.data\.pairs\([d\[]", line)
    ]
    assert len(lines) == 2
    monkeypatch.chdir(place)
    image = Image.new("RGB", (8, 8))
    for line, texts in zip(lines, (["a cup"], ["a cat", "a dog"]), strict=True):
        code = line.partition("#")[0]
        assert eval(code, {"mm": mm, "dataset": [(image, "a cup")], "image": image}).texts == texts
