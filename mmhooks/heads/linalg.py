"""Linear algebra for initialising and constraining heads: centres, variances, unit rows, least-squares maps.

Keeping rows on the unit sphere takes two passes per optimiser step, done in place and in cache. On whole matrices each
pass would create temporaries of the matrix's size, and fresh memory costs a page fault every 4 KiB: at n = 16,384 and
d = 512 that was a quarter of a training step. A block of rows at a time fits the cache and reuses small allocations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.heads.vectors import Rows


def geometric_median(x: Float[Tensor, "n d"], *, steps: int = 100, tol: float = 1e-6) -> Float[Tensor, " d"]:
    """The point that minimises the sum of distances to the rows of ``x`` (Weiszfeld's iteration).

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


def to_unit(w: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to unit norm; a row of zeros stays zero. Differentiable; :func:`to_unit_` works in place."""
    return w / w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)


def total_variance(x: Rows) -> float:
    """Mean squared distance of the rows to their mean: the denominator of FVU, per row."""
    centre = mean_row(x)
    sums = ((chunk.double() - centre).square().sum() for chunk in x.split(16384))
    return float(sum(sums, torch.zeros((), dtype=torch.float64))) / len(x)


def mean_row(x: Rows) -> Float[Tensor, " d"]:
    """The mean of the rows, in double precision."""
    sums = (chunk.double().sum(dim=0) for chunk in x.split(16384))
    return sum(sums, torch.zeros((), dtype=torch.float64)) / len(x)


def ridge_map(
    pairs: Iterable[tuple[Tensor, Tensor]], ridge: float
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
    """Weight and bias of the least-squares map ``f -> x``, from batches ``(f [b n], x [b d])``, in one pass.

    ``ridge`` is a fraction of the mean variance of the columns of ``f``; the bias is not penalised. Sums are
    accumulated in double precision.

    >>> f = torch.tensor([[0.0], [1.0], [2.0]])
    >>> weight, bias = ridge_map([(f, 3 * f + 1)], ridge=0.0)
    >>> weight.round(decimals=4).tolist(), bias.round(decimals=4).tolist()
    ([[3.0]], [1.0])
    """
    rows, gram, cross, f_sum, x_sum = 0, 0.0, 0.0, 0.0, 0.0
    for f, x in pairs:
        f, x = f.double(), x.double()
        rows += len(f)
        gram, cross = gram + f.T @ f, cross + f.T @ x
        f_sum, x_sum = f_sum + f.sum(dim=0), x_sum + x.sum(dim=0)
    assert isinstance(gram, Tensor) and isinstance(f_sum, Tensor) and isinstance(x_sum, Tensor)
    gram = gram - torch.outer(f_sum, f_sum) / rows
    cross = cross - torch.outer(f_sum, x_sum) / rows
    # A constant column has a zero row in the Gram matrix: this floor keeps it solvable, with map 0.
    floor = gram.diagonal().mean() * max(ridge, 1e-12) + torch.finfo(torch.float64).tiny
    gram.diagonal().add_(floor)
    weight = torch.linalg.solve(gram, cross)
    bias = (x_sum - f_sum @ weight) / rows
    return weight.float(), bias.float()


@torch.no_grad()
def effective_rank(f: Float[Tensor, "rows n"]) -> float:
    """exp of the entropy of the normalised singular values of the centred rows (Roy & Vetterli 2007).

    >>> round(effective_rank(torch.eye(5) - 0.2), 3)
    4.0
    """
    s = torch.linalg.svdvals(f.double() - f.double().mean(dim=0))
    if float(s.sum()) == 0:
        return 0.0
    p = s / s.sum()
    return float(torch.exp(-torch.xlogy(p, p).sum()))


_BLOCK_NUMEL = 1 << 17  # numbers in a block on a CPU: half a megabyte


@torch.no_grad()
def project_out_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> None:
    """Removes from ``gradient`` its component along each row, so that a step moves unit rows along the sphere.

    >>> g, w = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    >>> project_out_(g, w); g
    tensor([[3., 0.]])
    """
    for g, w in zip(_blocks(gradient), _blocks(rows), strict=True):
        square = torch.linalg.vector_norm(w, dim=1).square()
        along = torch.linalg.vecdot(g, w) / square.clamp_min(1e-30)
        g.addcmul_(w, along[:, None], value=-1)


@torch.no_grad()
def to_unit_(rows: Float[Tensor, "n d"]) -> None:
    """Gives each row unit norm; a row of zeros stays zero.

    >>> w = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    >>> to_unit_(w); w
    tensor([[0., 1.],
            [0., 0.]])
    """
    for w in _blocks(rows):
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny))


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    matrix = matrix.detach()
    whole = matrix.device.type != "cpu"
    yield from (matrix,) if whole else matrix.split(max(1, _BLOCK_NUMEL // max(1, matrix.shape[1])))
