"""Non-negative Lasso of many rows over one dictionary: exact solutions on small working sets.

A solution uses a few dozen atoms out of thousands. Each row keeps a working set of atoms, on which the problem is
solved exactly: which weights are above zero is found by block principal pivoting (Kim, Park 2011), all rows together,
and the weights are those of the normal equations. One product with the whole dictionary then finds atoms that are
missing. Coordinate descent instead of pivoting takes thousands of sweeps where atoms are nearly dependent, as texts
are. Measured against scikit-learn, ADMM with Woodbury's identity and FISTA (benchmarks/test_decomposition.py).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError

_ROUNDS = 100
_PIVOTS = (
    30  # where the number of wrong sides does not fall by then, atoms are dependent: one at a time is safe
)
_ROUNDING = 1e-10
_SET = 32  # atoms a row begins with
_BYTES = 2**27  # of a table of rows by atoms in memory at a time
_CACHE = 2**23  # of the Gram matrices that are worked on together: they stay in the cache


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

    Computed in double precision. A row whose duality gap stays above ``tolerance`` keeps its best weights, its gap
    says so, and a warning counts such rows.

    Raises:
        MMHooksError: a gap below what single precision can certify, or a penalty that is not above 0.

    >>> nonnegative_lasso(torch.tensor([[1.0, 0.3]]), torch.eye(2), 0.5).values
    tensor([[0.5000]])
    """
    if tolerance < 1e-6 and target.dtype != torch.float64:
        raise MMHooksError(
            f"single precision certifies no gap below 1e-6, asked {tolerance:g}: give double-precision tensors"
        )
    if not penalty > 0:
        raise MMHooksError(
            f"expected a penalty above 0, got {penalty:g}: without one every atom would be used"
        )
    atoms = dictionary.double()
    step = max(1, _BYTES // (8 * max(1, len(atoms))))
    weights: list[tuple[Tensor, Tensor]] = []
    gaps = [target.new_zeros(0, dtype=torch.float64)]
    for rows in target.double().split(step) if len(target) else []:
        found, gap = _rows(rows, atoms, penalty, tolerance)
        weights += found
        gaps.append(gap)
    gap = torch.cat(gaps)
    unsettled = int((~(gap <= tolerance)).sum())
    if unsettled:
        warnings.warn(
            f"{unsettled} of {len(target)} sparse codes did not settle: worst duality gap {float(gap.max()):.2g}, "
            f"wanted {tolerance:g}; all rows are returned, .gap says which; take a larger penalty (now {penalty:g}) "
            "or tolerance",
            stacklevel=2,
        )
    return _padded(weights, gap, target)


def _rows(
    z: Float[Tensor, "b d"], dictionary: Float[Tensor, "t d"], penalty: float, tolerance: float
) -> tuple[list[tuple[Tensor, Tensor]], Float[Tensor, " b"]]:
    """Weights above zero and their atoms, a pair a row, and the gaps."""
    weights: list[tuple[Tensor, Tensor]] = [(z.new_zeros(0), torch.zeros(0, dtype=torch.long))] * len(z)
    gaps = z.new_zeros(len(z))
    rows = torch.arange(len(z), device=z.device)
    working = torch.zeros(len(z), 0, dtype=torch.long, device=z.device)
    w, left, size = z.new_zeros(len(z), 0), z @ dictionary.T, min(_SET, len(dictionary))
    whole: Tensor | None = None
    for turn in range(_ROUNDS):
        own = z[rows]
        working, w = _grown(left, working, w, size)
        if (
            whole is None
            and len(rows) * size**2 > len(dictionary) ** 2
            and 8 * len(dictionary) ** 2 <= _BYTES
        ):
            whole = dictionary @ dictionary.T  # less than the rows' own matrices
        w, residual = _refit(own, dictionary, whole, working, w, penalty)
        left = residual @ dictionary.T
        gaps[rows] = gap = _gap(own, residual, left, w, penalty)
        again = (gap > tolerance) & (turn + 1 < _ROUNDS)
        for i in (~again).nonzero().flatten().tolist():
            used = w[i] > 0
            weights[int(rows[i])] = (w[i][used], working[i][used])
        rows, working, w, left = rows[again], working[again], w[again], left[again]
        if not len(rows):
            break
        most, missing = int((w > 0).sum(1).max()), int((left > penalty + _ROUNDING).sum(1).max())
        size = min(len(dictionary), most + max(1, min(missing, max(_SET, most // 2))))
    return weights, gaps


def _grown(
    left: Float[Tensor, "b t"], working: Int[Tensor, "b k"], w: Float[Tensor, "b k"], size: int
) -> tuple[Int[Tensor, "b s"], Float[Tensor, "b s"]]:
    """Atoms in use and, up to ``size``, those most alike to what is ``left``; their weights.

    Atoms that are out of use may go: each round lowers the objective, so no working set comes twice.
    """
    wanted = left.scatter(1, working, torch.where(w > 0, torch.inf, left.gather(1, working)))
    # In their order, so that Gram matrices are cut out of the whole one from front to back: three times as fast.
    atoms = wanted.topk(size, dim=1).indices.sort(dim=1).values
    return atoms, torch.zeros_like(left).scatter(1, working, w).gather(1, atoms)


def _refit(
    z: Float[Tensor, "b d"],
    dictionary: Float[Tensor, "t d"],
    whole: Float[Tensor, "t t"] | None,
    atoms: Int[Tensor, "b s"],
    w: Float[Tensor, "b s"],
    penalty: float,
) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b d"]]:
    """The best weights of these atoms, from those that are above zero in ``w`` on, and what they leave of ``z``.

    Args:
        whole: Gram matrix of the dictionary, where that is at hand.
    """
    size = atoms.shape[1]
    step = max(1, _CACHE // (8 * size * max(size, dictionary.shape[1])))
    found = []
    for own, chosen, guess in zip(z.split(step), atoms.split(step), w.split(step), strict=True):
        rows = dictionary[chosen]
        gram = rows @ rows.transpose(1, 2) if whole is None else whole[chosen[:, :, None], chosen[:, None]]
        alike = torch.einsum("bkd,bd->bk", rows, own) - penalty
        new = _pivoted(gram, alike, guess)
        found.append((new, own - torch.einsum("bk,bkd->bd", new, rows)))
    weights, residuals = zip(*found, strict=True)
    return torch.cat(weights), torch.cat(residuals)


def _pivoted(
    gram: Float[Tensor, "b s s"], alike: Float[Tensor, "b s"], start: Float[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """``argmin_w ½ w·gram·w - alike·w``, ``w >= 0``, from ``start`` on.

    Weights that come out negative and zeros that want to grow change sides, all at once; a few such exchanges do for
    atoms that are independent. Rows that still have wrong ones go on by the active set.
    """
    out, rows = start.clone(), torch.arange(len(alike), device=alike.device)
    w, inside = start, start > 0
    for turn in range(_PIVOTS):
        if turn:  # what it starts from solves the normal equations already
            out[rows] = w = _normal_equations(gram, alike, inside)
        wrong = (inside & (w < 0)) | (~inside & (_slope(gram, alike, w) > _ROUNDING))
        again = wrong.any(1)
        inside = inside ^ wrong
        if not bool(again.all()):  # Gram matrices are large: copied only where some rows are done
            rows, gram, alike, inside = rows[again], gram[again], alike[again], inside[again]
        if not len(rows):
            return out
    out[rows] = _active_set(gram, alike, start[rows])
    return out


def _active_set(
    gram: Float[Tensor, "b s s"], alike: Float[Tensor, "b s"], start: Float[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """The same, after Lawson and Hanson: from one feasible point to a better one, an atom in or some out at a time."""
    w, positive = start.clone(), start > 0
    rows = torch.arange(len(w), device=w.device)
    for _ in range(10 * w.shape[1]):
        inside, now = positive[rows], w[rows]
        wanted = _normal_equations(gram[rows], alike[rows], inside)
        blocked = inside & (wanted <= 0)
        # As far towards them as no weight falls below zero.
        step = torch.where(blocked, now / (now - wanted).clamp_min(1e-300), 1.0).amin(1, keepdim=True)
        now = torch.where(inside, now + step * (wanted - now), 0.0)
        inside = inside & ~(blocked & (now <= _ROUNDING))
        w[rows] = now = torch.where(inside, now, 0.0)
        slope = torch.where(inside, -torch.inf, _slope(gram[rows], alike[rows], now))
        steepest, best = slope.max(1)
        free, grows = ~blocked.any(1), steepest > _ROUNDING
        enters = torch.zeros_like(inside).scatter(1, best[:, None], (free & grows)[:, None])
        positive[rows] = inside | enters
        rows = rows[~free | grows]
        if not len(rows):
            break
    return w


def _slope(
    gram: Float[Tensor, "b s s"], alike: Float[Tensor, "b s"], w: Float[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """By how much a little more of each atom would lower the objective."""
    return alike - torch.einsum("bij,bj->bi", gram, w)


def _normal_equations(
    gram: Float[Tensor, "b s s"], alike: Float[Tensor, "b s"], inside: Bool[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """``gram w = alike`` of the atoms ``inside``, 0 for the others; these are packed together first."""
    most = int(inside.sum(1).max())
    if not most:
        return torch.zeros_like(alike)
    order = inside.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    here = inside.gather(1, order)
    own = torch.arange(len(gram), device=gram.device)[:, None, None]
    packed = gram[own, order[:, :, None], order[:, None]]
    if not bool(here.all()):
        packed.mul_(here[:, :, None]).mul_(here[:, None])
    # A trace of ridge: equal atoms share their weight instead of making the matrix singular.
    diagonal = packed.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(here, diagonal * (1 + 1e-10), 1.0))
    right = torch.where(here, alike.gather(1, order), 0.0)
    factor, _ = torch.linalg.cholesky_ex(packed)
    w = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    return torch.zeros_like(alike).scatter(1, order, torch.where(here, w, 0.0).nan_to_num())


def _gap(
    z: Float[Tensor, "b d"],
    residual: Float[Tensor, "b d"],
    left: Float[Tensor, "b t"],
    w: Float[Tensor, "b k"],
    penalty: float,
) -> Float[Tensor, " b"]:
    """Objective less a bound from below: the dual objective at the residual, scaled until it is feasible.

    Args:
        left: atoms times the residual.
    """
    scale = (penalty / left.amax(1).clamp_min(1e-12)).clamp_max(1)
    along, squares = (z * residual).sum(1), residual.square().sum(1)
    # ½ r·r + λΣw - (½ z·z - ½‖z - s r‖²)
    value = 0.5 * squares + penalty * w.sum(1)
    bound = scale * along - 0.5 * scale.square() * squares
    return (value - bound).clamp_min(0)


def _padded(weights: list[tuple[Tensor, Tensor]], gaps: Tensor, like: Tensor) -> Solved:
    width = max([1, *(len(v) for v, _ in weights)])
    values = like.new_zeros(len(weights), width)
    indices = torch.zeros(len(weights), width, dtype=torch.long, device=like.device)
    for i, (v, a) in enumerate(weights):
        order = v.argsort(descending=True)
        values[i, : len(v)], indices[i, : len(v)] = v[order].to(like.dtype), a[order]
    return Solved(values, indices, gaps.to(like.dtype))
