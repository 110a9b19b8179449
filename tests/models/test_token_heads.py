"""The embedded heads on tokens: they load, fit their site, and reconstruct a sample as their cards say."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.data.families import drawing_family
from mmhooks.data.synthetic.questions import ask
from mmhooks.data.synthetic.scenes import openmoji_drawing, render, sample_scene
from mmhooks.heads import Head


def fvu(head: Head, rows: torch.Tensor) -> float:
    with torch.no_grad():
        error = (rows - head(rows)).square().sum()
    return float(error / (rows - rows.mean(0)).square().sum())


def test_patches_of_drawings_that_no_training_saw(tmp_path: Path) -> None:
    head, model = mm.load_head("mini/patch-sae"), mm.load("mini")
    card = head.info
    assert (head.d_in, head.n_features, head.k) == (192, 1024, 16) and mm.load_head(
        "mini/patch-sae"
    ).id == head.id
    pairs = mm.data.pairs("mini")
    known = {drawing_family(t) for t, s in zip(pairs.texts, pairs.splits, strict=True) if s == "train"}
    unseen = [i for i, text in enumerate(pairs.texts) if drawing_family(text) not in known]
    assert len(unseen) * 64 == card["held_out"]["tokens"]
    chosen = pairs.select(random.Random(0).sample(unseen, 128))
    store = mm.extract(model, chosen, card["site"], tmp_path / "acts", tokens=card["tokens"], progress=False)
    rows = store[card["site"]].span(0, len(store))
    held = card["held_out"]
    # A quarter of the families: twice the width of the card's interval.
    width = held["fvu"]["high"] - held["fvu"]["low"]
    assert fvu(head, rows) == pytest.approx(held["fvu"]["value"], abs=width)
    active = (head.encode(rows) > 0).sum(1).float()
    assert float(active.max()) <= 16 and float(active.mean()) == pytest.approx(held["l0"], abs=0.05)
    noise = torch.randn(512, 192, generator=torch.Generator().manual_seed(0)) * rows.std(0) + rows.mean(0)
    assert fvu(head, noise) > 5 * fvu(head, rows)


def test_patch_features_point_at_objects_as_the_card_says() -> None:
    """Over new composed pictures, by mm.heat: a witness of the recipe's own sums."""
    head, model = mm.load_head("mini/patch-sae"), mm.load("mini")
    found = head.info["pointing"]["scenes"]
    rng = random.Random("new scenes")
    scenes = [sample_scene(rng) for _ in range(60)]
    drawn = [render(scene, openmoji_drawing) for scene in scenes]
    grounds = [render(replace(scene, things=()), openmoji_drawing) for scene in scenes]
    images = [Image.fromarray(picture) for picture in drawn]
    hits = []
    for heats in mm.heat(head, model, images, found["features"], head.info["site"]).values():
        for heat, picture, ground in zip(heats, drawn, grounds, strict=True):
            if float(heat.values.max()) > 0:
                x, y = heat.peak
                hits.append(bool((picture != ground).any(-1)[int(y), int(x)]))
    rate = sum(hits) / len(hits)
    assert len(hits) > 50 and rate == pytest.approx(found["hits"]["value"], abs=0.12)
    assert rate > found["chance"]["high"]


def test_prompts_about_new_scenes() -> None:
    head, model = mm.load_head("mini-vlm/lm-sae"), mm.load("mini-vlm")
    card, rng = head.info, random.Random("new prompts")
    assert (head.d_in, head.n_features, head.k) == (192, 1024, 16) and mm.load_head(
        "mini-vlm/lm-sae"
    ).id == head.id
    images, words, truth = [], [], []
    while len(images) < 64:
        scene = sample_scene(rng)
        question = ask(("ground", "count", "read", "colour")[len(images) % 4], scene, rng)
        if question is not None:
            images.append(Image.fromarray(render(scene, openmoji_drawing)))
            words.append(question.text)
            truth.append(question.answer)
    with torch.no_grad(), model.caching(card["site"], tokens="image") as cache:
        model.forward(**model.inputs(images, words))
    rows = cache[card["site"]].flatten(0, 1)
    held = card["held_out"]["image"]
    assert fvu(head, rows) == pytest.approx(held["fvu"]["value"], abs=0.15 * held["fvu"]["value"])
    active = (head.encode(rows) > 0).sum(1).float()
    assert float(active.max()) <= 16 and float(active.mean()) == pytest.approx(held["l0"], abs=0.1)
    kinds = ("colour", "count", "ground", "read")
    model.attach(head, at=card["site"], error_term=False)
    with model.hooks(mask=[]):
        said = model.answer(images, words, max_new_tokens=3)
    right = sum(text == answer for text, answer in zip(said, truth, strict=True)) / 64
    expected = sum(card["answers"]["rebuilt"]["by_kind"][kind]["value"] for kind in kinds) / 4
    assert right == pytest.approx(expected, abs=0.15)
