"""Strips of images for the figures of the decomposition study."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from mmhooks.report.figures import Strip
from mmhooks.studies.decomposition.measures import Contributions

Strips = list[Strip]


def make_strips(
    pairs: Any,
    span: Any,
    parts: Contributions,
    code: Any,
    neurons: list[dict[str, Any]],
    *,
    each: int,
    seed: int,
) -> dict[str, Strips]:
    """Makes strips: top images of attention heads, neighbours by them, top images of neurons, images with their texts."""
    strongest = sorted(range(len(span.heads)), key=lambda h: -span.variance[h])[:each]
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(len(pairs), generator=generator)[:each].tolist()
    centred = parts.outputs - span.mean
    spaces = [
        ("whole embedding", parts.embeddings - parts.embeddings.mean(0)),
        *((f"attention head {span.heads[h]}", centred[:, h]) for h in strongest[:3]),
    ]
    return {
        "heads": _of_heads(pairs, span, centred, strongest),
        "neighbours": [_neighbours(pairs, q, name, space) for q in queries[:3] for name, space in spaces],
        "neurons": [
            Strip(
                f"Neuron {n['neuron']}",
                "ImgD",
                _images(pairs, n["top"]),
                [f"{w:.2f} {text}" for text, w in n["texts"]],
            )
            for n in neurons
        ],
        "texts": [
            Strip(
                pairs.texts[q],
                "TextD",
                _images(pairs, [q]),
                [f"{w:.2f} {text}" for text, w in code.top(q, 5)],
            )
            for q in queries
        ],
    }


def _images(pairs: Any, rows: list[int]) -> list[Any]:
    return [pairs.image(i) for i in rows]


def _of_heads(pairs: Any, span: Any, centred: torch.Tensor, heads: list[int]) -> Strips:
    """Returns the images furthest along each attention head's first text; heads without texts are skipped."""
    found = []
    for h in heads:
        if not len(span.bases[h]):
            continue
        # The first basis vector points in the direction of the first text.
        along = centred[:, h] @ span.bases[h][0]
        rows = along.topk(min(8, len(along))).indices.tolist()
        title = f"Attention head {span.heads[h]}: {span.texts[h][0]}"
        found.append(Strip(title, "ImgD", _images(pairs, rows), list(span.texts[h][:5])))
    return found


def _neighbours(pairs: Any, query: int, name: str, space: torch.Tensor) -> Strip:
    """Returns an image and its nearest neighbours in a space."""
    unit = normalize(space, dim=1)
    near = (unit @ unit[query]).topk(min(9, len(unit))).indices.tolist()
    rows = [i for i in near if i != query][:7]
    title = f"{pairs.texts[query]}, by {name}"
    return Strip(title, "CrossD", _images(pairs, [query, *rows]), [pairs.texts[i] for i in rows[:5]])
