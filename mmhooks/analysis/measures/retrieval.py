"""Retrieval: R@k from images to their texts and from texts to their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.checks import check_pair, unit_or_zero_rows
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class RetrievalResult(Result):
    """R@k in both directions with Wilson intervals, the chance level of each k, and the rank of every query.

    Ranks start at 0. A candidate that ties with the right one counts as ranked before it, so that identical
    embeddings do not score.
    """

    image_to_text: dict[int, Estimate]
    text_to_image: dict[int, Estimate]
    chance: dict[int, float]
    n: int
    image_ranks: Int[Tensor, " n"] = field(repr=False)
    text_ranks: Int[Tensor, " n"] = field(repr=False)

    def table(self) -> Records:
        directions = {"image to text": self.image_to_text, "text to image": self.text_to_image}
        return Records(
            {"direction": name, "k": k, **e.columns("R@k"), "chance": self.chance[k]}
            for name, rates in directions.items()
            for k, e in rates.items()
        )


@torch.no_grad()
def retrieval(
    image_emb: Float[Tensor, "n d"],
    text_emb: Float[Tensor, "n2 d2"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    same: Int[Tensor, " n"] | None = None,
) -> RetrievalResult:
    """Computes R@k of pairs by cosine; row i of one side belongs to row i of the other.

    A row of zeros, which masking may leave, is similar to nothing: its query misses, as ties do.

    Args:
        same: one label per pair; any candidate with the query's label is right (repeated captions).

    Raises:
        ShapeMismatch: the sides differ in shape, not one label per pair, no pair, or a k below 1.
        NotFinite: NaN or infinity in either side.

    >>> retrieval(torch.eye(4), torch.eye(4)).image_to_text[1].value
    1.0
    """
    check_pair(image_emb, text_emb, "embeddings")
    n = len(image_emb)
    if n == 0 or not ks or min(ks) < 1 or (same is not None and len(same) != n):
        labels = "no labels" if same is None else f"{len(same)} labels"
        raise ShapeMismatch(
            f"retrieval: expected pairs, ks >= 1 and one label per pair, got {n} pairs, ks = {tuple(ks)}, {labels}"
        )
    image, text = unit_or_zero_rows(image_emb), unit_or_zero_rows(text_emb)
    text = text.to(image)
    if same is not None:
        same = same.to(image.device)
    forward, backward = _ranks(image, text, same), _ranks(text, image, same)
    return RetrievalResult(
        {k: wilson(int((forward < k).sum()), n) for k in ks},
        {k: wilson(int((backward < k).sum()), n) for k in ks},
        {k: _chance(n, k, same) for k in ks},
        n,
        forward.cpu(),
        backward.cpu(),
    )


def _ranks(query: Tensor, candidates: Tensor, same: Tensor | None) -> Int[Tensor, " n"]:
    ranks, size = [], max(1, 2**24 // len(candidates))
    for begin in range(0, len(query), size):
        scores = query[begin : begin + size] @ candidates.T
        rows = torch.arange(begin, begin + len(scores), device=query.device)
        if same is None:
            right = rows[:, None] == torch.arange(len(candidates), device=query.device)
        else:
            right = same[rows][:, None] == same
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(1))
    return torch.cat(ranks)


def _chance(n: int, k: int, same: Tensor | None) -> float:
    """Computes the probability that k random candidates of n include a right one, mean over queries."""
    k = min(k, n)
    if same is None:
        return k / n
    _, which, sizes = same.unique(return_inverse=True, return_counts=True)
    right = sizes[which].double()
    miss = torch.ones(n, dtype=torch.float64)
    for drawn in range(k):
        miss *= ((n - right.cpu() - drawn) / (n - drawn)).clamp_min(0)
    return float(1 - miss.mean())
