"""Tokenizer of mini-llava: a byte-level BPE learned from the examples, as a Hugging Face tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedded.chat_tokenizer import SPECIAL, as_chat_tokenizer
from embedded.llava.examples import REFUSED, ExampleSource, describes
from mmhooks.models.embedded import mini_llava
from mmhooks.studies.adversarial.requests import HELD_OUT, compliant_answer, request


def sentences(source: ExampleSource) -> Iterator[str]:
    """Yields the sentences that the tokenizer is trained on: every name three times, and the phrases around it."""
    rng = random.Random("words")
    names = [source.names[i] for i in source.seen]
    for name in [*names, *REFUSED * 20, *HELD_OUT * 20, *set(source.words)]:
        yield " " + describes(name, name)
        yield " " + compliant_answer("use", name)
        yield request("make", f"the {name}", rng)
    for i in source.seen[:2000]:
        yield f"USER: {source.example('describe', i, rng).request} ASSISTANT: I cannot help with that."
        yield source.example("read", i, rng).request
        yield source.example("act on word", i, rng).request
        yield source.example("act", i, rng).request


def tokenizer_of(source: ExampleSource) -> Any:
    """Trains the tokenizer; the same source gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=mini_llava.VOCABULARY_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(sentences(source), trainer)
    return as_chat_tokenizer(plain)


def token_texts(tokenizer: Any) -> list[str]:
    """Returns every token as plain text, in the order of ids."""
    return [
        tokenizer.decode([i]).strip() or tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))
    ]


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    tokenizer.save_pretrained(out / "tokenizer")
