"""Rows that stay on the unit sphere: the two passes an optimiser step needs, in place and in cache.

Written with whole matrices, each pass makes temporaries of the matrix's size, and fresh memory costs a page
fault every 4 KiB: at n = 16,384 and d = 512 that was a quarter of a training step. A block of rows at a time
fits the cache, and nothing is allocated that the allocator would not have at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_AT_ONCE = 1 << 17  # numbers in a block on a CPU: half a megabyte


@torch.no_grad()
def project_out_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> None:
    """Takes the part along each row off ``gradient``: what is left moves unit rows over the sphere, not off it.

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
    yield from (matrix,) if whole else matrix.split(max(1, _AT_ONCE // max(1, matrix.shape[1])))
