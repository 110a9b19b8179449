"""Reading an activation store in order: latents of a side, vectors of the same rows, and each process's share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.sparse import Latents
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import MMHooksError, ShapeMismatch, UnknownSite, WrongHead
from mmhooks.heads.base import Head
from mmhooks.utils.distributed import rank_and_world
from mmhooks.utils.progress import track

Side = Literal["image", "text"]
BATCH = 4096


@runtime_checkable
class ActivationStore(Protocol):
    """Rows of pairs by site, as :class:`mmhooks.data.Store` keeps them; anything with these will do."""

    @property
    def sites(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, site: str) -> Any: ...


def check_store(given: Any) -> None:
    """Raises ShapeMismatch for what a measure was given in the place of numbers, unless it is a store."""
    if not isinstance(given, ActivationStore):
        raise ShapeMismatch(
            f"expected a tensor, sparse rows or a store, got a {type(given).__name__}; torch.as_tensor(...) makes a "
            "tensor of an array or a list, mm.Store(path) opens a store"
        )


@dataclass(frozen=True)
class LatentRows:
    """The latents of one side, read or encoded a slice at a time."""

    rows: Any
    head: Head | None
    n_features: int
    site: str

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def __getitem__(self, which: slice | Int[Tensor, " b"]) -> Latents:
        came = self.rows[which]
        if self.head is None:
            return came
        device = next((p.device for p in self.head.parameters()), torch.device("cpu"))
        x = self.head.prepare(came.to(device).float())
        if hasattr(self.head, "encode_topk"):
            values, indices = self.head.encode_topk(x)  # type: ignore[operator]
            return SparseRows(values.cpu(), indices.cpu(), self.n_features)
        return self.head.encode(x).cpu()

    def release(self, begin: int, end: int) -> None:
        """These rows were read: a store may give their pages back."""
        if hasattr(self.rows, "release"):
            self.rows.release(begin, end)


def latent_rows(
    store: ActivationStore, side: Side, head: Head | str | None = None, site: str | None = None
) -> LatentRows:
    """The latents of ``side``: ``head`` over ``site`` (default ``<side>.embed``), or stored ones.

    Without a head, ``site`` is by default the one stored site ``<side>.….latents``; with one, a ``site`` of
    that kind must hold this head's latents, which are read as they are.

    Raises:
        UnknownSite: not in the store. ShapeMismatch: not one vector a row, or not the head's width.
        WrongHead: stored latents of another head.
        MMHooksError: several sites of latents to choose from, or a head given by name.
    """
    if isinstance(head, str) and head:
        raise MMHooksError(f"head={head!r}: over a store give the head itself, e.g. mm.load_head({head!r})")
    if isinstance(head, Head):
        site = site or f"{side}.embed"
        rows = site_rows(store, site)
        if site.endswith(".latents"):
            return _stored_latents(rows, site, head)
        if rows.is_sparse or rows.shape[1] != head.d_in:
            kind = "sparse latents" if rows.is_sparse else "vectors"
            raise ShapeMismatch(
                f"site {site!r} holds {kind} of width {rows.shape[1]}, head {head.name!r} reads vectors of "
                f"{head.d_in}: give the site where it was trained"
            )
        return LatentRows(rows, head, head.n_features, site)
    if site is None:
        found = [s for s in store.sites if s.startswith(f"{side}.") and s.endswith(".latents")]
        if not found:
            raise UnknownSite(f"{side}.….latents", store.sites, where="this store (or give head=)")
        if len(found) > 1:
            raise MMHooksError(f"this store holds latents at {', '.join(found)}: say which, {side}=SITE")
        site = str(found[0])
    rows = site_rows(store, site)
    return LatentRows(rows, None, rows.shape[1], site)


def _stored_latents(rows: Any, site: str, head: Head) -> LatentRows:
    written = getattr(getattr(rows, "spec", None), "head", "")
    if rows.shape[1] != head.n_features or written not in ("", head.id):
        raise WrongHead(
            f"site {site!r} holds latents of {written or 'a head'} with {rows.shape[1]} features, not of head "
            f"{head.id} with {head.n_features}"
        )
    return LatentRows(rows, None, head.n_features, site)


def site_rows(store: ActivationStore, site: str) -> Any:
    """The rows of ``site``, one vector each.

    Raises:
        UnknownSite: not in the store. ShapeMismatch: more than one vector a row.
    """
    if site not in store.sites:
        raise UnknownSite(site, store.sites, where="this store")
    rows = store[site]
    if len(rows.shape) != 2:
        raise ShapeMismatch(
            f"site {site!r} holds {tuple(rows.shape[1:])} numbers a row; a measure needs one vector a row "
            "(extract a pooled site, or one token)"
        )
    return rows


@dataclass(frozen=True)
class VectorRows:
    """Vectors of the samples of a store: a site of it, or a table of one row a sample."""

    rows: Any
    width: int
    name: str

    def __getitem__(self, which: slice | Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.rows[which].float()

    def release(self, begin: int, end: int) -> None:
        """These rows were read: a store may give their pages back."""
        if hasattr(self.rows, "release"):
            self.rows.release(begin, end)


def vector_rows(store: ActivationStore, which: str | Float[Tensor, "n d"]) -> VectorRows:
    """The vectors of site ``which``, or ``which`` itself.

    Raises:
        UnknownSite: no such site. ShapeMismatch: not one dense vector a row of the store.
    """
    if isinstance(which, str):
        rows, name = site_rows(store, which), which
        if rows.is_sparse:
            raise ShapeMismatch(f"site {which!r} holds sparse latents; embeddings are dense vectors")
    else:
        rows, name = which, "given vectors"
        if len(rows) != len(store):
            raise ShapeMismatch(f"{len(rows)} vectors for a store of {len(store)} pairs: one row a pair")
    return VectorRows(rows, rows.shape[1], name)


def share(
    n: int,
    size: int,
    what: str = "",
    *,
    reads: Sequence[LatentRows | VectorRows] = (),
    progress: bool = False,
) -> Iterator[tuple[int, int, int]]:
    """This process's batches of ``n`` rows: number of the batch, first row, end.

    Batches are dealt out in turn, so that any number of processes works on the same ones. When the next batch
    is asked for, the pages of the last one are given back for all that it ``reads``.
    """
    if size < 1:
        raise ShapeMismatch(f"a batch needs at least one row, came {size}")
    rank, world = rank_and_world()
    mine = range(rank, -(-n // size), world)
    for number in track(mine, len(mine), what, show=progress and rank == 0):
        begin, end = number * size, min(n, (number + 1) * size)
        yield number, begin, end
        for rows in reads:
            rows.release(begin, end)


def batch_size(n: int, groups: int = 20) -> int:
    """At most BATCH rows, and so few that ``groups`` groups of batches all get some."""
    return max(1, min(BATCH, -(-n // groups)))


def data_id(store: ActivationStore) -> str:
    """What the store's manifest calls its data; empty where it says nothing."""
    manifest: Any = getattr(store, "manifest", None) or {}
    data: Any = manifest.get("data", "") if hasattr(manifest, "get") else ""
    return str(data.get("fingerprint", "") if hasattr(data, "get") else data)
