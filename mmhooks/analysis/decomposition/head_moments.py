"""Streaming mean and covariance of attention heads' outputs, all that TextSpan needs of the images."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import check_finite, check_numbers, chunks
from mmhooks.errors import ShapeMismatch


class HeadMoments(Metric):
    """Mean ``[h d]`` and covariance ``[h d d]`` of ``h`` attention heads' outputs over a data set.

    Sums are kept in float64, so that batches, processes and :func:`merged` parts give the same as one pass over
    everything. Memory: ``8 h d²`` bytes, for any number of images.

    >>> moments = HeadMoments(1, 2)
    >>> moments.update(torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]))
    >>> moments.compute()["covariance"]
    tensor([[[1., 0.],
             [0., 0.]]], dtype=torch.float64)
    """

    total: Tensor
    second: Tensor
    n_samples: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, heads: int, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.dim = heads, dim
        self.add_state("total", torch.zeros(heads, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("second", torch.zeros(heads, dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, outputs: Float[Tensor, "n h d"]) -> None:
        """Adds a batch: what each head writes into the embedding of each image.

        Raises:
            ShapeMismatch: the number of heads or the width differs. NotFinite: NaN or infinity.
        """
        check_numbers(outputs, "head outputs", ndim=3)
        if outputs.shape[1:] != (self.heads, self.dim):
            raise ShapeMismatch(
                f"head outputs: expected {self.heads} heads x {self.dim}, got {outputs.shape[1]} x {outputs.shape[2]}"
            )
        start = int(self.n_samples)
        for begin, part in chunks(outputs.flatten(1)):
            check_finite(part, "head outputs", start=start + begin)
            by_head = part.detach().to(self.second.device, torch.float64).view(-1, self.heads, self.dim)
            by_head = by_head.transpose(0, 1)
            self.total += by_head.sum(1)
            self.second.baddbmm_(by_head.transpose(1, 2), by_head)
        self.n_samples = self.n_samples + len(outputs)

    def compute(self) -> dict[str, Tensor]:
        """``mean`` [h d], ``covariance`` [h d d] (population) and ``n_samples``."""
        n = self.n_samples.double()
        mean = self.total / n
        return {
            "mean": mean,
            "covariance": self.second / n - mean[:, :, None] * mean[:, None, :],
            "n_samples": self.n_samples,
        }


def merged(parts: list[HeadMoments]) -> HeadMoments:
    """Merges the moments of disjoint parts of the data; the parts are not changed.

    >>> a, b = HeadMoments(1, 2), HeadMoments(1, 2)
    >>> a.update(torch.ones(3, 1, 2)); b.update(torch.ones(2, 1, 2))
    >>> int(merged([a, b]).n_samples)
    5
    """
    if not parts:
        raise ShapeMismatch("merged: expected at least one part, got none")
    shapes = {(p.heads, p.dim) for p in parts}
    if len(shapes) > 1:
        raise ShapeMismatch(f"merged: expected parts of the same heads and width, got {sorted(shapes)}")
    out = HeadMoments(parts[0].heads, parts[0].dim).to(parts[0].second.device)
    for part in parts:
        out.merge_state(part)
        out._update_count += 1  # merge_state does not, and compute() would warn
    return out
