"""Matryoshka SAEs: one dictionary, trained on several nested reconstructions.

Nested over *features* (Bussmann et al. 2025): the first ``m`` features must reconstruct by themselves, for several
``m``, so that broad features come first and are not absorbed by narrow ones. Nested over *K* (MSAE, Zaigrajew
et al. 2025): the ``k`` strongest features of a row must reconstruct, for several ``k``. At inference both are TopK SAEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import ShapeMismatch
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.base import TrainingPass, firing_at
from mmhooks.heads.sae.topk import TopKSAE


class MatryoshkaSAE(TopKSAE):
    """A TopK SAE whose training pass returns one reconstruction per level, coarsest first.

    The objective averages the levels' losses with equal weights.

    Args:
        widths: nested over features: how many of the first features each level may use, increasing to
            ``n_features``. By default n/16, n/8, n/4, n/2 and n.
        ks: nested over K instead: how many of the row's strongest features each level may use, increasing to ``k``.

    >>> sae = MatryoshkaSAE(8, 32, k=4, widths=(8, 32))
    >>> x = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    >>> coarse, whole = sae.training_pass(x).recons
    >>> torch.allclose(whole, sae(x), atol=1e-6)
    True
    >>> len(MatryoshkaSAE(8, 32, k=4, ks=(1, 2, 4)).training_pass(x).recons)
    3
    """

    kind = "matryoshka"

    def __init__(
        self,
        d_in: int,
        n_features: int,
        k: int = 32,
        *,
        widths: Sequence[int] | None = None,
        ks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, n_features, k, **kwargs)
        if widths is not None and ks is not None:
            raise ShapeMismatch(
                "expected levels nested over features (widths=) or over K (ks=), not both, got "
                f"{list(widths)} and {list(ks)}"
            )
        if ks is not None:
            self.widths, self.ks = None, _check_rising(ks, k, "ks", "k")
        else:
            halves = sorted({n_features >> i for i in range(5)} - {0})
            self.widths, self.ks = _check_rising(widths or halves, n_features, "widths", "n_features"), None

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "widths": self.widths and list(self.widths),
            "ks": self.ks and list(self.ks),
        }

    @property
    def levels(self) -> tuple[int, ...]:
        """The widths, or the Ks."""
        return self.widths or self.ks or ()

    def first_level(self, values: Float[Tensor, "b k"], indices: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """The coarsest level that may use each selected feature; all finer levels use it too."""
        order = indices
        if self.ks is not None:  # the rank of each value in its row
            order = values.detach().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        edges = torch.tensor(self.levels[:-1], device=order.device)
        return torch.bucketize(order.contiguous(), edges, right=True)

    def training_pass(self, x: Float[Tensor, "b d"]) -> TrainingPass:
        """Each level adds its own features' contribution to the previous level's: nothing is decoded twice."""
        small = sparse.sparse_is_faster(self.k * len(self.levels), self.n_features, x.device)
        if small:
            values, selection = sparse.encode(x - self.b_pre, self.W_enc, self.b_enc, self.k)
            indices = selection.indices
        else:
            selection = None
            values, indices = self.select(self.pre(x))
        first = self.first_level(values, indices)
        parts = [values * (first == level) for level in range(len(self.levels))]
        if selection is not None:
            written = [sparse.decode(part, selection, self.W_dec) for part in parts]
        else:
            written = [self._dense(part, indices, level) for level, part in enumerate(parts)]
        recons = [total + self.b_pre for total in accumulate(written)]
        return TrainingPass(recons, *firing_at(values, indices, self.n_features))

    def _dense(
        self, part: Float[Tensor, "b k"], indices: Int[Tensor, "b k"], level: int
    ) -> Float[Tensor, "b d"]:
        f = part.new_zeros(len(part), self.n_features).scatter(1, indices, part)
        if self.widths is None:
            return f @ self.W_dec
        own = slice(self.widths[level - 1] if level else 0, self.widths[level])
        return f[:, own] @ self.W_dec[own]


def _check_rising(levels: Sequence[int], last: int, what: str, of: str) -> tuple[int, ...]:
    levels = tuple(int(v) for v in levels)
    if not levels or levels[0] < 1 or levels[-1] != last or any(a >= b for a, b in pairwise(levels)):
        raise ShapeMismatch(f"{what} must increase from at least 1 to {of} = {last}, got {list(levels)}")
    return levels
