"""How far TextSpan's texts depend on which pictures were looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.moments_metric import HeadMoments, merged
from mmhooks.analysis.results import Records, Result
from mmhooks.analysis.text_span import TextSpan, text_span
from mmhooks.errors import ShapeMismatch


@dataclass(frozen=True)
class SpanOverlap(Result):
    """Agreement of TextSpan between subsets of the pictures, of each head.

    Attributes:
        texts: mean share of the chosen texts that two subsets have in common.
        texts_chance: that share for texts drawn at random from the pool.
        space: mean overlap of the spaces that the texts span, ``|U₁ᵀU₂|² / k``: 1 where other texts say the same.
        space_chance: that overlap for random spaces in the head's own space.
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
    """Agreement of several TextSpans of the same heads over the same pool: other pictures, or other seeds.

    Raises:
        ShapeMismatch: fewer than two, or of different heads or pools.

    >>> outputs = torch.randn(200, 4); pool = torch.eye(4)
    >>> spans = [text_span(part, pool, list("abcd"), n_texts=2) for part in outputs.split(100)]
    >>> 0 <= span_overlap(spans).texts[0] <= 1
    True
    """
    if len(spans) < 2:
        raise ShapeMismatch(f"overlap needs at least two TextSpans, came {len(spans)}")
    if len({(s.heads, s.pool_id) for s in spans}) > 1:
        raise ShapeMismatch("these TextSpans are of different heads or pools: their texts cannot be compared")
    pairs = list(combinations(spans, 2))
    columns: list[list[float]] = [[] for _ in range(5)]
    for h in range(len(spans[0].heads)):
        sizes = [(len(a.indices[h]), len(b.indices[h])) for a, b in pairs]
        both = [len(set(a.indices[h]) & set(b.indices[h])) for a, b in pairs]
        inner = [float((a.bases[h] @ b.bases[h].T).square().sum()) for a, b in pairs]
        most = [max(*s, 1) for s in sizes]
        room = min(s.rank[h] for s in spans)
        rows = (
            _mean(x / m for x, m in zip(both, most, strict=True)),
            _mean(s * t / spans[0].n_pool / m for (s, t), m in zip(sizes, most, strict=True)),
            _mean(x / m for x, m in zip(inner, most, strict=True)),
            _mean(s * t / max(room, 1) / m for (s, t), m in zip(sizes, most, strict=True)),
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
    """:func:`span_overlap` of TextSpans over random subsets, each ``share`` of the pictures.

    The pictures are read once: subsets are made of whole ``parts``, whose moments add up.

    Args:
        head_outputs: outputs, or the moments of disjoint parts of the pictures, as many as there are.
        options: of :func:`text_span`.

    Raises:
        ShapeMismatch: a share that leaves no part in or none out; and as :func:`text_span`.
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
            f"{subsets} subsets of {take} of {len(pieces)} parts (share {share}) cannot differ: at least two subsets, "
            "some parts in and some out"
        )
    spans = []
    for _ in range(subsets):
        chosen = torch.randperm(len(pieces), generator=generator)[:take].tolist()
        spans.append(text_span(merged([pieces[i] for i in chosen]), text_embeddings, texts, **options))  # type: ignore[arg-type]
    return span_overlap(spans)


def _mean(values: object) -> float:
    listed = list(values)  # type: ignore[call-overload]
    return sum(listed) / len(listed) if listed else math.nan
