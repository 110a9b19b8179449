"""Several questions about one picture in one row: each sees the picture and itself, as if it were asked alone.

The picture's 65 tokens cost more than a question, so eight questions a row cost little more than two rows would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from embedded.vlm.tokenizer import words_of
from mmhooks.data.synthetic.questions import Question
from mmhooks.models.embedded.mini_vlm import TOKENS


@dataclass(frozen=True)
class Packed:
    """Rows of questions as token ids, padded on the right.

    Attributes:
        segment: 0 for the prefix, k for the k-th question of the row, -1 for padding.
        position: the place that each token has when its question is asked alone.
        answer: which tokens belong to answers, their end included.
    """

    ids: Int[Tensor, "b t"]
    segment: Int[Tensor, "b t"]
    position: Int[Tensor, "b t"]
    answer: Bool[Tensor, "b t"]

    def mask(self) -> Float[Tensor, "b 1 t t"]:
        """Returns what is added to the scores: 0 where a token may look, else the least number of the type."""
        own = self.segment[:, :, None] == self.segment[:, None, :]
        prefix = (self.segment == 0)[:, None, :]
        may = (own | prefix) & torch.ones(own.shape[1:], dtype=torch.bool).tril()
        return torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)[:, None]

    def owners(self) -> Int[Tensor, " tokens"]:
        """Returns the number of the question, counted over all rows, that each token of the answers belongs to."""
        rows = torch.arange(len(self.ids))[:, None] * (int(self.segment.max()) + 1) + self.segment
        return torch.unique(rows[:, 1:][self.answer[:, 1:]], return_inverse=True)[1]


class Packer:
    """Turns rows of questions into tokens, with the words of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text's words.

        Raises:
            KeyError: a word is not in the vocabulary.
        """
        return [self.vocabulary[word] for word in words_of(text)]

    def __call__(self, rows: Sequence[Sequence[Question]], *, sees: Sequence[bool]) -> Packed:
        """Packs one row of questions a picture; rows that do not see have no image tokens."""
        made: list[list[Tensor]] = []
        start, end, image = (self.vocabulary[word] for word in ("<s>", "</s>", "<image>"))
        for questions, seeing in zip(rows, sees, strict=True):
            prefix = [start, *self.ids("USER:"), *[image] * (TOKENS * seeing)]
            ids, segment, position, answer = (
                [*prefix],
                [0] * len(prefix),
                [*range(len(prefix))],
                [False] * len(prefix),
            )
            for k, question in enumerate(questions, 1):
                asked, said = self.ids(f"{question.text} ASSISTANT:"), [*self.ids(question.answer), end]
                ids += asked + said
                segment += [k] * (len(asked) + len(said))
                position += range(len(prefix), len(prefix) + len(asked) + len(said))
                answer += [False] * len(asked) + [True] * len(said)
            made.append([torch.tensor(column) for column in (ids, segment, position, answer)])
        pad = nn.utils.rnn.pad_sequence
        columns = [pad([row[c] for row in made], batch_first=True, padding_value=v) for c, v in
                   enumerate((0, -1, 0, False))]  # fmt: skip
        return Packed(*columns)


def answer_logits(
    model: Any, packed: Packed, projected: Float[Tensor, "b t d"] | None, image_id: int
) -> tuple[Float[Tensor, "tokens v"], Int[Tensor, " tokens"]]:
    """Returns the logits of every token of the answers, from the position before it, and the tokens themselves."""
    words = model.language_model.embed_tokens
    x = words(packed.ids)
    if projected is not None:
        x = x.masked_scatter((packed.ids == image_id)[..., None], projected.to(x.dtype))
    hidden = model.language_model(
        inputs_embeds=x, attention_mask=packed.mask(), position_ids=packed.position, use_cache=False
    ).last_hidden_state
    said = packed.answer[:, 1:]
    return hidden[:, :-1][said] @ words.weight.T, packed.ids[:, 1:][said]
