"""mini-llava's words: a byte-level BPE learned from the lessons, as a Hugging Face tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedded.llava.lessons import REFUSED, Curriculum, describes
from mmhooks.models.embedded import mini_llava
from mmhooks.studies.adversarial.requests import HELD_OUT, complies, request

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def sentences(course: Curriculum) -> Iterator[str]:
    """What the tokenizer learns from: every name three times, and what is said around it."""
    dice = random.Random("words")
    names = [course.names[i] for i in course.seen]
    for name in [*names, *REFUSED * 20, *HELD_OUT * 20, *set(course.words)]:
        yield " " + describes(name, name)
        yield " " + complies("use", name)
        yield request("make", f"the {name}", dice)
    for i in course.seen[:2000]:
        yield f"USER: {course.lesson('describe', i, dice).request} ASSISTANT: I cannot help with that."
        yield course.lesson("read", i, dice).request
        yield course.lesson("act on word", i, dice).request
        yield course.lesson("act", i, dice).request


def tokenizer_of(course: Curriculum) -> Any:
    """The same course gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=mini_llava.VOCABULARY_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(sentences(course), trainer)
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
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


def spelled(tokenizer: Any) -> list[str]:
    """Every piece in plain letters, in the order of ids."""
    return [
        tokenizer.decode([i]).strip() or tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))
    ]


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    tokenizer.save_pretrained(out / "tokenizer")
