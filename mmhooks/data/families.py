"""Families: samples that are not independent, such as one drawing in six skin tones or crops of one photo.

A family counts once in a list of top samples, and is resampled as a whole. Families are read from a column, from the
names of drawings, or found as near-duplicates by their embeddings.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.data.pair_set import Pairs
from mmhooks.data.splits import concept_key
from mmhooks.errors import DataError, NotFinite, OutOfRange
from mmhooks.utils.indexing import number_labels
from mmhooks.utils.progress import track

NEAR_DUPLICATE = 0.93  # cosine from which two samples count as one; docs/measures.md says how it was chosen
BLOCK = 2048  # rows whose cosines with all later rows are computed at a time


def families(
    pairs: Any, column: str | None = None, *, vectors: Float[Tensor, "n d"] | None = None
) -> Int[Tensor, " n"]:
    """Numbers the family of every pair; pairs of one family have one number.

    Read from ``column`` of the pairs' ``meta`` if it is given; for drawings (whose ``meta`` has code points) from their
    names, without skin tone, gender and direction; otherwise near-duplicates among ``vectors``, usually embeddings of
    the images by another model (:func:`near_duplicates`). Without any of these, captions of one image are a family.

    Raises:
        DataError: a pair has no such column.

    >>> import mmhooks as mm
    >>> labels = families(mm.data.pairs("mini"))
    >>> len(labels), len(labels.unique())
    (3953, 1724)
    """
    if column is not None:
        lacking = [key for key, meta in zip(pairs.ids, pairs.meta, strict=True) if column not in meta]
        if lacking:
            known = sorted({key for meta in pairs.meta for key in meta})
            raise DataError(
                f"families: expected column {column!r} in every pair, got {len(lacking)} of {len(pairs)} without it "
                f"(first: {lacking[0]!r}); columns there are: {', '.join(known) or 'none'}"
            )
        return number_labels([meta[column] for meta in pairs.meta])
    if all("codepoints" in meta for meta in pairs.meta):
        return number_labels([drawing_family(text) for text in pairs.texts])
    if vectors is not None:
        return near_duplicates(vectors)
    return torch.tensor(pairs.image_numbers) if isinstance(pairs, Pairs) else torch.arange(len(pairs))


def drawing_family(name: str) -> str:
    """Returns what a drawing shows, without skin tone, gender and direction: the unit that is resampled.

    >>> drawing_family("woman farmer: dark skin tone") == drawing_family("man farmer")
    True
    """
    bare = re.sub(r"\b(woman|man|person|facing right)\b", " ", concept_key(name))
    return " ".join(bare.split()) or "person"


def near_duplicates(
    vectors: Float[Tensor, "n d"], threshold: float = NEAR_DUPLICATE, *, progress: bool = False
) -> Int[Tensor, " n"]:
    """Numbers groups of near-duplicates: samples linked by cosines of at least ``threshold`` (single linkage).

    Exact, over all pairs of samples in blocks: ``n² d`` multiplications, and memory for one block of cosines.

    Raises:
        NotFinite: NaN or infinity in the vectors. OutOfRange: ``threshold`` is not between 0 and 1.

    >>> near_duplicates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]]))
    tensor([0, 1, 0])
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not 0 < threshold <= 1:
        raise OutOfRange(f"threshold: expected a cosine between 0 and 1, got {threshold}")
    if not bool(torch.isfinite(vectors).all()):
        raise NotFinite("near-duplicates: expected finite vectors, got NaN or infinity")
    unit, n = torch.nn.functional.normalize(vectors.float(), dim=1), len(vectors)
    links = []
    for begin in track(range(0, n, BLOCK), -(-n // BLOCK), "near-duplicates", show=progress):
        close = (unit[begin : begin + BLOCK] @ unit[begin:].T >= threshold).nonzero().cpu()
        links.append(close + begin)
    row, column = torch.cat(links).T.numpy() if links else (torch.zeros(0).numpy(),) * 2
    graph = coo_array((torch.ones(len(row)).numpy(), (row, column)), shape=(n, n))
    return number_labels(connected_components(graph, directed=False)[1].tolist())
