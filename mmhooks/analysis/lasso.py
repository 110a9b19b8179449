"""Non-negative Lasso of many rows over one dictionary: coordinate descent on small working sets.

A solution uses a few dozen atoms out of thousands. Each row keeps a working set of atoms; a batch descends along their
Gram matrices, then one product with the whole dictionary finds atoms that are missing. Measured against ADMM with
Woodbury's identity and FISTA at equal error (benchmarks/test_decomposition.py), which go through the whole dictionary
in every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError

_ROUNDS = 100
_SWEEPS = 2000
_SET = 32  # atoms a row begins with
_BYTES = 2**27  # Gram matrices in memory at a time


class Solved(NamedTuple):
    """Weights, largest first (0 pads), their atoms, and each row's duality gap."""

    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    gap: Float[Tensor, " n"]


@torch.no_grad()
def nonnegative_lasso(
    target: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "t d"],
    penalty: float,
    *,
    tolerance: float = 1e-6,
) -> Solved:
    """``argmin_w ½‖w @ dictionary - target‖² + penalty · Σw``, ``w >= 0``, of every row.

    Raises:
        MMHooksError: a row whose duality gap stays above ``tolerance``, or one that single precision cannot certify.

    >>> nonnegative_lasso(torch.tensor([[1.0, 0.3]]), torch.eye(2), 0.5).values
    tensor([[0.5000]])
    """
    if tolerance < 1e-6 and target.dtype != torch.float64:
        raise MMHooksError(
            f"single precision certifies no gap below 1e-6, asked {tolerance:g}: give double-precision tensors"
        )
    n = len(target)
    weights: list[tuple[Tensor, Tensor]] = [(target.new_zeros(0), torch.zeros(0, dtype=torch.long))] * n
    gaps = target.new_zeros(n)
    size = min(_SET, len(dictionary))
    rows = torch.arange(n, device=target.device)
    working = torch.zeros(n, 0, dtype=torch.long, device=target.device)
    start = target.new_zeros(n, 0)
    for _ in range(_ROUNDS):
        if not len(rows):
            break
        again: list[tuple[Tensor, Tensor, Tensor]] = []
        step = max(1, _BYTES // (4 * size * max(size, dictionary.shape[1])))
        for part in torch.arange(len(rows), device=target.device).split(step):
            own, z = rows[part], target[rows[part]]
            atoms, w = _grow(z, dictionary, working[part], start[part], size)
            chosen = dictionary[atoms]
            gram, alike = chosen @ chosen.transpose(1, 2), torch.einsum("bkd,bd->bk", chosen, z)
            w = _descend(gram, alike, z.square().sum(1), w, penalty, tolerance / 2)
            left = z - torch.einsum("bk,bkd->bd", w, chosen)
            gap = _gap(
                z.square().sum(1), (z * left).sum(1), left.square().sum(1), left @ dictionary.T, w, penalty
            )
            done = gap <= tolerance
            gaps[own] = gap
            for i in done.nonzero().flatten().tolist():
                used = w[i] > 0
                weights[int(own[i])] = (w[i][used], atoms[i][used])
            again.append((own[~done], atoms[~done], w[~done]))
        if not again:
            break
        rows, working, start = (torch.cat(x) for x in zip(*again, strict=True))
        if len(rows):
            size = min(len(dictionary), size + max(_SET, int((start > 0).sum(1).max())))
    if len(rows):
        raise MMHooksError(
            f"{len(rows)} of {n} sparse codes did not settle: worst duality gap {float(gaps[rows].max()):.2g}, wanted "
            f"{tolerance:g}; take a larger penalty (now {penalty:g}) or tolerance"
        )
    return _padded(weights, gaps, target)


def _grow(
    z: Float[Tensor, "b d"],
    dictionary: Float[Tensor, "t d"],
    working: Int[Tensor, "b k"],
    w: Float[Tensor, "b k"],
    size: int,
) -> tuple[Int[Tensor, "b s"], Float[Tensor, "b s"]]:
    """Atoms in use and, up to ``size``, those most alike to what is left."""
    left = z - torch.einsum("bk,bkd->bd", w, dictionary[working])
    wanted = left @ dictionary.T
    wanted = wanted.scatter(1, working, torch.where(w > 0, torch.inf, wanted.gather(1, working)))
    atoms = wanted.topk(size, dim=1).indices
    full = z.new_zeros(wanted.shape).scatter(1, working, w)
    return atoms, full.gather(1, atoms)


def _descend(
    gram: Float[Tensor, "b k k"],
    alike: Float[Tensor, "b k"],
    squares: Float[Tensor, " b"],
    w: Float[Tensor, "b k"],
    penalty: float,
    tolerance: float,
) -> Float[Tensor, "b k"]:
    """Cyclic coordinate descent of all rows together, until the gap among these atoms is within ``tolerance``.

    How little a sweep moves is no sign: among atoms that are nearly dependent it moves little while the gap is wide.
    """
    w = w.clone()
    length = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    for _ in range(_SWEEPS):
        left = alike - torch.einsum("bij,bj->bi", gram, w)  # atoms times what is left
        squares_left = squares - (w * (alike + left)).sum(1)
        gap = _gap(squares, squares - (w * alike).sum(1), squares_left, left, w, penalty)
        if float(gap.amax()) <= tolerance:
            break
        slope = left - penalty  # minus the derivative
        for j in range(w.shape[1]):
            change = (w[:, j] + slope[:, j] / length[:, j]).clamp_min(0) - w[:, j]
            w[:, j] += change
            slope -= change[:, None] * gram[:, j]
    return w


def _gap(
    squares: Float[Tensor, " b"],
    along: Float[Tensor, " b"],
    squares_left: Float[Tensor, " b"],
    left: Float[Tensor, "b t"],
    w: Float[Tensor, "b k"],
    penalty: float,
) -> Float[Tensor, " b"]:
    """Objective less a bound from below: the dual objective at the residual ``r``, scaled until it is feasible.

    Args:
        squares, along, squares_left: ``z·z``, ``z·r`` and ``r·r``.
        left: atoms times ``r``.
    """
    scale = (penalty / left.amax(1).clamp_min(1e-12)).clamp_max(1)
    # ½ r·r + λΣw - (½ z·z - ½‖z - s r‖²)
    value = 0.5 * squares_left + penalty * w.sum(1)
    bound = scale * along - 0.5 * scale.square() * squares_left
    return (value - bound).clamp_min(0)


def _padded(weights: list[tuple[Tensor, Tensor]], gaps: Tensor, like: Tensor) -> Solved:
    width = max([1, *(len(v) for v, _ in weights)])
    values = like.new_zeros(len(weights), width)
    indices = torch.zeros(len(weights), width, dtype=torch.long, device=like.device)
    for i, (v, a) in enumerate(weights):
        order = v.argsort(descending=True)
        values[i, : len(v)], indices[i, : len(v)] = v[order], a[order]
    return Solved(values, indices, gaps)
