"""The dictionary that heads of several seeds agree on, as the start of a head that other seeds end at too.

One training ends in one of many minima; features of several that point the same way are averaged, and those that hardly
any other training found are left out. Two such dictionaries, of disjoint sets of seeds, are more alike than two trainings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.linalg import to_unit
from mmhooks.heads.sae.base import SAE

ROUNDS = 10


@torch.no_grad()
def consensus(heads: Sequence[SAE], n: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Returns the ``n`` decoder rows that the heads agree on most, as unit vectors, and how well: the mean cosine.

    Every head in turn is the first guess; the rows of all heads are matched to it one to one, averaged (a row counts by
    the square of its cosine), and matched again. The guess with the best agreement is kept.

    Raises:
        MMHooksError: fewer than two heads. ShapeMismatch: they differ in shape, or have fewer than ``n`` features.

    >>> from mmhooks.heads import TopKSAE
    >>> one, other = TopKSAE(8, 4, 2, seed=0), TopKSAE(8, 4, 2, seed=0)
    >>> rows, agreement = consensus([one, other], 3)
    >>> rows.shape, agreement.round().tolist()
    (torch.Size([3, 8]), [1.0, 1.0, 1.0])
    """
    if len(heads) < 2:
        raise MMHooksError(f"consensus: expected at least two heads of other seeds, got {len(heads)}")
    shapes = [tuple(head.W_dec.shape) for head in heads]
    if len(set(shapes)) > 1 or not 1 <= n <= shapes[0][0]:
        raise ShapeMismatch(
            f"consensus: expected heads of equal shape with at least {n} features, at least 1, got shapes {shapes}"
        )
    tables = [to_unit(head.W_dec.detach().cpu()) for head in heads]
    guesses = [_agreed(first, tables) for first in tables]
    rows, agreement = max(guesses, key=lambda guess: float(guess[1].sum()))
    best = agreement.argsort(descending=True)[:n]
    return rows[best], agreement[best]


def _agreed(
    rows: Float[Tensor, "m d"], tables: Sequence[Float[Tensor, "m d"]]
) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    from scipy.optimize import linear_sum_assignment

    agreement = rows.new_zeros(len(rows))
    for _ in range(ROUNDS):
        total, agreement = torch.zeros_like(rows), torch.zeros_like(agreement)
        for table in tables:
            cosine = rows @ table.T
            partner = torch.from_numpy(linear_sum_assignment(cosine.numpy(), maximize=True)[1])
            matched = cosine.gather(1, partner[:, None]).squeeze(1)
            total += table[partner] * matched.clamp_min(0).square()[:, None]
            agreement += matched
        rows = to_unit(total)
    return rows, agreement / len(tables)
