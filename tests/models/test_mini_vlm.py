"""mini-vlm as shipped: it answers through mm.load, its answers depend on the picture, and hooks act on them."""

from __future__ import annotations

import random

import pytest
import torch

import mmhooks as mm
from mmhooks.data.synthetic import scenes
from mmhooks.data.synthetic.questions import ask
from mmhooks.errors import MMHooksError
from mmhooks.utils.assets import card

ASKED = ("what", "count of", "colour", "read", "exists")


@pytest.fixture(scope="module")
def vlm():
    return mm.load("mini-vlm")


@pytest.fixture(scope="module")
def asked():
    """Pictures made here, not those of the card, each with one question; and what is right."""
    rng, found = random.Random("shipped"), []
    while len(found) < 60:
        scene = scenes.sample_scene(rng)
        question = ask(ASKED[len(found) % len(ASKED)], scene, rng)
        if question is not None:
            found.append((scenes.render(scene, scenes.openmoji_drawing), question))
    pictures = torch.stack([torch.from_numpy(picture) for picture, _ in found])
    return pictures.permute(0, 3, 1, 2).float() / 255, [question for _, question in found]


def accuracy(said, asked):
    return sum(text == question.answer for text, question in zip(said, asked, strict=True)) / len(said)


def test_it_answers_from_the_picture_as_its_card_says(vlm, asked):
    """The shipped weights through the public call reproduce the card; a tower or projector that is not loaded does not."""
    pictures, questions = asked
    texts = [question.text for question in questions]
    right = accuracy(vlm.answer(pictures, texts), questions)
    wrong = accuracy(vlm.answer(pictures.roll(1, 0), texts), questions)
    kinds = card("mini-vlm")["exams"]["pictures"]["taught"]
    expected = {
        side: sum(kinds[kind][side]["value"] for kind in ASKED) / len(ASKED) for side in ("right", "wrong")
    }
    assert right == pytest.approx(expected["right"], abs=0.15)
    assert wrong == pytest.approx(expected["wrong"], abs=0.2)
    assert right > wrong + 0.2


def test_every_kind_of_question_is_looked_at():
    """The card's intervals: with the right picture above a wrong one and above chance, by kind."""
    exams = card("mini-vlm")["exams"]["pictures"]
    assert set(exams) >= {"taught", "unseen pair", "unseen paint", "unseen concept"}
    for kind, row in exams["taught"].items():
        assert row["right"]["low"] > max(row["wrong"]["high"], row["chance"]), kind


def test_without_its_picture_it_cannot_tell(vlm, asked):
    """With nothing from the projector; and hooks that do nothing change no answer."""
    pictures, questions = asked
    read = [i for i, q in enumerate(questions) if q.kind in ("what", "colour", "read")][:24]
    texts, chosen = [questions[i].text for i in read], [questions[i] for i in read]
    with vlm.hooks(mm.Zero(at="projector.out")):
        blind = accuracy(vlm.generate(pictures[read], texts, max_new_tokens=3).texts, chosen)
    seen = accuracy(vlm.answer(pictures[read], texts), chosen)
    assert blind < seen - 0.2
    plain = vlm.answer(pictures[:4], texts[:4])
    with vlm.hooks():
        assert vlm.answer(pictures[:4], texts[:4]) == plain


def test_it_is_typed_and_takes_no_options_of_open_clip(vlm):
    assert isinstance(vlm, mm.HookedVLM) and vlm.name == "mini-vlm"
    with pytest.raises(MMHooksError, match="'mini-vlm' is embedded: it takes no pretrained="):
        mm.load("mini-vlm", pretrained="openai")
    assert mm.load("mini-vlm", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_list_of_tensors_is_seen_as_the_batch_is(vlm, asked):
    pictures, questions = asked
    texts = [question.text for question in questions[:8]]
    assert vlm.answer(list(pictures[:8]), texts) == vlm.answer(pictures[:8], texts)
