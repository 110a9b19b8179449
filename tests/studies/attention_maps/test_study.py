"""The attention-map study end to end on a tiny pipeline; its pointing game and verdict can go both ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmhooks.studies.attention_maps import images as attention_map_images
from mmhooks.studies.attention_maps import study as recipe

sys.path.append(str(Path(__file__).parents[2] / "models"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from pipelines import build

    where = tmp_path_factory.mktemp("pipe")
    build("sd1").save_pretrained(where)
    return where


def run(*args):
    return CliRunner().invoke(recipe.app, [str(a) for a in args])


def test_prompts(pipeline, tmp_path):
    done = run(
        "--pipeline", pipeline, "--steps", 2, "--out", tmp_path, "--prompt", "a red panda", "--prompt", "blue kite"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["words"] == [["a", "red", "panda"], ["blue", "kite"]] and "games" not in result
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 5 and (tmp_path / "heat.png").is_file()
    failed = run(
        "--pipeline", pipeline, "--steps", 2, "--prompt", "a red panda", "--word", "dog", "--out", tmp_path
    )
    assert failed.exit_code == 1 and "'dog' is not among" in failed.output
    failed = run("--pipeline", pipeline, "--out", tmp_path)
    assert failed.exit_code == 1 and "lists no drawings" in failed.output


def test_known_drawings(pipeline, tmp_path):
    listed = {"drawings": [{"name": name} for name in ("red panda", "kite", "house")]}
    (pipeline / "drawings.json").write_text(json.dumps(listed))
    found = recipe.run(
        recipe.Options(pipeline=str(pipeline), steps=2, out=tmp_path, template="a {}", batch=2)
    )
    result = json.loads((tmp_path / "results.json").read_text())
    assert result == found.found
    assert set(found.paths) == {p for p in tmp_path.rglob("*") if p.is_file()}
    assert result["prompts"] == ["a red panda", "a kite", "a house"]
    assert set(result["games"]) == {"object", "another picture's heat", 'the word "a"'}
    assert result["verdict"] in (tmp_path / "results.md").read_text()
    assert set(result["overlaps"]) == set(result["games"]) and result["resize"] == "bilinear"
    assert result["overlaps"]["object"]["threshold"] == 0.4 and "IoU" in (tmp_path / "results.md").read_text()
    bicubic = recipe.Options(
        pipeline=str(pipeline), steps=2, out=tmp_path / "bicubic", template="a {}", batch=2, resize="bicubic"
    )
    other = recipe.run(bicubic).found
    assert other["games"]["object"]["energy"] != result["games"]["object"]["energy"]
    failed = run("--pipeline", pipeline, "--steps", 2, "--resize", "nearest", "--out", tmp_path)
    assert failed.exit_code == 1 and "expected bilinear or bicubic, got 'nearest'" in failed.output
    (pipeline / "drawings.json").unlink()


@pytest.mark.parametrize("right", [True, False])
def test_verdict(right):
    drawn = []
    for n in range(40):
        image = Image.new("RGB", (16, 16), "white")
        image.paste("red", (0, 0, 6, 6))
        heat = torch.zeros(4, 4)
        heat[(0, 0) if right or n < 4 else (3, 3)] = 1
        drawn.append(attention_map_images.Drawn("a kite", image, {"kite": heat}))
    games = attention_map_images.play_pointing_game(drawn)
    assert games["object"].chance == pytest.approx(36 / 256)
    assert ("not more often" in attention_map_images.verdict_sentence(games)) != right
