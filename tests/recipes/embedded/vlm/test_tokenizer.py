"""mini-vlm's tokenizer: every word of every question is one token, and an answer reads as it was written."""

from __future__ import annotations

import random

from embedded.vlm import requests, tokenizer
from embedded.vlm.packing import Packer

from mmhooks.data.synthetic.questions import KINDS, ask
from mmhooks.data.synthetic.scenes import COMBINATIONS, sample_scene
from mmhooks.models.vlm.model import IMAGE_PREFIX, PROMPT


def test_packing_cuts_words_as_the_tokenizer_does_and_knows_them_all() -> None:
    made, rng = tokenizer.tokenizer_of(), random.Random(0)
    packer = Packer(made)
    asked = [requests.taught_request(rng) for _ in range(50)]
    for combination in COMBINATIONS:
        for _ in range(60):
            scene = sample_scene(rng, combination)
            asked += [q for kind in KINDS if (q := ask(kind, scene, rng, combination))]
            asked += [q for q in (requests.act_on_thing(scene, rng), requests.act_on_word(scene, rng)) if q]
    for question in asked:
        prompt = PROMPT.format(sight=IMAGE_PREFIX, request=question.text)
        ids = made(prompt)["input_ids"]
        assert ids == [1, *packer.ids(f"USER: <image> {question.text} ASSISTANT:")]
        assert made.unk_token_id not in ids
        said = packer.ids(question.answer)
        assert made.decode(said) == question.answer
        assert len(said) == 1 or question.kind in ("act", "act on word", "refuse", "comply")


def test_the_same_tokenizer_every_time() -> None:
    assert tokenizer.tokenizer_of().get_vocab() == tokenizer.tokenizer_of().get_vocab()
