"""Second-order effects of MLP neurons over a data set: what a neuron adds to the embedding through later attention heads.

See :mod:`~mmhooks.analysis.decomposition.neuron_effects` for the effects. They are numbers along directions that depend
only on the weights, so over a data set only the second moments of these numbers are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.decomposition.dataset import Inputs, batches
from mmhooks.analysis.decomposition.neuron_effects import neuron_paths, read_twice
from mmhooks.analysis.measures.top_activating import TopSamples
from mmhooks.analysis.results import Records, Result
from mmhooks.errors import DataError
from mmhooks.models.clip.inputs import Model, check_model
from mmhooks.utils.progress import track


@dataclass(frozen=True)
class SecondOrder(Result):
    """Second-order effects of the neurons of one layer over a data set.

    Attributes:
        neurons: their numbers in the MLP.
        direction: first principal direction (uncentred) of each neuron's effects, oriented towards the largest centred
            ones: it says what the neuron's strongest images have that others do not. The mean does not say that; for
            more than a third of neurons it points the other way.
        explained: its share of the sum of squares, that is, how close the effects are to rank 1.
        size: root mean square of the effects' norm. ``reference``: that of the embeddings.
        top: images whose effect lies farthest from the mean of all, farthest first, as the paper's code ranks them;
            ``top_sizes``: the distances. -1: fewer images than requested. Ranked by the effects themselves, the images
            would be those of the mean, and for a third of neurons show the opposite of ``direction``.
    """

    layer: int
    neurons: tuple[int, ...]
    n_samples: int
    direction: Float[Tensor, "n e"] = field(repr=False, compare=False)
    explained: Float[Tensor, " n"]
    size: Float[Tensor, " n"]
    reference: float
    top: Int[Tensor, "n m"]
    top_sizes: Float[Tensor, "n m"]

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_json().items() if k != "direction"}

    def strongest(self, k: int = 10) -> list[int]:
        """Rows of the ``k`` neurons with the largest effects."""
        return self.size.argsort(descending=True)[:k].tolist()

    def table(self, k: int = 10) -> Records:
        return Records(
            {
                "neuron": self.neurons[i],
                "size": float(self.size[i]) / self.reference,
                "rank 1": float(self.explained[i]),
                "top images": ", ".join(str(j) for j in self.top[i].tolist()[:5] if j >= 0),
            }
            for i in self.strongest(k)
        )


@torch.no_grad()
def second_order(
    model: Model,
    images: Tensor | Inputs,
    *,
    layer: Any,
    neurons: Any = None,
    top: int = 8,
    batch_size: int = 32,
    progress: bool = False,
) -> SecondOrder:
    """Computes second-order effects of the MLP neurons of ``layer`` on the raw image embedding, over all images.

    The directions of the paper's public code, from each neuron's hundred most significant images, are those of
    ``mm.neuron_directions``.

    Args:
        images: pixels, a list of batches of them, or pairs; read twice, for the mean and for the distances from it.
            Memory does not depend on their number.
        layer, neurons: as in :func:`~mmhooks.analysis.decomposition.neuron_effects.second_order_effects`.
        top: number of most significant images to keep per neuron.

    Raises:
        DataError: an iterator was given, which can be read only once, or the images differ when read again. Also the
            errors of ``second_order_effects``.

    >>> import mmhooks as mm
    >>> found = second_order(mm.load("mini"), torch.randn(4, 3, 64, 64), layer=3, neurons=[0, 1], top=2)
    >>> found.direction.shape, found.top.shape
    (torch.Size([2, 256]), torch.Size([2, 2]))
    """
    check_model(model)
    read_twice(images)
    paths = neuron_paths(model, layer, neurons)
    directions, chosen = paths.directions, paths.neurons
    moments = _Moments(torch.einsum("cne,kne->nck", directions, directions).cpu().double())
    norms, largest = 0.0, TopSamples(len(chosen), m=top)

    def batch_by_batch(what: str) -> Iterator[tuple[Tensor, Tensor]]:
        source = batches(model, images, "image", batch_size, 0)
        for pixels in track(source, None, f"neurons of block {paths.layer}: {what}", show=progress):
            found = paths.reach(pixels)
            yield found.second.cpu().double(), found.embedding

    for s, embedding in batch_by_batch("moments"):
        moments.add(s)
        norms += float(embedding.double().square().sum())
    for s, _ in batch_by_batch("images"):
        largest.update(moments.distances(s).float())
    seen = moments.n
    if not seen:
        raise DataError("second-order effects: expected at least one image, got no images")
    if int(largest.n_samples) != seen:
        raise DataError(f"expected the same images twice, got {seen} and then {int(largest.n_samples)}")
    direction, explained, squares = _principal(moments, directions.cpu().double())
    found = largest.result()
    return SecondOrder(
        layer=paths.layer,
        neurons=chosen,
        n_samples=seen,
        direction=direction.float(),
        explained=explained.float(),
        size=(squares / seen).sqrt().float(),
        reference=(norms / seen) ** 0.5,
        top=found.indices,
        top_sizes=found.values,
    )


class _Moments:
    """Sums over images of the coefficients ``s`` [b n c], from which direction, size and sign of the effects follow."""

    def __init__(self, gram: Float[Tensor, "n c c"]) -> None:
        self.gram, self.n = gram, 0
        self.total = gram.new_zeros(gram.shape[:2])
        self.second = torch.zeros_like(gram)
        self.third = torch.zeros_like(self.total)

    def distances(self, s: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        """Computes the distance of each effect of a batch from the mean of all effects added."""
        centred = s - self.total / self.n
        return torch.einsum("bnc,nck,bnk->bn", centred, self.gram, centred).clamp_min(0).sqrt()

    def add(self, s: Float[Tensor, "b n c"]) -> None:
        """Adds a batch."""
        squares = torch.einsum("bnc,nck,bnk->bn", s, self.gram, s).clamp_min(0)
        self.n += len(s)
        self.total += s.sum(0)
        self.second += torch.einsum("bnc,bnk->nck", s, s)
        self.third += torch.einsum("bn,bnc->nc", squares, s)

    def signs(self, along: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Computes the side, 1 or -1, on which the largest centred effects lie along a direction; ``along`` holds its
        inner products with the directions that ``c`` counts.

        The paper's code takes the majority of the hundred largest, which needs all effects of all images. Here every
        centred effect ``x`` is weighted by ``|x|²``: ``Σ |x|² x``, which sums give in one pass. If that is only
        rounding (one image, or two), the mean decides.
        """
        mean = self.total / self.n
        toward = torch.einsum("nck,nk->nc", self.gram, mean)  # products of coefficients with the mean effect
        length = (mean * toward).sum(1, keepdim=True)
        # |x|² = |e|² - 2 e·mean + |mean|², and this times e
        weighted = self.third - 2 * torch.einsum("nck,nk->nc", self.second, toward) + length * self.total
        squares = torch.einsum("nck,nck->n", self.second, self.gram)
        weights = squares[:, None] - self.n * length
        third_moment = ((weighted - weights * mean) * along).sum(1)
        typical = (squares / self.n).clamp_min(0).sqrt()
        decides = third_moment.abs() > 1e-9 * self.n * typical**3
        return torch.where(torch.where(decides, third_moment, (mean * along).sum(1)) < 0, -1.0, 1.0)


def _principal(
    moments: _Moments, directions: Float[Tensor, "c n e"]
) -> tuple[Float[Tensor, "n e"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Computes the first right singular vector of each neuron's effects, its share of their squares, and these squares.

    With ``S = U Λ Uᵀ`` the effects' ``Dᵀ S D`` is ``BᵀB`` for ``B = √Λ Uᵀ D``, and ``BBᵀ`` is only c x c.
    """
    values, vectors = torch.linalg.eigh(moments.second)
    by_neuron = directions.transpose(0, 1)
    b = values.clamp_min(0).sqrt()[:, :, None] * (vectors.transpose(1, 2) @ by_neuron)
    squares, left = torch.linalg.eigh(b @ b.transpose(1, 2))
    first = torch.einsum("nce,nc->ne", b, left[:, :, -1])
    first = torch.nn.functional.normalize(first, dim=1)
    sign = moments.signs(torch.einsum("nce,ne->nc", by_neuron, first))
    sum_of_squares = squares.clamp_min(0).sum(1)
    share = torch.where(sum_of_squares > 0, squares[:, -1] / sum_of_squares.clamp_min(1e-300), torch.nan)
    return first * sign[:, None], share, sum_of_squares
