"""Extraction of a vision-language model by token: rows are those of a run with a cache, for every kind, ragged or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.data.pair_set import Pairs, Row
from mmhooks.errors import ShapeMismatch

SITES = ["lm.blocks.0.resid_post", "lm.blocks.2.resid_post"]
TEXTS = [
    "What is it?",
    "What is at the top right?",
    "How many things are there?",
    "Which colour is the circle?",
    "Is there a fox?",
    "Where is the fox from the owl?",
    "What word is written?",
]


class Colours:
    """A source of plain images."""

    def open(self, image_key: int | str) -> Image.Image:
        return Image.new("RGB", (64, 64), (30 * int(image_key), 90, 250 - 30 * int(image_key)))


@pytest.fixture(scope="module")
def model() -> mm.HookedVLM:
    return mm.load("mini-vlm")


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    rows = [Row(f"pair{i}", text, i) for i, text in enumerate(TEXTS)]
    return Pairs(rows, Colours(), name="colours", content="seven")


def alone(model: mm.HookedVLM, pairs: Pairs, site: str, number: int) -> tuple[Any, Any]:
    """Ids and activations of one pair, run by itself: without padding."""
    inputs = model.inputs([pairs.image(number)], [pairs.texts[number]])
    with torch.no_grad(), model.caching(site) as cache:
        model.forward(**inputs)
    return inputs["input_ids"][0], cache[site][0]


@pytest.mark.parametrize("kind", ["image", "text", "prompt", "last", ("image", 0)])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_those_of_a_run_with_a_cache(model, pairs, tmp_path: Path, kind, workers) -> None:
    if workers and kind != "text":
        pytest.skip("one kind with workers is enough")
    store = mm.extract(
        model, pairs, SITES, tmp_path / "acts", tokens=kind, batch_size=3, workers=workers, progress=False
    )
    marked = int(model.model.config.image_token_id)
    counts = []
    for number in range(len(pairs)):
        for site in SITES:
            ids, values = alone(model, pairs, site, number)
            image = ids == marked
            last = torch.arange(len(ids)) == len(ids) - 1
            want = {"image": image, "text": ~image, "last": last}.get(kind, image | ~image)
            want = image if kind == ("image", 0) else want
            found = store.sequence(site, number)
            torch.testing.assert_close(found, values[want], atol=2e-4, rtol=1e-4)
        counts.append(len(found))
        assert store.pairs.span(pairs.ids[number])[1] - store.pairs.span(number)[0] == len(found)
    assert store.by_token and len(store) == sum(counts)
    assert (len(set(counts)) > 1) == (kind in ("text", "prompt"))
    assert store.tokens.tolist() == [i for count in counts for i in range(count)]


def test_a_store_of_prompts_is_trained_from_and_streamed_alike(model, pairs, tmp_path: Path) -> None:
    options = {"tokens": "prompt", "batch_size": 3, "workers": 0}
    store = mm.extract(model, pairs, SITES[0], tmp_path / "acts", progress=False, **options)
    streamed = mm.stream(model, pairs, SITES[0], buffer=10_000, **options)
    rows = torch.cat([batch[SITES[0]] for batch in streamed.batches(64)])
    kept = store[SITES[0]].span(0, len(store))
    assert len(rows) == len(kept)
    torch.testing.assert_close(rows.sum(1).sort().values, kept.sum(1).sort().values)
    head = mm.TopKSAE(192, 32, 4)
    mm.train_head(head, store, sites=[SITES[0]], epochs=8, batch_size=64, progress=False)
    untrained = mm.TopKSAE(192, 32, 4)
    assert mm.fidelity(head, kept).fvu < 0.5 * mm.fidelity(untrained, kept).fvu


def test_latents_by_token_are_those_of_the_head(model, pairs, tmp_path: Path) -> None:
    head = mm.TopKSAE(192, 64, 4, name="sae")
    model.attach(head, at=SITES[0])
    try:
        names = [SITES[0], f"{SITES[0]}.sae.latents"]
        store = mm.extract(
            model, pairs, names, tmp_path / "acts", tokens="prompt", batch_size=3, progress=False
        )
    finally:
        model.detach("sae")
    with torch.no_grad():
        want = head.encode(store[names[0]].span(0, len(store)))
    torch.testing.assert_close(store[names[1]].span(0, len(store)).dense(), want, atol=1e-4, rtol=1e-4)


def test_kinds_that_a_site_does_not_hold(model, pairs, tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match="patch"):
        mm.extract(model, pairs, SITES[0], tmp_path / "a", tokens="patch", progress=False)
    with pytest.raises(ShapeMismatch, match="known at lm"):
        mm.extract(
            model, pairs, "image.blocks.0.resid_post", tmp_path / "b", tokens=("image", 0), progress=False
        )
