"""Crosscoders: one set of features for several sites, layers or towers at once (Lindsey et al. 2024).

``f = topk(ReLU(sum_s (x_s - b_s) W_enc,s^T + b_enc))`` and ``x_s' = f W_dec,s + b_s`` for every site ``s``. With the sites'
vectors one behind another this is a TopK SAE on rows of width ``sum_s d_s``, which is how it is stored, trained and read.
Spliced in by :mod:`mmhooks.hooks.across_sites`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.errors import ShapeMismatch
from mmhooks.heads.sae.topk import TopKSAE


class JoinedRows:
    """Rows of several stored sites as rows of a crosscoder, fetched on access: nothing is copied as a whole.

    >>> rows = JoinedRows([torch.zeros(3, 2), torch.ones(3, 1)])
    >>> rows.shape, rows[1:2]
    ((3, 3), tensor([[0., 0., 1.]]))
    """

    def __init__(self, tables: Sequence[Any]) -> None:
        lengths = [len(table) for table in tables]
        if not lengths or len(set(lengths)) > 1:
            raise ShapeMismatch(f"expected tables with as many rows each, got {lengths}")
        self.tables = list(tables)
        self.shape = (lengths[0], sum(table.shape[-1] for table in tables))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return torch.cat([table[which].float() for table in self.tables], dim=-1)


class Crosscoder(TopKSAE):
    """A TopK SAE on the joined vectors of several sites.

    It takes vectors as the sites carry them. Training brings every site to one scale, so that none counts more because its
    numbers are larger; rows of the decoder have unit norm there, so features are chosen by what they write.

    Args:
        d_in: the sum of the widths. widths: of the sites, in the order in which it is attached.

    Attributes:
        scale: of each site, in whose units :meth:`shares` compares them; set in training.

    >>> head = Crosscoder(20, 64, k=4, widths=(8, 12))
    >>> rows = head.join([torch.randn(5, 8), torch.randn(5, 12)])
    >>> first, second = head.split(head(rows))
    >>> first.shape, second.shape, head.shares().sum(1).allclose(torch.ones(64))
    (torch.Size([5, 8]), torch.Size([5, 12]), True)
    """

    kind = "crosscoder"
    scale: Tensor

    def __init__(
        self,
        d_in: int,
        n_features: int,
        k: int = 32,
        *,
        widths: Sequence[int],
        name: str | None = "crosscoder",
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, n_features, k, name=name, normalize_input=False, seed=seed)
        self.widths = tuple(int(width) for width in widths)
        if len(self.widths) < 2 or min(self.widths) < 1 or sum(self.widths) != d_in:
            raise ShapeMismatch(
                f"expected the widths of two or more sites that add up to d_in = {d_in}, got {list(self.widths)}"
            )
        self.register_buffer("scale", torch.ones(len(self.widths)))

    def config(self) -> dict[str, Any]:
        shape = {"d_in": self.d_in, "n_features": self.n_features, "k": self.k}
        return shape | {"widths": list(self.widths)}

    def join(self, parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "*b d"]:
        """The vectors of all sites, in their order, one behind another.

        Raises:
            ShapeMismatch: another number of sites, other widths, or unequal numbers of vectors.
        """
        shapes = [tuple(part.shape) for part in parts]
        if [shape[-1] for shape in shapes] != list(self.widths) or len({shape[:-1] for shape in shapes}) != 1:
            raise ShapeMismatch(
                f"head {self.name!r}: expected as many vectors at each of {len(self.widths)} sites of widths "
                f"{list(self.widths)}, got shapes {shapes}"
            )
        return torch.cat([part.to(self.W_dec.dtype) for part in parts], dim=-1)

    def split(self, x: Float[Tensor, "*b d"]) -> tuple[Tensor, ...]:
        """The vectors of each site; the inverse of :meth:`join`."""
        return x.split(self.widths, dim=-1)

    @torch.no_grad()
    def shares(self) -> Float[Tensor, "n s"]:
        """Each feature's share of decoder norm by site, in units of the sites' scales; rows sum to 1.

        For the embeddings of two towers this is what a feature *writes* into images and texts, where the modality score
        (``mm.mds``) is when it is *active*: a feature of share (1, 0) may still be read off both. Compare it with the score
        of :meth:`alone`, whose features are read off one tower.
        """
        norms = [part.norm(dim=1) for part in self.split(self.W_dec / self.columns)]
        table = torch.stack(norms, dim=1)
        return table / table.sum(dim=1, keepdim=True).clamp_min(1e-30)

    @property
    def columns(self) -> Float[Tensor, " d"]:
        """The scale of each column of joined vectors."""
        return torch.cat([s.expand(width) for s, width in zip(self.scale, self.widths, strict=True)])

    @torch.no_grad()
    def alone(self, site: int) -> TopKSAE:
        """The SAE that this is at one of its sites while the others carry their centre ``b_s``.

        >>> head = Crosscoder(20, 64, k=4, widths=(8, 12))
        >>> x, centre = torch.randn(5, 8), head.split(head.b_pre)[1].expand(5, 12)
        >>> torch.allclose(head.alone(0).encode(x), head.encode(head.join([x, centre])))
        True
        """
        head = TopKSAE(
            self.widths[site], self.n_features, self.k, name=f"{self.name}{site}", normalize_input=False
        )
        head.W_enc.copy_(self.split(self.W_enc)[site])
        head.W_dec.copy_(self.split(self.W_dec)[site])
        head.b_pre.copy_(self.split(self.b_pre)[site])
        head.b_enc.copy_(self.b_enc)
        return head.to(self.W_dec.device)

    @torch.no_grad()
    def rescale_(self, columns: Float[Tensor, " d"]) -> None:
        """Rewrites the head, which took vectors ``x``, as the one that takes ``x * columns``."""
        self.W_enc.div_(columns)
        self.W_dec.mul_(columns)
        self.b_pre.mul_(columns)
