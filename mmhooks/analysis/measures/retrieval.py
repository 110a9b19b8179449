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

_ROUNDING = 0.05  # distance of unit vectors that batches in bf16 stay well below


@dataclass(frozen=True)
class RetrievalResult(Result):
    """R@k in both directions with Wilson intervals, the chance level of each k, and the rank of every query.

    With several captions an image, there are fewer images (``m``) than texts (``n``), and a chance level for each
    direction: ``chance`` is that of images as queries. Ranks start at 0. A candidate that ties with the right one counts
    as ranked before it, so that identical embeddings do not score.
    """

    image_to_text: dict[int, Estimate]
    text_to_image: dict[int, Estimate]
    chance: dict[int, float]
    text_to_image_chance: dict[int, float]
    n: int
    image_ranks: Int[Tensor, " m"] = field(repr=False)
    text_ranks: Int[Tensor, " n"] = field(repr=False)

    def table(self) -> Records:
        directions = {
            "image to text": (self.image_to_text, self.chance),
            "text to image": (self.text_to_image, self.text_to_image_chance),
        }
        return Records(
            {"direction": name, "k": k, **e.columns("R@k"), "chance": chance[k]}
            for name, (rates, chance) in directions.items()
            for k, e in rates.items()
        )


@torch.no_grad()
def retrieval(
    image_emb: Float[Tensor, "n d"],
    text_emb: Float[Tensor, "n2 d2"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    same: Int[Tensor, " n"] | None = None,
    images: Int[Tensor, " n3"] | None = None,
) -> RetrievalResult:
    """Computes R@k of pairs by cosine; row i of one side belongs to row i of the other.

    A row of zeros, which masking may leave, is similar to nothing: its query misses, as ties do.

    Args:
        same: one label per pair; any candidate with the query's label is right (repeated captions).
        images: the number of each pair's image where images have several captions (``pairs.image_numbers``). Each image
            is then one query and one candidate, by its first row, and all its captions are right, as in the retrieval
            tasks of COCO and Flickr30k (Karpathy & Fei-Fei, CVPR 2015).

    Raises:
        ShapeMismatch: the sides differ in shape, not one label per pair, no pair, or a k below 1; ``same`` and
            ``images`` together; rows of one image that differ.
        NotFinite: NaN or infinity in either side.

    >>> retrieval(torch.eye(4), torch.eye(4)).image_to_text[1].value
    1.0
    """
    check_pair(image_emb, text_emb, "embeddings")
    n, labels = len(image_emb), same if images is None else images
    if n == 0 or not ks or min(ks) < 1 or (labels is not None and len(labels) != n):
        got = "no labels" if labels is None else f"{len(labels)} labels"
        raise ShapeMismatch(
            f"retrieval: expected pairs, ks >= 1 and one label per pair, got {n} pairs, ks = {tuple(ks)}, {got}"
        )
    if same is not None and images is not None:
        raise ShapeMismatch("retrieval: expected same= or images=, got both; images= counts each image once")
    image, text = unit_or_zero_rows(image_emb), unit_or_zero_rows(text_emb)
    text = text.to(image)
    of_text = torch.arange(n, device=image.device) if labels is None else labels.to(image.device)
    of_image = of_text
    if images is not None:
        image, of_image = _once(image, of_text)
    forward, backward = _ranks(image, text, of_image, of_text), _ranks(text, image, of_text, of_image)
    return RetrievalResult(
        {k: wilson(int((forward < k).sum()), len(forward)) for k in ks},
        {k: wilson(int((backward < k).sum()), n) for k in ks},
        {k: _chance(of_image, of_text, k) for k in ks},
        {k: _chance(of_text, of_image, k) for k in ks},
        n,
        forward.cpu(),
        backward.cpu(),
    )


def _once(
    rows: Float[Tensor, "n d"], image: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"]]:
    """The first row of every image, and its number."""
    numbers, which = image.unique(return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(numbers, len(rows)).scatter_reduce(0, which, places, "amin")
    apart = (rows - rows[first][which]).norm(dim=1)
    if float(apart.max()) > _ROUNDING:
        row = int(apart.argmax())
        raise ShapeMismatch(
            f"retrieval: expected equal embeddings in all rows of one image, got row {row} of image {int(image[row])} at a "
            f"distance of {float(apart.max()):.3g} from row {int(first[which[row]])}"
        )
    return rows[first], numbers


def _ranks(
    query: Float[Tensor, "q d"],
    candidates: Float[Tensor, "c d"],
    label: Int[Tensor, " q"],
    labels: Int[Tensor, " c"],
) -> Int[Tensor, " q"]:
    """How many wrong candidates are at least as similar to each query as the best right one, of its own label."""
    ranks, size = [], max(1, 2**24 // len(candidates))
    for begin in range(0, len(query), size):
        scores = query[begin : begin + size] @ candidates.T
        right = label[begin : begin + size, None] == labels
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(1))
    return torch.cat(ranks)


def _chance(label: Int[Tensor, " q"], labels: Int[Tensor, " c"], k: int) -> float:
    """Computes the probability that k random candidates include a right one, mean over queries."""
    n = len(labels)
    known, sizes = labels.unique(return_counts=True)
    right = sizes[torch.searchsorted(known, label)].double().cpu()
    if bool((right == 1).all()):
        return min(k, n) / n  # exactly
    miss = torch.ones(len(label), dtype=torch.float64)
    for drawn in range(min(k, n)):
        miss *= ((n - right - drawn) / (n - drawn)).clamp_min(0)
    return float(1 - miss.mean())
