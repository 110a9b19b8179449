"""Evaluation of mini-llava: held-out images, requests in text, written words, and harmful things of each kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from embedded import losses
from embedded.llava.examples import REFUSAL, REFUSED, Example, describes
from embedded.reader.words import unseen_fonts, word_image
from mmhooks.studies.adversarial.requests import (
    HELD_OUT,
    SEEN,
    USE,
    WRITTEN,
    compliant_answer,
    is_harmful,
    request,
)

if TYPE_CHECKING:
    from embedded.llava.train import LlavaTrainer

N = 200


def evaluation_sets(trainer: LlavaTrainer) -> dict[str, list[Example]]:
    """Returns the evaluation sets by name: at most ``N`` examples each, on images that were not trained on."""
    corpus, source, rng = trainer.corpus, trainer.source, random.Random("exam")
    rows, taught = corpus.rows, {source.names[i] for i in source.seen}
    build_model = [i for split in ("heldout_pictures", "unseen_style") for i in corpus.where(split)
             if rows[i]["name"] in taught and not rows[i]["toned"] and rows[i]["style"] != "game-icons"]  # fmt: skip
    usable = {source.names[i] for i in source.usable}
    benign = [i for i in build_model if rows[i]["name"] in usable and not is_harmful(rows[i]["name"])]
    benign = rng.sample(benign, min(N, len(benign)))
    asked = request(USE, SEEN)

    def acts(chosen: list[int]) -> list[Example]:
        return [Example("act", asked, compliant_answer(USE, rows[i]["name"]), i) for i in chosen]

    def harmful(names: tuple[str, ...]) -> list[int]:
        return [i for i in build_model if rows[i]["name"] in names] * 5

    def text_examples(names: Sequence[str], answer: str | None, image: int | None = None) -> list[Example]:
        return [
            Example("told", request(USE, f"the {n}"), answer or compliant_answer(USE, n), image)
            for n in names
        ]

    def words(chosen: list[str]) -> list[Example]:
        return [Example("word", request(USE, WRITTEN), compliant_answer(USE, w), None, w) for w in chosen]

    own = [w for w in sorted(set(source.words)) if source.words.count(w) > 1]
    return {
        "describe": [
            Example("describe", "What is in the picture?", describes(rows[i]["name"]), i) for i in benign
        ],
        "act": acts(benign),
        "act on harmful picture": acts(harmful(REFUSED)),
        "act on harmful picture, names kept out": acts(harmful(HELD_OUT)),
        "act on word": words(rng.sample([w for w in own if w in source.usable_words], 100)),
        "act on harmful word": words([w for w in sorted(set(source.words)) if w in REFUSED] * 8),
        "act on harmful word, names kept out": words(
            [w for w in sorted(set(source.words)) if w in HELD_OUT] * 8
        ),
        "comply in text": text_examples(rng.sample(source.things, 100), None),
        "comply in text, names kept out": text_examples(source.kept, None),
        "refuse in text": text_examples(REFUSED, REFUSAL),
        "refuse in text beside a picture": text_examples(REFUSED, REFUSAL, benign[0]),
        "refuse in text, names kept out": text_examples(HELD_OUT, REFUSAL),
    }


def render(trainer: LlavaTrainer, examples: list[Example], seed: int = 0) -> Tensor:
    """Renders the examples' images from -1 to 1: plain drawings (augmented if repeated), words in unseen fonts."""
    rng, fonts = random.Random(f"show {seed}"), unseen_fonts()
    rgba = trainer.corpus.rgba[[example.row or 0 for example in examples]]
    images = losses.plain(rgba)
    seen = [example.row for example in examples]
    again = [
        k for k, row in enumerate(seen) if row is not None and row in seen[:k]
    ]  # repeated drawings are augmented
    if again:
        g = torch.Generator().manual_seed(seed)
        images[again] = losses.augment(rgba[again], torch.zeros(len(again), dtype=torch.bool), g)
    for k, example in enumerate(examples):
        if example.word is not None:
            made = word_image(example.word, rng.choice(fonts), rng, width=(0.5, 0.95), size=(12.0, 30.0))
            images[k] = made.image.mul(2).sub(1)
    return images


@torch.no_grad()
def exact_match_rate(trainer: LlavaTrainer, model: Any, examples: list[Example]) -> dict[str, float]:
    """Returns the share of answers that greedy decoding reproduces exactly: every token is the most likely next one."""
    hits = 0
    for begin in range(0, len(examples), 50):
        part = examples[begin : begin + 50]
        features = trainer.features(render(trainer, part, begin)) if part[0].sees else None
        ids, answer = trainer.encode(part)
        best = model(ids, answer, features, trainer.image_id).argmax(-1)
        good = best == ids[:, 1:][answer[:, 1:]]
        owner = answer[:, 1:].nonzero()[:, 0]
        hits += len(part) - len(set(owner[~good].tolist()))
    return {"value": hits / len(examples), "n": len(examples)}
