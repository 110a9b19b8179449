"""CKNNA: whether two representations of the same samples have the same neighbourhoods.

:func:`cknna` compares one batch; the streaming :class:`CKNNA` averages over batches, with their spread.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch

_MAX_PRODUCTS = 1 << 24  # inner products in memory at a time


@torch.no_grad()
def cknna(one: Float[Tensor, "b d"], other: Float[Tensor, "b2 d2"], *, k: int = 10) -> float:
    """Computes centred kernel nearest-neighbour alignment (Huh et al. 2024, "The Platonic Representation Hypothesis").

    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with the unbiased estimator of HSIC, where K holds the inner
    products of ``one`` and L those of ``other``, each only where the column is among the row's ``k`` nearest in
    both (in the denominator: in K, in L). 1: the same neighbours at the same distances; about 0: none in common.

    The B x B matrices have at most ``k`` entries per row, and HSIC's mixed term ``1' K L 1`` is the product of K's
    column sums and L's row sums, so nothing of size B x B is kept; the plain form multiplies such matrices.

    Raises:
        NotFinite: NaN or infinity in either side.
        ShapeMismatch: the sides differ in length, or have too few samples for ``k`` neighbours (at least ``k + 1``
            and 4).

    >>> x = torch.randn(50, 8)
    >>> round(cknna(x, 3 * x), 4)
    1.0
    """
    check_finite(one, "one side")
    check_finite(other, "the other side")
    b = len(one)
    if len(other) != b or k < 1 or b < max(4, k + 1):
        raise ShapeMismatch(
            f"CKNNA: expected the same samples on both sides, at least {max(4, k + 1)} for k = {k}, and k >= 1; got "
            f"{b} and {len(other)}"
        )
    first, second = _neighbours(one.double(), k), _neighbours(other.double(), k)
    common = _common(first, second, b)
    together = _hsic(_masked(first, common[0]), _masked(second, common[1]), b)
    own = _hsic(first, first, b), _hsic(second, second, b)
    if min(own) <= 0:  # an estimate: near 0 it takes either sign
        return math.nan
    return together / math.sqrt(own[0] * own[1])


Edges = tuple[Int[Tensor, " _"], Int[Tensor, " _"], Float[Tensor, " _"]]  # row, column, inner product


def _neighbours(x: Float[Tensor, "b d"], k: int) -> Edges:
    """Finds the ``k`` largest inner products of each row with other rows, one block of rows at a time."""
    values, columns = [], []
    for begin in range(0, len(x), max(1, _MAX_PRODUCTS // len(x))):
        block = x[begin : begin + max(1, _MAX_PRODUCTS // len(x))] @ x.T
        rows = torch.arange(len(block), device=x.device)
        block[rows, begin + rows] = -torch.inf
        best = block.topk(k, dim=1)
        values.append(best.values)
        columns.append(best.indices)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(k)
    return rows, torch.cat(columns).flatten(), torch.cat(values).flatten()


def _common(first: Edges, second: Edges, b: int) -> tuple[Tensor, Tensor]:
    """Marks the edges that both graphs have."""
    one, other = first[0] * b + first[1], second[0] * b + second[1]
    return torch.isin(one, other), torch.isin(other, one)


def _masked(edges: Edges, keep: Tensor) -> Edges:
    return edges[0][keep], edges[1][keep], edges[2][keep]


def _hsic(first: Edges, second: Edges, b: int) -> float:
    """Unbiased HSIC of two sparse matrices without diagonal (Song et al. 2012, eq. 5)."""
    (rows, columns, values), (rows2, columns2, values2) = first, second
    # tr(K L): entry (i, j) of K meets entry (j, i) of L.
    key, key2 = rows * b + columns, columns2 * b + rows2
    order = key.argsort()
    place = torch.searchsorted(key[order], key2).clamp_max(max(len(key) - 1, 0))
    met = key[order][place] == key2 if len(key) else torch.zeros_like(key2, dtype=torch.bool)
    trace = (values[order][place[met]] * values2[met]).sum()
    column_sums = values.new_zeros(b).index_add_(0, columns, values)
    row_sums = values2.new_zeros(b).index_add_(0, rows2, values2)
    both = values.sum() * values2.sum() / ((b - 1) * (b - 2))
    mixed = 2 * (column_sums @ row_sums) / (b - 2)
    return float((trace + both - mixed) / (b * (b - 3)))


class CKNNA(Metric):
    """Streaming mean over batches of :func:`~mmhooks.analysis.measures.cknna.cknna`: ``update(one, other)``, then :meth:`result`.

    Neighbours are searched within a batch, so the batch size is part of the measure: give batches of equal size
    (about 1,000 in the literature). Batches without a value (their own kernels are degenerate) are left out.

    Args:
        k: neighbours.

    >>> metric = CKNNA(k=5)
    >>> x = torch.randn(50, 8); metric.update(x, 2 * x)
    >>> round(metric.result().value, 4)
    1.0
    """

    total: Tensor
    squares: Tensor
    batches: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, *, k: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, one: Float[Tensor, "b d"], other: Float[Tensor, "b2 d2"]) -> None:
        """Adds one batch of the same samples in two representations.

        Raises:
            ShapeMismatch: the sides differ in length, or have fewer samples than neighbours.
        """
        value = cknna(one, other, k=self.k)
        if math.isnan(value):
            return
        self.total += value
        self.squares += value * value
        self.batches += 1

    def compute(self) -> dict[str, Tensor]:
        """``value`` (NaN without a batch), its standard ``error`` over batches, and the number of ``batches``."""
        n = self.batches.double()
        mean = self.total / n
        variance = (self.squares / n - mean.square()).clamp_min(0)
        error = (variance / (n - 1).clamp_min(1)).sqrt()
        return {"value": mean, "error": error, "batches": self.batches}

    def result(self) -> Estimate:
        """The mean with Student's t interval over batches; n counts batches."""
        from scipy.stats import t

        state = self.compute()
        n, value, error = int(state["batches"]), float(state["value"]), float(state["error"])
        if n < 2:
            return Estimate(value, math.nan, math.nan, n)
        half = float(t.ppf(0.975, n - 1)) * error
        return Estimate(value, value - half, value + half, n)
