"""The strips of pictures that the decomposition study shows."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from mmhooks.report.figures import Strip
from mmhooks.studies.decomposition.measures import Contributions

Strips = list[Strip]


def pictures(
    pairs: Any,
    span: Any,
    parts: Contributions,
    code: Any,
    neurons: list[dict[str, Any]],
    *,
    each: int,
    seed: int,
) -> dict[str, Strips]:
    """Top pictures of attention heads, neighbours by them, top pictures of neurons, and pictures with their texts."""
    loud = sorted(range(len(span.heads)), key=lambda h: -span.variance[h])[:each]
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(len(pairs), generator=generator)[:each].tolist()
    centred = parts.outputs - span.mean
    spaces = [
        ("whole embedding", parts.embeddings - parts.embeddings.mean(0)),
        *((f"attention head {span.heads[h]}", centred[:, h]) for h in loud[:3]),
    ]
    return {
        "heads": _of_heads(pairs, span, centred, loud),
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
    """The pictures furthest along each attention head's first text; a head without texts has none."""
    found = []
    for h in heads:
        if not len(span.bases[h]):
            continue
        # The first text's direction, turned to where it points.
        along = centred[:, h] @ span.bases[h][0]
        rows = along.topk(min(8, len(along))).indices.tolist()
        title = f"Attention head {span.heads[h]}: {span.texts[h][0]}"
        found.append(Strip(title, "ImgD", _images(pairs, rows), list(span.texts[h][:5])))
    return found


def _neighbours(pairs: Any, query: int, name: str, space: torch.Tensor) -> Strip:
    """A picture and its nearest ones in a space."""
    unit = normalize(space, dim=1)
    near = (unit @ unit[query]).topk(min(9, len(unit))).indices.tolist()
    rows = [i for i in near if i != query][:7]
    title = f"{pairs.texts[query]}, by {name}"
    return Strip(title, "CrossD", _images(pairs, [query, *rows]), [pairs.texts[i] for i in rows[:5]])
