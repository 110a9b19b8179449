"""Directions of neurons as the public code of the second-order paper finds them: from each one's most significant images.

"Interpreting the Second-Order Effects of Neurons in CLIP" (Gandelsman, Efros, Steinhardt 2024), Section 4.1, and
``compute_pcas.py``: effects on the unit embedding, minus their mean over all images; the ``top_k`` images whose effect
is then longest; the first principal direction of these, turned to the side of most of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.decomposition.dataset import Inputs, batches
from mmhooks.analysis.decomposition.neuron_effects import (
    Effects,
    NeuronPaths,
    Reached,
    neuron_paths,
    read_twice,
)
from mmhooks.analysis.decomposition.origin import Origin, origin_of
from mmhooks.analysis.results import Records, Result
from mmhooks.errors import DataError, ShapeMismatch
from mmhooks.models.clip.inputs import Model, check_model
from mmhooks.utils.progress import track

_BYTES = 2**28  # largest effects [neurons, images, d] in memory


@dataclass(frozen=True, eq=False)
class NeuronDirections(Result):
    """What the neurons of one layer write into unit embeddings through later attention heads.

    Attributes:
        direction: of unit length; on its side are most of the ``top`` images.
        explained: its share of the squares of the ``top`` effects, centred by the mean of all.
        mean: mean effect over all images, by which a neuron is mean-ablated.
        threshold: length of the shortest of the ``top`` effects. An image above it is *significant* for the neuron.
        top: images with the longest effects, longest first. ``top_sizes``: their lengths.
        shared: see :func:`~mmhooks.analysis.decomposition.neuron_effects.second_order_effects`.
    """

    layer: int
    neurons: tuple[int, ...]
    n_samples: int
    direction: Float[Tensor, "n e"] = field(repr=False)
    explained: Float[Tensor, " n"]
    mean: Float[Tensor, "n e"] = field(repr=False)
    top: Int[Tensor, "n k"]
    top_sizes: Float[Tensor, "n k"]
    shared: bool
    origin: Origin

    @property
    def threshold(self) -> Float[Tensor, " n"]:
        return self.top_sizes[:, -1]

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_json().items() if k not in ("direction", "mean")}

    def strongest(self, k: int = 10) -> list[int]:
        """Rows of the ``k`` neurons with the longest significant effects."""
        return self.top_sizes.mean(1).argsort(descending=True)[:k].tolist()

    def table(self, k: int = 10) -> Records:
        return Records(
            {
                "neuron": self.neurons[i],
                "size": float(self.top_sizes[i].mean()),
                "rank 1": float(self.explained[i]),
                "top images": ", ".join(map(str, self.top[i].tolist()[:5])),
            }
            for i in self.strongest(k)
        )


@torch.no_grad()
def neuron_directions(
    model: Model,
    images: Tensor | Inputs,
    *,
    layer: Any,
    neurons: Any = None,
    top_k: int = 100,
    shared: bool = True,
    batch_size: int = 8,
    progress: bool = False,
) -> NeuronDirections:
    """Computes the direction of each neuron's second-order effects on the unit embedding, from its ``top_k`` images.

    Args:
        images: pixels, a list of batches of them, or pairs; read twice, for the mean and for the images far from it.
        layer, neurons, shared: as in :func:`~mmhooks.analysis.decomposition.neuron_effects.second_order_effects`;
            ``shared=True`` is the public code's.
        top_k: of how many images; all, if there are fewer. The public code takes 100 of some 5,000.
        batch_size: images at a time, whose effects ``[images, neurons, d]`` are in memory.

    Raises:
        ShapeMismatch: ``top_k`` is below 1.
        DataError: there are fewer than two images. Also the errors of ``mm.second_order``, which reads images likewise.

    >>> import mmhooks as mm
    >>> found = neuron_directions(mm.load("mini"), torch.randn(4, 3, 64, 64), layer=3, neurons=[0, 1], top_k=3)
    >>> found.direction.shape, found.top.shape
    (torch.Size([2, 256]), torch.Size([2, 3]))
    """
    check_model(model)
    read_twice(images)
    if top_k < 1:
        raise ShapeMismatch(f"top_k: expected at least 1, got {top_k}")
    paths = neuron_paths(model, layer, neurons, shared=shared)

    def batch_by_batch(what: str) -> Iterator[Effects]:
        source = batches(model, images, "image", batch_size, 0)
        for pixels in track(source, None, f"neurons of block {paths.layer}: {what}", show=progress):
            yield unit_effects(paths, paths.reach(pixels))

    total, common, seen = 0.0, [], 0
    for effects in batch_by_batch("mean"):
        # Directions are the same for all images, so coefficients may be summed first.
        total = total + effects.coefficients.double().sum(0)
        if effects.common is not None:
            common.append(effects.common.cpu())
        seen += len(effects.coefficients)
    if seen < 2:
        raise DataError(f"neurons' directions: expected at least two images, got {seen}")
    centre = (total / seen).float()  # type: ignore[operator]
    mean = torch.einsum("nc,cne->ne", centre, paths.directions)
    shift = torch.cat(common) if shared else torch.zeros(seen, mean.shape[1])
    mean = mean + shift.mean(0).to(mean)
    top = _Farthest(len(paths.neurons), min(top_k, seen))
    for effects in batch_by_batch("images"):
        top.update((effects.vectors() - mean).norm(dim=2), effects.coefficients)
    if top.seen != seen:
        raise DataError(f"expected the same images twice, got {seen} and then {top.seen}")
    direction, explained = _principal(top, paths, shift.to(mean), mean)
    return NeuronDirections(
        layer=paths.layer,
        neurons=paths.neurons,
        n_samples=seen,
        direction=direction.cpu(),
        explained=explained.cpu(),
        mean=mean.cpu(),
        top=top.rows.cpu(),
        top_sizes=top.lengths.cpu(),
        shared=shared,
        origin=origin_of(model, "image", True, images),
    )


def unit_effects(paths: NeuronPaths, reached: Reached) -> Effects:
    """Converts what a batch's neurons reach to effects on its unit embeddings: those on the raw ones over their lengths."""
    length = reached.embedding.norm(dim=1).clamp_min(1e-12)
    common = None if reached.common is None else reached.common / length[:, None]
    return Effects(reached.second / length[:, None, None], paths.directions, common)


class _Farthest:
    """The ``k`` longest effects of each neuron so far: lengths, images and coefficients, longest first."""

    def __init__(self, n: int, k: int) -> None:
        self.k, self.seen = k, 0
        self.lengths = torch.zeros(n, 0)
        self.rows = torch.zeros(n, 0, dtype=torch.long)
        self.coefficients = torch.zeros(n, 0, 0)

    def update(self, lengths: Float[Tensor, "b n"], coefficients: Float[Tensor, "b n c"]) -> None:
        rows = torch.arange(self.seen, self.seen + len(lengths), device=lengths.device)
        new = (lengths.T, rows.expand(len(lengths.T), -1), coefficients.transpose(0, 1))
        if not self.seen:
            self.lengths, self.rows, self.coefficients = new
        else:
            self.lengths = torch.cat([self.lengths, new[0]], 1)
            self.rows = torch.cat([self.rows, new[1]], 1)
            self.coefficients = torch.cat([self.coefficients, new[2]], 1)
        self.seen += len(lengths)
        best = self.lengths.topk(min(self.k, self.lengths.shape[1]), dim=1)
        self.lengths, self.rows = best.values, self.rows.gather(1, best.indices)
        places = best.indices[:, :, None].expand(-1, -1, self.coefficients.shape[2])
        self.coefficients = self.coefficients.gather(1, places)


def _principal(
    top: _Farthest, paths: NeuronPaths, shift: Float[Tensor, "m e"], mean: Float[Tensor, "n e"]
) -> tuple[Float[Tensor, "n e"], Float[Tensor, " n"]]:
    """Computes the first right singular vector of each neuron's longest effects, on the side of most of them, and its
    share of their squares; some neurons at a time."""
    directions, shares = [], []
    step = max(1, _BYTES // (4 * top.rows.shape[1] * mean.shape[1]))
    for some in torch.arange(len(mean), device=mean.device).split(step):
        effects = torch.einsum("nkc,cne->nke", top.coefficients[some], paths.directions[:, some])
        effects = effects + shift[top.rows[some]] - mean[some, None]
        _, values, right = torch.linalg.svd(effects, full_matrices=False)
        first = right[:, 0]
        along = torch.einsum("nke,ne->nk", effects, first)
        majority = 2 * (along > 0).sum(1) - along.shape[1]
        # Half of them on either side: the public code leaves the sign to the SVD; here the longest decide.
        weighted = (along * effects.square().sum(2)).sum(1)
        side = torch.where(majority == 0, weighted, majority.to(along))
        directions.append(first * torch.where(side < 0, -1.0, 1.0)[:, None])
        squares = values.square()
        shares.append(squares[:, 0] / squares.sum(1).clamp_min(1e-30))
    return torch.cat(directions), torch.cat(shares)
