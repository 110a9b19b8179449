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
            w = _descend(
                chosen @ chosen.transpose(1, 2), torch.einsum("bkd,bd->bk", chosen, z), w, penalty, tolerance
            )
            gap = _gap(z, z - torch.einsum("bk,bkd->bd", w, chosen), w, dictionary, penalty)
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
    w: Float[Tensor, "b k"],
    penalty: float,
    tolerance: float,
) -> Float[Tensor, "b k"]:
    """Cyclic coordinate descent of all rows together, until a sweep moves nothing that would show."""
    w = w.clone()
    length = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    slope = alike - penalty - torch.einsum("bij,bj->bi", gram, w)  # minus the derivative
    for _ in range(_SWEEPS):
        largest = 0.0
        moved = torch.zeros((), dtype=w.dtype, device=w.device)
        for j in range(w.shape[1]):
            change = (w[:, j] + slope[:, j] / length[:, j]).clamp_min(0) - w[:, j]
            w[:, j] += change
            slope -= change[:, None] * gram[:, j]
            moved = torch.maximum(moved, change.abs().amax())
        largest = float(moved)
        if largest <= tolerance:
            break
    return w


def _gap(
    z: Float[Tensor, "b d"],
    left: Float[Tensor, "b d"],
    w: Float[Tensor, "b k"],
    dictionary: Float[Tensor, "t d"],
    penalty: float,
) -> Float[Tensor, " b"]:
    """Objective less a bound from below: the dual objective at the residual, scaled until it is feasible."""
    scale = (penalty / (left @ dictionary.T).amax(1).clamp_min(1e-12)).clamp_max(1)
    # ½‖r‖² + λΣw - (½‖z‖² - ½‖z - s r‖²)
    value = 0.5 * left.square().sum(1) + penalty * w.sum(1)
    bound = 0.5 * (z.square().sum(1) - (z - scale[:, None] * left).square().sum(1))
    return (value - bound).clamp_min(0)


def _padded(weights: list[tuple[Tensor, Tensor]], gaps: Tensor, like: Tensor) -> Solved:
    width = max([1, *(len(v) for v, _ in weights)])
    values = like.new_zeros(len(weights), width)
    indices = torch.zeros(len(weights), width, dtype=torch.long, device=like.device)
    for i, (v, a) in enumerate(weights):
        order = v.argsort(descending=True)
        values[i, : len(v)], indices[i, : len(v)] = v[order], a[order]
    return Solved(values, indices, gaps)
