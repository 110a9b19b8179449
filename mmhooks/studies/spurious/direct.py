"""Direct-effect ablation of attention heads: the class scores of every image without them, in closed form.

An embedding is a sum of contributions, so its scores along two class texts are too: setting a head to its mean changes
them by that head's mean score minus its own. Thousands of random sets then cost one matrix product each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.analysis.decomposition.dataset import decompositions

Head = tuple[int, int]


@dataclass(frozen=True)
class DirectScores:
    """How much every head raises the second class over the first, image by image.

    Attributes:
        full: of the whole embedding. heads: of the last layers' heads. means: of these heads, over the images where heads
            are chosen. layers: the layer of each of the heads' rows.
    """

    full: Float[Tensor, " n"]
    heads: Float[Tensor, "n l h"]
    means: Float[Tensor, "l h"]
    layers: tuple[int, ...]
    animals: Int[Tensor, " n"]

    def right(self, heads: Sequence[Head]) -> Bool[Tensor, " n"]:
        """Returns which images are classified correctly with the direct contributions of ``heads`` at their means."""
        return self.prefixes(heads)[-1]

    def prefixes(self, order: Sequence[Head]) -> Bool[Tensor, "k n"]:
        """Returns the same for every prefix of a ranking, from none of its heads to all."""
        rows = [self.layers.index(layer) for layer, _ in order]
        heads = [head for _, head in order]
        change = self.means[rows, heads] - self.heads[:, rows, heads]
        scores = torch.cat([torch.zeros_like(self.full)[:, None], change.cumsum(1)], 1) + self.full[:, None]
        return ((scores > 0).long() == self.animals[:, None]).T


def direct_scores(
    model: Any, scenes: Any, texts: Float[Tensor, "2 e"], layers: Sequence[int], *, batch: int, progress: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n l h"], Float[Tensor, "n l h e"]]:
    """Decomposes the unit embeddings of the scenes: scores of all and of every head, and the heads' contributions."""
    towards = texts[1] - texts[0]
    full, outputs = [], []
    for parts in decompositions(model, scenes.pixels, normalize=True, batch_size=batch, progress=progress):
        full.append(parts.embedding.cpu() @ towards)
        outputs.append(parts.heads[:, list(layers)].cpu())
    contributions = torch.cat(outputs)
    return torch.cat(full), contributions @ towards, contributions
