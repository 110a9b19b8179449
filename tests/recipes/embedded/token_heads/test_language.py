"""mini-vlm/lm-sae: questions about scenes as pairs, which rows are which, what splices do, and the recipe at tiny size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from embedded.token_heads import language

import mmhooks as mm
from mmhooks.data.synthetic.questions import KINDS

SITE = "lm.blocks.1.resid_post"


@pytest.fixture(scope="module")
def model() -> mm.HookedVLM:
    return mm.load("mini-vlm")


@pytest.fixture(scope="module")
def scenes() -> language.Asked:
    return language.asked(20, "test")


def test_scenes_are_the_same_every_time_with_every_kind_of_question(scenes: language.Asked) -> None:
    again, other = language.asked(20, "test"), language.asked(20, "other")
    assert [q.kind for q in scenes.questions] == [*KINDS, *KINDS]
    assert again.pairs.texts == scenes.pairs.texts == [q.text for q in scenes.questions]
    assert np.array_equal(np.asarray(again.pairs.image(7)), np.asarray(scenes.pairs.image(7)))
    assert again.pairs.fingerprint == scenes.pairs.fingerprint != other.pairs.fingerprint


def test_rows_of_the_image_and_of_the_question(
    model: mm.HookedVLM, scenes: language.Asked, tmp_path: Path
) -> None:
    options = {"dtype": "fp32", "batch_size": 5, "progress": False}
    whole = mm.extract(model, scenes.pairs, SITE, tmp_path / "prompt", tokens="prompt", **options)
    image = mm.extract(model, scenes.pairs, SITE, tmp_path / "image", tokens="image", **options)
    kinds = language.kinds_of(model, whole)
    rows = language.rows_of(whole, SITE)
    assert torch.equal(rows[kinds.image], language.rows_of(image, SITE))
    ids = [
        model.read([scenes.pairs.image(i)], [text])["input_ids"][0]
        for i, text in enumerate(scenes.pairs.texts)
    ]
    marked = int(model.model.config.image_token_id)
    after = [len(row) - 1 - int((row == marked).nonzero().max()) for row in ids]
    assert int(kinds.question.sum()) == sum(after) and not bool((kinds.question & kinds.image).any())


def test_answers_are_those_of_the_model_and_of_its_reconstruction(
    model: mm.HookedVLM, scenes: language.Asked
) -> None:
    asked = language.prompts(model, scenes, batch=8)
    found = language.answers(model, asked)
    images = [scenes.pairs.image(i) for i in range(20)]
    said = model.answer(images, scenes.pairs.texts, max_new_tokens=4)
    right = [text == q.answer for text, q in zip(said, scenes.questions, strict=True)]
    assert found.right.tolist() == right and sum(right) / 20 > 0.5
    head = mm.TopKSAE(192, 64, 8)

    def by_hand(x: torch.Tensor, *, hook: object) -> torch.Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        return norm * head.decode(head.encode(x / norm))

    with torch.no_grad(), model.hooks(fwd_hooks=[(SITE, by_hand)]):
        logits = model.forward(**asked.inputs[0]).logits[:, -1]
    want = torch.nn.functional.cross_entropy(logits, asked.truth[0], reduction="none")
    torch.testing.assert_close(language.rebuilt(model, asked, head, SITE).loss[:8], want)
    assert not model.places.attachments


def test_the_recipe_at_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "head"
    language.main(acts=tmp_path / "acts", features=48, epochs=1, train=30, test=20, out=out)
    head = mm.load_head(out)
    card = head.info
    assert (head.d_in, head.n_features, head.k) == (192, 48, 16) and card["tokens"] == "prompt"
    rows = [row for row in card["candidates"] if row["k"] == 16]
    assert [row["site"] for row in rows] == [f"lm.blocks.{layer}.resid_post" for layer in range(4)]
    assert card["site"] == max(rows, key=lambda row: row["saved"])["site"]
    last = rows[-1]  # nothing reads the last block's image tokens
    assert last["cross_entropy"]["mean image"] == pytest.approx(last["cross_entropy"]["model"], abs=1e-5)
    assert last["cross_entropy"]["mean"] > last["cross_entropy"]["model"]
    assert {*card["answers"]} == {"model", "rebuilt", "mean image", "mean"}
    assert {*card["answers"]["rebuilt"]["by_kind"]} == {*KINDS}
    assert {*card["held_out"]} == {"image", "question"}
