"""Synthetic pairs of any number that take no memory: every row follows from its own number.

Sparse latents of K of n features with distinct indices and skewed densities, the same concept often in both
sides; embeddings of unit scale. Rows are sums and products of entries of small tables whose lengths share no
divisor, so that rows are different and any of them is made in constant time.
"""

from __future__ import annotations

import torch

from mmhooks.data.sparse_rows import SparseRows
from mmhooks.heads import TopKSAE

FEATURES, K, D = 1024, 32, 256
PERIODS = (4001, 4003, 4007)


class _Rows:
    def __init__(self, n: int, width: int, seed: int) -> None:
        self.n, self.shape = n, (n, width)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, which: slice | torch.Tensor):
        rows = torch.arange(*which.indices(self.n)) if isinstance(which, slice) else which
        return self.make(rows)

    def make(self, rows: torch.Tensor):
        raise NotImplementedError


class Vectors(_Rows):
    """``[n, D]``: the sum of three table rows, with the offset of a modality."""

    is_sparse = False

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(n, D, seed)
        self.tables = [torch.randn(p, D, generator=self.generator) for p in PERIODS]
        self.tables[0] += torch.randn(D, generator=self.generator)

    def make(self, rows: torch.Tensor) -> torch.Tensor:
        return sum(table[rows % len(table)] for table in self.tables)


class Latents(_Rows):
    """K active of FEATURES: one of each run of 32 features, the first ones of a run far more often."""

    is_sparse = True

    def __init__(self, n: int, seed: int, shared: int = 7) -> None:
        super().__init__(n, FEATURES, seed)
        # The choice of feature is drawn from a table that both sides share: pairs have concepts in common.
        common = torch.Generator().manual_seed(shared)
        self.common = torch.randint(1024, (PERIODS[0], K), generator=common)
        self.own = torch.randint(300, (PERIODS[1], K), generator=self.generator)
        self.skew = (torch.linspace(0, 1, 1025)[:-1].square() * (FEATURES // K)).long()
        self.values = [torch.rand(p, K, generator=self.generator) + 0.05 for p in PERIODS[1:]]
        self.scale = torch.rand(FEATURES, generator=self.generator) + 0.1
        self.runs = torch.arange(K) * (FEATURES // K)

    def make(self, rows: torch.Tensor) -> SparseRows:
        choice = (self.common[rows % PERIODS[0]] + self.own[rows % PERIODS[1]]) % 1024
        indices = self.skew[choice] + self.runs
        values = self.values[0][rows % PERIODS[1]] * self.values[1][rows % PERIODS[2]]
        return SparseRows(values * self.scale[indices], indices, FEATURES)


class SyntheticStore:
    """Reads like :class:`mmhooks.data.Store`; both sides' latents and embeddings."""

    manifest = {"data": {"fingerprint": "synthetic"}}  # noqa: RUF012

    def __init__(self, n: int) -> None:
        self.rows = {
            "image.embed": Vectors(n, 0),
            "text.embed": Vectors(n, 1),
            "image.embed.sae.latents": Latents(n, 2),
            "text.embed.sae.latents": Latents(n, 3),
        }
        self.sites, self.n = list(self.rows), n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, site: str) -> _Rows:
        return self.rows[site]


def head() -> TopKSAE:
    """Whose latents these are said to be: its decoder gives bridges their cosines."""
    return TopKSAE(D, FEATURES, K, seed=0)


LATENTS = {"image": "image.embed.sae.latents", "text": "text.embed.sae.latents"}
