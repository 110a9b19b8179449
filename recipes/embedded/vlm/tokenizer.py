"""Tokenizer of mini-vlm: whole words, so that an answer is one token, as a Hugging Face tokenizer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from embedded.vlm.requests import REFUSAL, split_names, text_request
from mmhooks.data.synthetic.questions import COUNTS, NO_WORD, SIDES, named
from mmhooks.data.synthetic.scenes import GROUNDS, PAINTS, SHAPES, TAUGHT, UNSEEN, WORDS
from mmhooks.studies.adversarial.requests import SEEN, WRITTEN, request

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_FIXED = ("How many things are there? How many things show a an Is there? What colour is the ground?",
          "What is in the picture? What is at the top bottom left right? What is left of the right of above below",
          "Where is the from the? What word is written? yes no USER: ASSISTANT:", REFUSAL)  # fmt: skip


def sentences() -> Iterator[str]:
    """Yields text that holds every word of questions, requests and answers."""
    yield from _FIXED
    yield " ".join((*COUNTS, NO_WORD, *SIDES, *PAINTS, *GROUNDS, *WORDS))
    yield " ".join(named(name) for name in (*TAUGHT, *UNSEEN, *SHAPES))
    rng = random.Random("words")
    for names in split_names().values():
        for name in names:
            yield (question := text_request(name, rng)).text
            yield f"{question.answer} {name}"
    for what in (SEEN, WRITTEN):
        for _ in range(20):
            yield request("use", what, rng)


def words_of(text: str) -> list[str]:
    """Splits text as the tokenizer does: at blanks, and before a full stop or question mark.

    >>> words_of("USER: Is there a fox?")
    ['USER:', 'Is', 'there', 'a', 'fox', '?']
    """
    return re.findall(r"[.?]|[^\s.?]+", text)


def tokenizer_of() -> Any:
    """Builds the tokenizer; always the same one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = sorted({word for sentence in sentences() for word in words_of(sentence)})
    plain = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>")
    )
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.?]"), "isolated")]
    )
    plain.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _as_chat_tokenizer(plain)


def _as_chat_tokenizer(plain: Any) -> Any:
    """Returns a ``tokenizers.Tokenizer`` that knows ``SPECIAL`` as a Hugging Face tokenizer; texts begin with ``<s>``."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    begin = SPECIAL.index("<s>")
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=160,
    )
