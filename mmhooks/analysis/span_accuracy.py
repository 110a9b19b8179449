"""How much of the model's accuracy is left where attention heads may only say what their texts span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.checks import check_finite
from mmhooks.analysis.intervals import wilson
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.text_span import TextSpan
from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class ReconstructionAccuracy(Result):
    """Zero-shot accuracy of the embedding itself and with heads rebuilt from their first k texts."""

    full: Estimate
    by_texts: dict[int, Estimate]

    def table(self) -> Records:
        rows = {**{f"{k} texts": e for k, e in self.by_texts.items()}, "all of each head": self.full}
        return Records(
            {"heads rebuilt from": k, "accuracy": e.value, "low": e.low, "high": e.high, "n": e.n}
            for k, e in rows.items()
        )


@torch.no_grad()
def reconstruction_accuracy(
    span: TextSpan,
    head_outputs: Float[Tensor, "n h d"],
    rest: Float[Tensor, "n2 d2"],
    classes: Float[Tensor, "c d3"],
    labels: Int[Tensor, " n3"],
    *,
    n_texts: Sequence[int] = (0, 1, 2, 5, 10, 20),
) -> ReconstructionAccuracy:
    """Accuracy of ``rest + sum of rebuilt heads`` against class embeddings, by the number of texts a head.

    Args:
        head_outputs: of the heads of ``span``, over labelled pictures.
        rest: everything else of the raw embedding of the same pictures (its means, for ablation on top).
        classes: text embedding of each class; ``labels``: the class of each picture.
        n_texts: 0 is mean-ablation of these heads.

    Raises:
        ShapeMismatch: rows or widths that differ, or a label outside the classes. NotFinite: NaN in any.

    >>> outputs = torch.tensor([[[2.0, 0.0]], [[-2.0, 0.0]]])
    >>> from mmhooks.analysis.text_span import text_span
    >>> span = text_span(outputs, torch.eye(2), ["left or right", "up or down"], n_texts=1)
    >>> classes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> found = reconstruction_accuracy(span, outputs, torch.zeros(2, 2), classes, torch.tensor([0, 1]), n_texts=[0, 1])
    >>> found.by_texts[0].value, found.by_texts[1].value
    (0.5, 1.0)
    """
    n, d = len(head_outputs), head_outputs.shape[2]
    if len(rest) != n or len(labels) != n or rest.shape[1] != d or classes.shape[1] != d:
        raise ShapeMismatch(
            f"head outputs of {n} pictures, rest of {len(rest)}, {len(labels)} labels; widths {d}, {rest.shape[1]} and "
            f"{classes.shape[1]} (classes): all must agree"
        )
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ShapeMismatch(
            f"labels lie in {int(labels.min())}..{int(labels.max())}, there are {len(classes)} classes"
        )
    for x, what in ((head_outputs.flatten(1), "head outputs"), (rest, "rest"), (classes, "classes")):
        check_finite(x, what)
    directions = normalize(classes, dim=1).T

    def accuracy(embedding: Tensor) -> Estimate:
        return wilson(int(((embedding @ directions).argmax(1) == labels).sum()), n)

    by_texts = {k: accuracy(rest + span.reconstruct(head_outputs, k).sum(1)) for k in n_texts}
    return ReconstructionAccuracy(accuracy(rest + head_outputs.sum(1)), by_texts)
