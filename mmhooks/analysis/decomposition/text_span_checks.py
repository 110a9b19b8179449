"""Checks of TextSpan's texts: how much they depend on the images, and how much accuracy their span keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.decomposition.head_moments import HeadMoments, merged
from mmhooks.analysis.decomposition.text_span import TextSpan, text_span
from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class SpanOverlap(Result):
    """Agreement of TextSpan between subsets of the images, per head.

    Attributes:
        texts: mean share of chosen texts that two subsets have in common.
        texts_chance: that share for texts drawn at random from the pool.
        space: mean overlap of the spaces that the texts span, ``|U₁ᵀU₂|² / k``: 1 if other texts span the same space.
        space_chance: that overlap for random subspaces of the head's own space.
        first: share of pairs of subsets whose first text is the same.
    """

    heads: tuple[str, ...]
    texts: tuple[float, ...]
    texts_chance: tuple[float, ...]
    space: tuple[float, ...]
    space_chance: tuple[float, ...]
    first: tuple[float, ...]
    n_subsets: int

    def table(self) -> Records:
        return Records(
            {
                "head": head,
                "same texts": self.texts[i],
                "by chance": self.texts_chance[i],
                "same space": self.space[i],
                "space by chance": self.space_chance[i],
                "same first text": self.first[i],
            }
            for i, head in enumerate(self.heads)
        )


def span_overlap(spans: Sequence[TextSpan]) -> SpanOverlap:
    """Computes the agreement of several TextSpans of the same heads over the same pool: of other images, or other seeds.

    Raises:
        ShapeMismatch: there are fewer than two, or they have different heads or pools.

    >>> outputs = torch.randn(200, 4); pool = torch.eye(4)
    >>> spans = [text_span(part, pool, list("abcd"), n_texts=2) for part in outputs.split(100)]
    >>> 0 <= span_overlap(spans).texts[0] <= 1
    True
    """
    if len(spans) < 2:
        raise ShapeMismatch(f"overlap: expected at least two TextSpans, got {len(spans)}")
    if len({(s.heads, s.pool_id) for s in spans}) > 1:
        raise ShapeMismatch(
            "overlap: expected TextSpans of the same heads and pool, got different heads or pools"
        )
    pairs = list(combinations(spans, 2))
    columns: list[list[float]] = [[] for _ in range(5)]
    for h in range(len(spans[0].heads)):
        sizes = [(len(a.indices[h]), len(b.indices[h])) for a, b in pairs]
        both = [len(set(a.indices[h]) & set(b.indices[h])) for a, b in pairs]
        inner = [float((a.bases[h] @ b.bases[h].T).square().sum()) for a, b in pairs]
        most = [max(*s, 1) for s in sizes]
        dimensions = min(s.rank[h] for s in spans)
        rows = (
            _mean(x / m for x, m in zip(both, most, strict=True)),
            _mean(s * t / spans[0].n_pool / m for (s, t), m in zip(sizes, most, strict=True)),
            _mean(x / m for x, m in zip(inner, most, strict=True)),
            _mean(s * t / max(dimensions, 1) / m for (s, t), m in zip(sizes, most, strict=True)),
            _mean(float(a.indices[h][:1] == b.indices[h][:1]) for a, b in pairs),
        )
        for column, value in zip(columns, rows, strict=True):
            column.append(value)
    return SpanOverlap(spans[0].heads, *(tuple(c) for c in columns), n_subsets=len(spans))


def subset_overlap(
    head_outputs: Float[Tensor, "n h d"] | Sequence[HeadMoments],
    text_embeddings: Float[Tensor, "t d2"],
    texts: Sequence[str],
    *,
    subsets: int = 5,
    share: float = 0.5,
    parts: int = 10,
    seed: int = 0,
    **options: object,
) -> SpanOverlap:
    """Computes :func:`span_overlap` of TextSpans over random subsets, each a ``share`` of the images.

    The images are read once: subsets consist of whole ``parts``, whose moments are summed.

    Args:
        head_outputs: outputs, or the moments of disjoint parts of the images (``parts`` is then ignored).
        options: passed to :func:`text_span`.

    Raises:
        ShapeMismatch: the share leaves no part in or none out. Also the errors of :func:`text_span`.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(head_outputs, Tensor):
        order = torch.randperm(len(head_outputs), generator=generator).to(head_outputs.device)
        pieces = []
        for rows in order.chunk(parts):
            pieces.append(HeadMoments(*head_outputs.shape[1:]).to(head_outputs.device))
            pieces[-1].update(head_outputs[rows])
    else:
        pieces = list(head_outputs)
    take = round(share * len(pieces))
    if not 0 < take < len(pieces) or subsets < 2:
        raise ShapeMismatch(
            f"expected at least two subsets with some parts in and some out, got {subsets} subsets of {take} of "
            f"{len(pieces)} parts (share {share}), which cannot differ"
        )
    spans = []
    for _ in range(subsets):
        chosen = torch.randperm(len(pieces), generator=generator)[:take].tolist()
        spans.append(text_span(merged([pieces[i] for i in chosen]), text_embeddings, texts, **options))  # type: ignore[arg-type]
    return span_overlap(spans)


def half_overlap(
    head_outputs: Float[Tensor, "n h d"],
    text_embeddings: Float[Tensor, "t d2"],
    texts: Sequence[str],
    *,
    families: Int[Tensor, " n2"] | None = None,
    splits: int = 5,
    seed: int = 0,
    **options: object,
) -> SpanOverlap:
    """Computes :func:`span_overlap` of two halves that share no image and no family, the mean over random splits.

    Overlapping subsets, or halves with one drawing's variants on both sides, share texts because they share data.

    Args:
        families: the family of every image, equal for variants of one; default: every image is its own.
        options: passed to :func:`text_span`.

    Raises:
        ShapeMismatch: not one family per image, one family only, or no split. Also the errors of :func:`text_span`.

    >>> outputs, pool = torch.randn(200, 1, 4), torch.eye(4)
    >>> 0 <= half_overlap(outputs, pool, list("abcd"), n_texts=2).texts[0] <= 1
    True
    """
    n = len(head_outputs)
    numbers = torch.arange(n) if families is None else families.cpu().unique(return_inverse=True)[1]
    sizes = torch.bincount(numbers)
    if len(numbers) != n or len(sizes) < 2 or splits < 1:
        raise ShapeMismatch(
            f"expected one family per image, at least two of them, and a split, got {len(numbers)} labels of {len(sizes)} "
            f"families for {n} images, and {splits} splits"
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(splits):
        order = torch.randperm(len(sizes), generator=generator)
        before = sizes[order].cumsum(0) - sizes[order]
        first = torch.zeros(len(sizes), dtype=torch.bool)
        first[order[before < n / 2]] = True
        first[order[-1]] = False  # a family of half the images may not be alone with all others
        in_first = first[numbers]
        spans = [
            text_span(head_outputs[rows.to(head_outputs.device)], text_embeddings, texts, **options)  # type: ignore[arg-type]
            for rows in (in_first, ~in_first)
        ]
        found.append(span_overlap(spans))

    def mean(column: str) -> tuple[float, ...]:
        values = [getattr(one, column) for one in found]
        return tuple(_mean(of_head) for of_head in zip(*values, strict=True))

    columns = ("texts", "texts_chance", "space", "space_chance", "first")
    return SpanOverlap(found[0].heads, *(mean(column) for column in columns), n_subsets=2 * splits)


def _mean(values: object) -> float:
    listed = list(values)  # type: ignore[call-overload]
    return sum(listed) / len(listed) if listed else math.nan


@dataclass(frozen=True)
class ReconstructionAccuracy(Result):
    """Zero-shot accuracy of the full embedding, and with heads reconstructed from their first k texts."""

    full: Estimate
    by_texts: dict[int, Estimate]

    def table(self) -> Records:
        rows = {**{f"{k} texts": e for k, e in self.by_texts.items()}, "all of each head": self.full}
        return Records({"heads rebuilt from": k} | e.columns("accuracy") for k, e in rows.items())


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
    """Computes the accuracy of ``rest + sum of reconstructed heads`` against class embeddings, by texts per head.

    Args:
        head_outputs: of the heads of ``span``, over labelled images.
        rest: the rest of the raw embedding of the same images (or its means, to ablate that too).
        classes: text embedding of each class. labels: the class of each image.
        n_texts: 0 is mean-ablation of these heads.

    Raises:
        ShapeMismatch: rows or widths differ, or a label lies outside the classes. NotFinite: NaN in any.

    >>> outputs = torch.tensor([[[2.0, 0.0]], [[-2.0, 0.0]]])
    >>> from mmhooks.analysis.decomposition.text_span import text_span
    >>> span = text_span(outputs, torch.eye(2), ["left or right", "up or down"], n_texts=1)
    >>> classes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> found = reconstruction_accuracy(span, outputs, torch.zeros(2, 2), classes, torch.tensor([0, 1]), n_texts=[0, 1])
    >>> found.by_texts[0].value, found.by_texts[1].value
    (0.5, 1.0)
    """
    n, d = len(head_outputs), head_outputs.shape[2]
    if len(rest) != n or len(labels) != n or rest.shape[1] != d or classes.shape[1] != d:
        raise ShapeMismatch(
            f"expected the same images and widths, got head outputs of {n} images, rest of {len(rest)}, {len(labels)} "
            f"labels; widths {d}, {rest.shape[1]} and {classes.shape[1]} (classes)"
        )
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ShapeMismatch(
            f"labels: expected 0..{len(classes) - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
    for x, what in ((head_outputs.flatten(1), "head outputs"), (rest, "rest"), (classes, "classes")):
        check_finite(x, what)
    directions = normalize(classes, dim=1).T

    def accuracy(embedding: Tensor) -> Estimate:
        return wilson(int(((embedding @ directions).argmax(1) == labels).sum()), n)

    by_texts = {k: accuracy(rest + span.reconstruct(head_outputs, k).sum(1)) for k in n_texts}
    return ReconstructionAccuracy(accuracy(rest + head_outputs.sum(1)), by_texts)
