"""Non-negative Lasso of many rows over one dictionary: exact solutions on small working sets.

A solution uses a few dozen atoms out of thousands. Each row keeps a working set of atoms, on which the problem is
solved exactly: block principal pivoting (Kim, Park 2011), for all rows together, finds which weights are positive, and
the normal equations give their values. One product with the whole dictionary then finds missing atoms. Coordinate
descent would take thousands of sweeps where atoms are nearly dependent, as texts are. Measured against scikit-learn,
ADMM with Woodbury's identity and FISTA (benchmarks/test_decomposition.py).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError

_ROUNDS = 100
_PIVOTS = 30  # if pivoting has not converged by then, atoms are dependent: changing one at a time is safe
_ROUNDING = 1e-10
_SET = 32  # atoms in a row's first working set
_BYTES = 2**27  # largest rows x atoms matrix in memory
_CACHE = 2**23  # bytes of the Gram matrices processed together, so that they stay in the CPU cache


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
    """Solves ``argmin_w ½‖w @ dictionary - target‖² + penalty · Σw``, ``w >= 0``, for every row.

    Computed in float64. A row whose duality gap stays above ``tolerance`` keeps its best weights; its gap shows
    that, and a warning counts such rows.

    Raises:
        MMHooksError: ``tolerance`` is below what float32 can certify, or the penalty is not above 0.

    >>> nonnegative_lasso(torch.tensor([[1.0, 0.3]]), torch.eye(2), 0.5).values
    tensor([[0.5000]])
    """
    if tolerance < 1e-6 and target.dtype != torch.float64:
        raise MMHooksError(
            f"tolerance: expected at least 1e-6, as float32 certifies no gap below 1e-6, got {tolerance:g}: give float64 tensors"
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
            f"{unsettled} of {len(target)} sparse codes did not converge: worst duality gap {float(gap.max()):.2g}, "
            f"tolerance {tolerance:g}; all rows are returned, .gap says which; use a larger penalty (now {penalty:g}) "
            "or tolerance",
            stacklevel=2,
        )
    return _padded(weights, gap, target)


def _rows(
    z: Float[Tensor, "b d"], dictionary: Float[Tensor, "t d"], penalty: float, tolerance: float
) -> tuple[list[tuple[Tensor, Tensor]], Float[Tensor, " b"]]:
    """Solves some rows; returns their positive weights and atoms, one pair per row, and the gaps."""
    weights: list[tuple[Tensor, Tensor]] = [(z.new_zeros(0), torch.zeros(0, dtype=torch.long))] * len(z)
    gaps = z.new_zeros(len(z))
    rows = torch.arange(len(z), device=z.device)
    working = torch.zeros(len(z), 0, dtype=torch.long, device=z.device)
    w, correlation, size = z.new_zeros(len(z), 0), z @ dictionary.T, min(_SET, len(dictionary))
    full_gram: Tensor | None = None
    for turn in range(_ROUNDS):
        own = z[rows]
        working, w = _grow_working_set(correlation, working, w, size)
        if (
            full_gram is None
            and len(rows) * size**2 > len(dictionary) ** 2
            and 8 * len(dictionary) ** 2 <= _BYTES
        ):
            full_gram = dictionary @ dictionary.T  # smaller than the rows' own matrices together
        w, residual = _refit(own, dictionary, full_gram, working, w, penalty)
        correlation = residual @ dictionary.T
        gaps[rows] = gap = _duality_gap(own, residual, correlation, w, penalty)
        again = (gap > tolerance) & (turn + 1 < _ROUNDS)
        for i in (~again).nonzero().flatten().tolist():
            used = w[i] > 0
            weights[int(rows[i])] = (w[i][used], working[i][used])
        rows, working, w, correlation = rows[again], working[again], w[again], correlation[again]
        if not len(rows):
            break
        most, missing = int((w > 0).sum(1).max()), int((correlation > penalty + _ROUNDING).sum(1).max())
        size = min(len(dictionary), most + max(1, min(missing, max(_SET, most // 2))))
    return weights, gaps


def _grow_working_set(
    correlation: Float[Tensor, "b t"], working: Int[Tensor, "b k"], w: Float[Tensor, "b k"], size: int
) -> tuple[Int[Tensor, "b s"], Float[Tensor, "b s"]]:
    """Selects the atoms in use and, up to ``size``, those most correlated with the residual; returns their weights too.

    Unused atoms may leave: each round lowers the objective, so no working set occurs twice.
    """
    wanted = correlation.scatter(1, working, torch.where(w > 0, torch.inf, correlation.gather(1, working)))
    # Sorted, so that Gram matrices are cut out of the full one from front to back: three times as fast.
    atoms = wanted.topk(size, dim=1).indices.sort(dim=1).values
    return atoms, torch.zeros_like(correlation).scatter(1, working, w).gather(1, atoms)


def _refit(
    z: Float[Tensor, "b d"],
    dictionary: Float[Tensor, "t d"],
    full_gram: Float[Tensor, "t t"] | None,
    atoms: Int[Tensor, "b s"],
    w: Float[Tensor, "b s"],
    penalty: float,
) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b d"]]:
    """Finds the best weights of these atoms, starting from those positive in ``w``, and the residual of ``z``.

    Args:
        full_gram: Gram matrix of the dictionary, if it was computed.
    """
    size = atoms.shape[1]
    step = max(1, _CACHE // (8 * size * max(size, dictionary.shape[1])))
    found = []
    for own, chosen, guess in zip(z.split(step), atoms.split(step), w.split(step), strict=True):
        rows = dictionary[chosen]
        gram = (
            rows @ rows.transpose(1, 2)
            if full_gram is None
            else full_gram[chosen[:, :, None], chosen[:, None]]
        )
        linear = torch.einsum("bkd,bd->bk", rows, own) - penalty
        new = _pivoted(gram, linear, guess)
        found.append((new, own - torch.einsum("bk,bkd->bd", new, rows)))
    weights, residuals = zip(*found, strict=True)
    return torch.cat(weights), torch.cat(residuals)


def _pivoted(
    gram: Float[Tensor, "b s s"], linear: Float[Tensor, "b s"], start: Float[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """Solves ``argmin_w ½ w·gram·w - linear·w``, ``w >= 0``, starting from ``start``, by block pivoting.

    Negative weights and zeros whose gradient points up change sides, all at once; a few exchanges suffice if atoms are
    independent. Rows that have not converged continue with the active-set method.
    """
    out, rows = start.clone(), torch.arange(len(linear), device=linear.device)
    w, inside = start, start > 0
    for turn in range(_PIVOTS):
        if turn:  # the start already solves the normal equations
            out[rows] = w = _normal_equations(gram, linear, inside)
        wrong = (inside & (w < 0)) | (~inside & (_slope(gram, linear, w) > _ROUNDING))
        again = wrong.any(1)
        inside = inside ^ wrong
        if not bool(again.all()):  # Gram matrices are large: copied only where some rows are done
            rows, gram, linear, inside = rows[again], gram[again], linear[again], inside[again]
        if not len(rows):
            return out
    out[rows] = _active_set(gram, linear, start[rows])
    return out


def _active_set(
    gram: Float[Tensor, "b s s"], linear: Float[Tensor, "b s"], start: Float[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """Solves the same problem after Lawson and Hanson: each step moves to a better feasible point, one atom in or some out."""
    w, positive = start.clone(), start > 0
    rows = torch.arange(len(w), device=w.device)
    for _ in range(10 * w.shape[1]):
        inside, now = positive[rows], w[rows]
        wanted = _normal_equations(gram[rows], linear[rows], inside)
        blocked = inside & (wanted <= 0)
        # As far towards them as possible without a negative weight.
        step = torch.where(blocked, now / (now - wanted).clamp_min(1e-300), 1.0).amin(1, keepdim=True)
        now = torch.where(inside, now + step * (wanted - now), 0.0)
        inside = inside & ~(blocked & (now <= _ROUNDING))
        w[rows] = now = torch.where(inside, now, 0.0)
        slope = torch.where(inside, -torch.inf, _slope(gram[rows], linear[rows], now))
        steepest, best = slope.max(1)
        free, grows = ~blocked.any(1), steepest > _ROUNDING
        enters = torch.zeros_like(inside).scatter(1, best[:, None], (free & grows)[:, None])
        positive[rows] = inside | enters
        rows = rows[~free | grows]
        if not len(rows):
            break
    return w


def _slope(
    gram: Float[Tensor, "b s s"], linear: Float[Tensor, "b s"], w: Float[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """Computes the negative gradient: how fast the objective falls as each atom's weight grows."""
    return linear - torch.einsum("bij,bj->bi", gram, w)


def _normal_equations(
    gram: Float[Tensor, "b s s"], linear: Float[Tensor, "b s"], inside: Bool[Tensor, "b s"]
) -> Float[Tensor, "b s"]:
    """Solves ``gram w = linear`` for the atoms ``inside``, which are packed together first; the others get 0."""
    most = int(inside.sum(1).max())
    if not most:
        return torch.zeros_like(linear)
    order = inside.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    here = inside.gather(1, order)
    own = torch.arange(len(gram), device=gram.device)[:, None, None]
    packed = gram[own, order[:, :, None], order[:, None]]
    if not bool(here.all()):
        packed.mul_(here[:, :, None]).mul_(here[:, None])
    # A tiny ridge: identical atoms share their weight instead of making the matrix singular.
    diagonal = packed.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(here, diagonal * (1 + 1e-10), 1.0))
    right = torch.where(here, linear.gather(1, order), 0.0)
    factor, _ = torch.linalg.cholesky_ex(packed)
    w = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    return torch.zeros_like(linear).scatter(1, order, torch.where(here, w, 0.0).nan_to_num())


def _duality_gap(
    z: Float[Tensor, "b d"],
    residual: Float[Tensor, "b d"],
    correlation: Float[Tensor, "b t"],
    w: Float[Tensor, "b k"],
    penalty: float,
) -> Float[Tensor, " b"]:
    """Computes the objective minus a lower bound: the dual objective at the residual, scaled to be feasible.

    Args:
        correlation: inner products of the residual with all atoms.
    """
    scale = (penalty / correlation.amax(1).clamp_min(1e-12)).clamp_max(1)
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
