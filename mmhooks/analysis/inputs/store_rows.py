"""Reads an activation store in order: latents of one side, vectors of the same rows, and each process's batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.checks import check_numbers, check_shapes
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
    """Rows of pairs by site, as :class:`mmhooks.data.Store` keeps them; any object with these methods will do."""

    @property
    def sites(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, site: str) -> Any: ...


def check_store(given: Any) -> None:
    """Raises ShapeMismatch unless ``given`` is a store; called for anything that is not a tensor or sparse rows."""
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
        rows = self.rows[which]
        if self.head is None:
            return rows
        device = next((p.device for p in self.head.parameters()), torch.device("cpu"))
        x = self.head.prepare(rows.to(device).float())
        if hasattr(self.head, "encode_topk"):
            values, indices = self.head.encode_topk(x)  # type: ignore[operator]
            return SparseRows(values.cpu(), indices.cpu(), self.n_features)
        return self.head.encode(x).cpu()

    def release(self, begin: int, end: int) -> None:
        """Says that these rows were read, so that a store may release their memory pages."""
        if hasattr(self.rows, "release"):
            self.rows.release(begin, end)


def latent_rows(
    store: ActivationStore, side: Side, head: Head | str | None = None, site: str | None = None
) -> LatentRows:
    """Returns the latents of ``side``: those of ``head`` on ``site`` (default ``<side>.embed``), or stored ones.

    Without a head, ``site`` is by default the one stored site ``<side>.….latents``; with one, a ``site`` of
    that kind must hold this head's latents, which are read as they are.

    Raises:
        UnknownSite: the site is not in the store.
        ShapeMismatch: the site does not hold one vector per row, or not of the head's width.
        WrongHead: the stored latents are of another head.
        MMHooksError: there are several sites of latents to choose from, the head is given by name, or rows are tokens.
    """
    if getattr(store, "by_token", False):
        raise MMHooksError(
            f"expected a store whose rows are pairs, as measures compare the sides of pairs, got {store!r}: pool its tokens "
            'first, store.pool("max")'
        )
    if isinstance(head, str) and head:
        raise MMHooksError(
            f"head=: expected a head over a store, got the name {head!r}; load it: mm.load_head({head!r})"
        )
    if isinstance(head, Head):
        site = site or f"{side}.embed"
        rows = site_rows(store, site)
        if site.endswith(".latents"):
            return _stored_latents(rows, site, head)
        if rows.is_sparse or rows.shape[1] != head.d_in:
            kind = "sparse latents" if rows.is_sparse else "vectors"
            raise ShapeMismatch(
                f"site {site!r}: expected vectors of width {head.d_in}, as head {head.name!r} reads, got {kind} of "
                f"width {rows.shape[1]}: give the site where the head was trained"
            )
        return LatentRows(rows, head, head.n_features, site)
    if site is None:
        found = [s for s in store.sites if s.startswith(f"{side}.") and s.endswith(".latents")]
        if not found:
            raise UnknownSite(f"{side}.….latents", store.sites, where="this store (or give head=)")
        if len(found) > 1:
            raise MMHooksError(
                f"expected one site of {side} latents, got {', '.join(found)}: choose one, {side}=SITE"
            )
        site = str(found[0])
    rows = site_rows(store, site)
    return LatentRows(rows, None, rows.shape[1], site)


@dataclass(frozen=True)
class PairedLatents:
    """The latents of both sides of the same pairs, given as tables or read from a store a slice at a time.

    Attributes:
        reads: what of them is read from a store, for :func:`row_batches`. head, data: their names, as results keep them.
    """

    images: Any
    texts: Any
    n_features: int
    reads: Sequence[LatentRows]
    head: str
    data: str

    def __len__(self) -> int:
        return len(self.images)


def paired_latents(
    image_latents: Latents | ActivationStore,
    text_latents: Latents | None,
    *,
    head: Head | str | None = None,
    data: str = "",
    image: str | None = None,
    text: str | None = None,
) -> PairedLatents:
    """Returns both sides of the same pairs: two tables as they are, or those of ``head`` over a store.

    Raises:
        ShapeMismatch: only one table, tables of two shapes, or neither a table nor a store; else as :func:`latent_rows`.
    """
    name = head.id if isinstance(head, Head) else head or ""
    images: Any = image_latents
    texts: Any = text_latents
    reads: list[LatentRows] = []
    if not isinstance(image_latents, (Tensor, SparseRows)):
        check_store(image_latents)
        images = latent_rows(image_latents, "image", head, image)
        texts = latent_rows(image_latents, "text", head, text)
        reads, data = [images, texts], data or data_id(image_latents)
        name = name or images.site
    else:
        if text_latents is None:
            raise ShapeMismatch(
                "expected image and text latents, got only image latents: give both sides, or a store"
            )
        for side, given in (("image", image_latents), ("text", text_latents)):
            if not isinstance(given, SparseRows):
                check_numbers(given, f"{side} latents")
        check_shapes(tuple(image_latents.shape), tuple(text_latents.shape))
    n_features = images.n_features if reads else images.shape[1]
    return PairedLatents(images, texts, n_features, reads, name, data)


def _stored_latents(rows: Any, site: str, head: Head) -> LatentRows:
    written = getattr(getattr(rows, "spec", None), "head", "")
    if rows.shape[1] != head.n_features or written not in ("", head.id):
        raise WrongHead(
            f"site {site!r}: expected latents of head {head.id} with {head.n_features} features, got those of "
            f"{written or 'a head'} with {rows.shape[1]}"
        )
    return LatentRows(rows, None, head.n_features, site)


def site_rows(store: ActivationStore, site: str) -> Any:
    """Returns the rows of ``site``, one vector each.

    Raises:
        UnknownSite: the site is not in the store. ShapeMismatch: it holds more than one vector per row.
    """
    if site not in store.sites:
        raise UnknownSite(site, store.sites, where="this store")
    rows = store[site]
    if len(rows.shape) != 2:
        raise ShapeMismatch(
            f"site {site!r}: expected one vector per row, got rows of shape {tuple(rows.shape[1:])}; extract a "
            "pooled site, or one token"
        )
    return rows


@dataclass(frozen=True)
class VectorRows:
    """Vectors of the samples of a store: one of its sites, or a tensor with one row per sample."""

    rows: Any
    width: int
    name: str

    def __getitem__(self, which: slice | Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        return self.rows[which].float()

    def release(self, begin: int, end: int) -> None:
        """Says that these rows were read, so that a store may release their memory pages."""
        if hasattr(self.rows, "release"):
            self.rows.release(begin, end)


def vector_rows(store: ActivationStore, which: str | Float[Tensor, "n d"]) -> VectorRows:
    """Returns the vectors of site ``which``, or wraps ``which`` itself.

    Raises:
        UnknownSite: there is no such site. ShapeMismatch: not one dense vector per row of the store.
    """
    if isinstance(which, str):
        rows, name = site_rows(store, which), which
        if rows.is_sparse:
            raise ShapeMismatch(f"site {which!r}: expected dense vectors as embeddings, got sparse latents")
    else:
        rows, name = which, "given vectors"
        if len(rows) != len(store):
            raise ShapeMismatch(
                f"expected one vector per pair of the store, got {len(rows)} for {len(store)} pairs"
            )
    return VectorRows(rows, rows.shape[1], name)


def row_batches(
    n: int,
    size: int,
    what: str = "",
    *,
    reads: Sequence[LatentRows | VectorRows] = (),
    progress: bool = False,
) -> Iterator[tuple[int, int, int]]:
    """Yields this process's batches of ``n`` rows as (number of the batch, first row, end).

    Batches are assigned to processes in turn, so that the batches are the same for any number of processes. When
    the next batch is requested, the memory pages of the last one are released for everything in ``reads``.
    """
    if size < 1:
        raise ShapeMismatch(f"batch: expected at least one row, got {size}")
    rank, world = rank_and_world()
    mine = range(rank, -(-n // size), world)
    for number in track(mine, len(mine), what, show=progress and rank == 0):
        begin, end = number * size, min(n, (number + 1) * size)
        yield number, begin, end
        for rows in reads:
            rows.release(begin, end)


def batch_size(n: int, groups: int = 20) -> int:
    """Chooses a batch size: at most BATCH rows, and small enough that each of ``groups`` groups gets a batch."""
    return max(1, min(BATCH, -(-n // groups)))


def data_id(store: ActivationStore) -> str:
    """Reads the data's fingerprint from the store's manifest; empty if it has none."""
    manifest: Any = getattr(store, "manifest", None) or {}
    data: Any = manifest.get("data", "") if hasattr(manifest, "get") else ""
    return str(data.get("fingerprint", "") if hasattr(data, "get") else data)
