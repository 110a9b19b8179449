"""Centres of point clouds and directions: the geometry that heads are initialised and constrained with."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def geometric_median(x: Float[Tensor, "n d"], *, steps: int = 100, tol: float = 1e-6) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows of ``x`` (Weiszfeld's iteration).

    >>> geometric_median(torch.tensor([[0.0], [1.0], [100.0]])).round().tolist()
    [1.0]
    """
    x = x.double()
    centre = x.mean(dim=0)
    scale = float((x - centre).norm(dim=1).mean())
    for _ in range(steps):
        weight = 1 / (x - centre).norm(dim=1).clamp_min(1e-9 * max(scale, 1e-30))
        moved = (weight[:, None] * x).sum(dim=0) / weight.sum()
        done = float((moved - centre).norm()) <= tol * scale
        centre = moved
        if done:
            break
    return centre.float()


def unit_rows(w: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of unit norm; a row of zeros stays zero."""
    return w / w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)


def without_parallel(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The gradient without its part along each row: what moves unit rows over the sphere, not off it."""
    along = (gradient * rows).sum(dim=1, keepdim=True) / (rows * rows).sum(dim=1, keepdim=True).clamp_min(
        1e-30
    )
    return gradient - along * rows


def total_variance(x: Float[Tensor, "n d"]) -> float:
    """Mean squared distance of the rows to their mean: FVU's denominator, per row."""
    return float(x.double().var(dim=0, correction=0).sum())
