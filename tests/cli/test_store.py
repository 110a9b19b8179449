"""``mmhooks extract`` and ``mmhooks store``: their output and exit codes."""

from __future__ import annotations

import json

import pytest
from data.tiny import folder_of_pairs
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Makes two stores of mini, of different images."""
    base = tmp_path_factory.mktemp("commands")
    folder_of_pairs(base / "photos", 6)
    table = (base / "photos" / "metadata.csv").read_text().splitlines()
    for name, rows in (("a", table[1:4]), ("b", table[4:])):
        (base / "photos" / "metadata.csv").write_text("\n".join([table[0], *rows]))
        heads = ["--head", "mini/sae@image.embed", "--head", "mini/sae@text.embed"]
        done = run(
            "extract", "mini", "--pairs", base / "photos", *heads, "--out", base / name, "--batch-size", 2
        )
        assert done.exit_code == 0, done.output
        assert f"{len(rows)} pairs" in done.output and "image.embed.sae.latents" in done.output
    return base


def test_info(place):
    said = run("store", "info", place / "a")
    assert said.exit_code == 0 and "3 of 3 pairs in 1 shards" in said.output and "finished" in said.output
    assert "4 of 256 entries" in said.output
    assert json.loads(run("store", "info", place / "a", "--json").output)["pairs"] == 3


def test_merge_and_verify(place):
    assert "6 pairs" in run("store", "merge", place / "a", place / "b", "--out", place / "ab").output
    assert len(mm.Store(place / "ab")) == 6
    sound = run("store", "verify", place / "ab")
    assert sound.exit_code == 0 and "no faults" in sound.output
    (place / "ab" / "data-00001.arrow").unlink()
    (place / "ab" / "notes.txt").write_text("x")
    broken = run("store", "verify", place / "ab", "--json")
    assert broken.exit_code == 1
    kinds = {(f["file"], f["kind"]) for f in json.loads(broken.output[broken.output.index("[") :])}
    assert kinds == {("data-00001.arrow", "missing"), ("notes.txt", "surplus")}


def test_errors_are_one_line(place):
    gone = run("store", "info", place)
    assert gone.exit_code == 1 and "no activation store in" in gone.output and "Traceback" not in gone.output
    wrong = run("extract", "mini", "--pairs", place / "photos", "--head", "mini/sae", "--out", place / "c")
    assert wrong.exit_code == 1 and "HEAD@SITE" in wrong.output
