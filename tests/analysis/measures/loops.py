"""Naive loops in float64 that the measures are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def close(a: object, b: object, tolerance: float = 1e-6) -> None:
    """Asserts that two numbers or tensors are equal up to ``tolerance``, NaN included."""
    one, other = (torch.as_tensor(x).double() for x in (a, b))
    torch.testing.assert_close(one, other, equal_nan=True, rtol=tolerance, atol=tolerance)


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of no values."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def cos(x: Tensor, i: int, j: int) -> float:
    """Cosine of rows i and j."""
    return float(cosine_similarity(x[i].double(), x[j].double(), dim=0))


def naive_top(latents: Tensor, k: int, m: int) -> list[int]:
    """The m samples that activate feature k most, ties by position."""
    ranked = sorted(range(len(latents)), key=lambda i: (-float(latents[i, k]), i))
    return [i for i in ranked if latents[i, k] > 0][:m]


def naive_pool(x: Tensor) -> float:
    """Mean cosine over all pairs of different rows."""
    return mean(cos(x, i, j) for i in range(len(x)) for j in range(len(x)) if i != j)


def naive_monosemanticity(latents: Tensor, vectors: Tensor) -> Tensor:
    """MonoSemanticity of every feature as the weighted sum over all pairs."""
    found = []
    for a in latents.double().T:
        if float(a.max()) == float(a.min()):
            found.append(math.nan)
            continue
        a = (a - a.min()) / (a.max() - a.min())
        above = below = 0.0
        for i in range(len(a)):
            for j in range(i):
                weight = float(a[i] * a[j])
                above += weight * float(cosine_similarity(vectors[i].double(), vectors[j].double(), dim=0))
                below += weight
        found.append(above / below if below > 1e-9 else math.nan)
    return torch.tensor(found, dtype=torch.float64)
