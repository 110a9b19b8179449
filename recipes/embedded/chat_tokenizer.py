"""What the tokenizers of the embedded vision-language models share: special tokens, and the Hugging Face class around."""

from __future__ import annotations

from typing import Any

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def as_chat_tokenizer(plain: Any) -> Any:
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
