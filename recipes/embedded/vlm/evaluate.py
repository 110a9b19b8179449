"""Evaluation of mini-vlm: answers with the right picture and with a wrong one, by kind of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from embedded.vlm.packing import Packed, Packer, answer_logits
from mmhooks.data.synthetic.questions import CHOICES, Question


@torch.no_grad()
def right_answers(
    model: Any,
    packer: Packer,
    rows: Sequence[Sequence[Question]],
    projected: Float[Tensor, "b t d"] | None,
) -> list[list[bool]]:
    """Returns, row by row, which questions greedy decoding answers right to the last token; None: without pictures."""
    found: list[list[bool]] = []
    for begin in range(0, len(rows), 50):
        part = rows[begin : begin + 50]
        packed = packer(part, sees=[projected is not None] * len(part))
        seen = None if projected is None else projected[begin : begin + 50]
        logits, truth = answer_logits(model, packed, seen, packer.vocabulary["<image>"])
        right = _whole(packed, logits.argmax(-1) == truth)
        k = 0
        for questions in part:
            found.append(right[k : k + len(questions)].tolist())
            k += len(questions)
    return found


def _whole(packed: Packed, right: Bool[Tensor, " tokens"]) -> Bool[Tensor, " questions"]:
    owners = packed.owners()
    wrong = torch.zeros(int(owners.max()) + 1).index_add(0, owners, (~right).float())
    return wrong == 0


def picture_accuracy(
    model: Any, packer: Packer, rows: Sequence[Sequence[Question]], projected: Float[Tensor, "b t d"]
) -> dict[str, dict[str, float]]:
    """Returns accuracy by kind of question with the own picture ("right") and with the next row's ("wrong")."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"right": 0, "wrong": 0, "n": 0})
    for name, shown in (("right", projected), ("wrong", projected.roll(1, 0))):
        for questions, hits in zip(rows, right_answers(model, packer, rows, shown), strict=True):
            for question, hit in zip(questions, hits, strict=True):
                found[question.kind][name] += hit
                found[question.kind]["n"] += name == "right"
    return {
        kind: {"right": row["right"] / row["n"], "wrong": row["wrong"] / row["n"], "n": row["n"],
               "chance": 1 / CHOICES[kind] if kind in CHOICES else 0.0}
        for kind, row in sorted(found.items())
    }  # fmt: skip
