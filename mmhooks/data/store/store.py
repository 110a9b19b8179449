"""Store: the activations written by ``mm.extract``, opened for reading without loading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int, Shaped
from torch import Tensor

from mmhooks.data.sparse_rows import SparseRows
from mmhooks.data.store import order
from mmhooks.data.store.buffers import Buffers
from mmhooks.data.store.ids import ChosenIds, Ids, StoredIds
from mmhooks.data.store.layout import columns_in, is_by_token, read_manifest, specs_of
from mmhooks.data.store.pair_runs import PairRuns, one_row_each, pair_runs
from mmhooks.data.store.pooled_rows import Pool, PooledRows
from mmhooks.data.store.shard import Shards
from mmhooks.data.store.site_rows import ChosenRows, HeadRows, Rows, SiteRows, StoredRows, spans
from mmhooks.data.store.token_numbers import ChosenTokens, StoredTokens, TokenNumbers
from mmhooks.errors import DataError, MMHooksError, ShapeMismatch, StoreError, UnknownSite
from mmhooks.utils.indexing import as_places

if TYPE_CHECKING:
    from mmhooks.data.store.check import Fault

LARGE = 4 * 2**30  # bytes of the read sites
Sites = str | Sequence[str] | None


class Store:
    """Activations of ``n`` pairs at named sites, memory-mapped from the folder written by ``mm.extract``.

    A row is a pair: row ``i`` of every site belongs to pair ``i``. In a store by token (``mm.extract(..., tokens=...)``) a
    row is a token, and the rows of a pair follow each other: :attr:`pairs` has their ranges, :attr:`tokens` the number of
    each row's token; :meth:`sequence` and :meth:`grid` read one pair, :meth:`pool` gives one row a pair.

    Opening reads only the manifest; a shard is mapped when its rows are accessed. Then its size, header, ids and sparse
    indices are checked, but not its values: ``verify=True`` reads and checks every byte first.

    Args:
        folder: as written by ``mm.extract``.
        verify: raise unless every byte of every file is as written.

    Attributes:
        sites: names, in the order in which they were requested.
        ids: of each row's pair.
        manifest: model, weights, heads, data, settings, versions and shards, as written.

    Raises:
        StoreError: no store there, an unfinished one, one with missing rows, or an altered manifest. A missing,
            truncated, unreadable or replaced shard raises when it is opened; with ``verify``, any fault does.

    >>> store = Store("runs/acts")                                   # doctest: +SKIP
    >>> store["image.embed"][:2].shape                               # doctest: +SKIP
    torch.Size([2, 256])
    >>> for batch in store.batches(4096, shuffle=True, seed=0, epoch=3):  # doctest: +SKIP
    ...     loss = train_on(batch["image.embed"], batch["text.embed"])
    """

    sites: list[str]
    ids: Ids
    manifest: Mapping[str, Any]

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        place = Path(folder).expanduser()
        manifest = read_manifest(place)
        if not manifest["complete"]:
            raise StoreError(
                f"{place} is unfinished: its extraction is still running or was interrupted. Repeat the mm.extract call "
                "(or `mmhooks extract` command) to resume it; `mmhooks store info` shows its progress"
            )
        if verify:
            _check_all(place)
        specs = specs_of(manifest)
        shards = Shards(place, manifest["shards"], columns_in(manifest))
        if not len(shards):
            raise StoreError(f"{place} contains no rows: every pair of its source was skipped")
        self._fill(
            place,
            {name: StoredRows(spec, shards) for name, spec in specs.items()},
            StoredIds(shards),
            manifest,
            StoredTokens(shards) if is_by_token(manifest) else None,
        )

    def _fill(
        self,
        place: Path | None,
        rows: Mapping[str, SiteRows],
        ids: Ids,
        manifest: Mapping[str, Any],
        tokens: TokenNumbers | None = None,
    ) -> None:
        self.folder, self._rows, self.ids, self.manifest = place, dict(rows), ids, manifest
        self.sites, self._read_tokens, self._pairs = list(rows), tokens, None

    def _view(
        self,
        rows: Mapping[str, SiteRows],
        ids: Ids | None = None,
        manifest: Mapping[str, Any] | None = None,
        tokens: TokenNumbers | None = None,
    ) -> Store:
        """Another store; its rows are this one's unless ``ids`` are given."""
        store = type(self).__new__(type(self))
        tokens = self._read_tokens if ids is None else tokens
        store._fill(None, rows, self.ids if ids is None else ids, manifest or self.manifest, tokens)
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pairs": None}  # it refers to pages mapped in this process

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, site: object) -> bool:
        return site in self._rows

    def __getitem__(self, site: str) -> SiteRows:
        if site not in self._rows:
            raise UnknownSite(site, self.sites, where="this store")
        return self._rows[site]

    def __repr__(self) -> str:
        of = f"{len(self)} tokens of {len(self.pairs)} pairs" if self.by_token else f"{len(self)} pairs"
        return f"Store({str(self.folder or 'view')!r}, {of}, sites: {', '.join(self.sites)})"

    # -- pairs and their tokens ------------------------------------------------------------------------

    @property
    def by_token(self) -> bool:
        """Whether a row is a token of a pair."""
        return self._read_tokens is not None

    @property
    def pairs(self) -> PairRuns:
        """The rows of each pair. Of a view with rows in any order: of each run of rows of one pair."""
        if self._pairs is None:
            ids = self.ids.arrow()
            self._pairs = pair_runs(ids) if self.by_token else one_row_each(ids)
        return self._pairs

    @property
    def tokens(self) -> Int[Tensor, " rows"]:
        """The number of each row's token among those of its pair, from 0."""
        if self._read_tokens is None:
            raise MMHooksError(_BY_PAIR.format("tokens"))
        return self._read_tokens()

    def sequence(self, site: str, pair: int | str) -> Rows:
        """All tokens of a pair, by its number or id, ``[tokens d]``, in order."""
        if not self.by_token:
            raise MMHooksError(_BY_PAIR.format("a sequence"))
        return self[site].span(*self.pairs.span(pair))

    def grid(self, site: str, pair: int | str) -> Shaped[Tensor, "rows columns d"]:
        """The patches of a pair's image at their places, ``[rows columns d]``; sparse features dense.

        Raises:
            MMHooksError: the tokens of this store are not all patches of an image.
            ShapeMismatch: a view that left some of this pair's patches out.
        """
        sides = self.manifest["settings"].get("grid") if self.by_token else None
        if sides is None:
            raise MMHooksError(
                'grid: expected a store of patches, extracted with tokens="patch", got '
                + (f"tokens={self.manifest['settings']['tokens']!r}" if self.by_token else "one row a pair")
            )
        found = self.sequence(site, pair)
        rows = found.dense() if isinstance(found, SparseRows) else found
        if len(rows) != sides[0] * sides[1]:
            raise ShapeMismatch(
                f"grid: expected the {sides[0]} x {sides[1]} patches of pair {pair!r}, got {len(rows)} of them in this view"
            )
        return rows.unflatten(0, tuple(sides))

    def pool(self, how: Pool, sites: Sites = None) -> Store:
        """One row a pair from the tokens: the largest or mean value of each feature, or whether any token has it.

        Computed chunk by chunk when read; measures take the result like any store of pairs, so that an image and a text
        store of one head give its MDS by token: ``mm.mds(images.pool("max").join(texts.pool("max")), image=…, text=…)``.

        Args:
            how: "max", "mean" (an inactive feature counts as 0), or "any" (1 where a token's value is not 0, else 0).

        >>> store.pool("max")["image.blocks.4.resid_post.sae.latents"].shape  # doctest: +SKIP
        (3953, 1024)
        """
        if not self.by_token:
            raise MMHooksError(_BY_PAIR.format("tokens to pool"))
        rows = {name: PooledRows(base, self.pairs, how) for name, base in self._chosen(sites).items()}
        settings = {k: v for k, v in self.manifest["settings"].items() if k not in ("tokens", "grid")}
        tokens = self.manifest["settings"]["tokens"]
        manifest = {**self.manifest, "settings": settings | {"pooled": {"how": how, "tokens": tokens}}}
        return self._view(rows, ChosenIds(self.ids, self.pairs.starts[:-1]), manifest)

    # -- passes over all rows --------------------------------------------------------------------------

    def chunks(self, size: int = 4096, sites: Sites = None) -> Iterator[tuple[int, dict[str, Rows]]]:
        """``(begin, {site: rows})`` in order, at most ``size`` rows each and never across shards of any site.

        Nothing is copied and memory does not grow with the store; do not write to the tensors.
        """
        chosen = self._chosen(sites)
        cuts = sorted({cut for rows in chosen.values() for cut in rows.cuts})
        for first, last in pairwise(cuts):
            for begin, end in spans([first, last], size):
                yield begin, {name: rows.span(begin, end) for name, rows in chosen.items()}
            for rows in chosen.values():
                rows.release(first, last)

    def batches(
        self,
        size: int = 4096,
        *,
        sites: Sites = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        window: int = order.WINDOW,
    ) -> Iterator[dict[str, Rows]]:
        """``{site: rows}`` in batches of ``size``, copied from the store, so that they may be written to.

        With ``shuffle``, runs of 2,048 adjacent rows come in random order, and rows in random order within windows of at
        least ``window`` rows; a store of fewer rows is shuffled completely. The rows of a batch are random, and those of
        a run are adjacent within it. Everything is determined by ``seed`` and ``epoch``. A larger window mixes better
        and costs more.

        Args:
            sites: all by default.
            drop_last: leave out the last batch if it is smaller.

        Raises:
            UnknownSite: a site that is not stored.
        """
        chosen = self._chosen(sites)
        if size < 1 or window < 1:
            raise MMHooksError(f"size and window must be at least 1, got {size} and {window}")
        empty = Buffers(keep=4 * len(chosen)).empty
        if not shuffle:
            for begin in range(0, len(self), size):
                end = min(begin + size, len(self))
                if end - begin == size or not drop_last:
                    yield {name: rows.read(begin, end, empty) for name, rows in chosen.items()}
            return
        rng = order.generator(seed, epoch)
        cuts = max((rows.cuts for rows in chosen.values()), key=len)
        plan = order.windows(cuts, window, rng)
        # Pages of a store that easily fits into memory are kept from epoch to epoch.
        large = sum(rows.nbytes for rows in chosen.values()) > LARGE
        current = -1
        for number, index, counts in order.batches(plan, size, rng, drop_last=drop_last):
            if large and number != current:
                for rows in chosen.values():
                    for run in plan[current] if current >= 0 else ():
                        rows.release(*run)
                    for run in plan[number]:
                        rows.prefetch(*run)
                current = number
            yield {
                name: rows.take(index, empty, counts if rows.cuts is cuts else None)
                for name, rows in chosen.items()
            }

    def _chosen(self, sites: Sites) -> dict[str, SiteRows]:
        names = self.sites if sites is None else [sites] if isinstance(sites, str) else list(sites)
        return {name: self[name] for name in names}

    # -- other stores from this one --------------------------------------------------------------------

    def select(self, ids: Any) -> Store:
        """The pairs with these ids, in their order, as a store; nothing is copied. By token: all tokens of each.

        Raises:
            DataError: an unknown id (the message counts them and names the first), or something other than a list of
                ids: numbers and masks are for :meth:`rows`.
        """
        where = str(self.folder or "this store")
        if not self.by_token:
            return self.rows(self.ids.rows_of(ids, where=where))
        first = self.ids.rows_of(ids, where=where)
        return self.rows(self.pairs.rows_of(self.pairs.pair_of(first)))

    def rows(self, index: Any) -> Store:
        """These rows, in that order, as a store; nothing is copied.

        Args:
            index: row numbers, negative ones from the end, or a bool mask of all rows.

        Raises:
            DataError: no row, a row that does not exist, or neither whole numbers nor a mask.
        """
        unit = "tokens" if self.by_token else "pairs"
        what = f"rows of a store of {len(self)} {unit}: at least one of 0..{len(self) - 1}"
        try:
            if isinstance(index, slice):
                index = range(*index.indices(len(self)))
            chosen = as_places(index, len(self), what)
        except ShapeMismatch as fault:
            raise DataError(str(fault)) from None
        if not len(chosen):
            raise DataError(f"{what}, got none")
        rows = {name: ChosenRows(base, chosen) for name, base in self._rows.items()}
        tokens = None if self._read_tokens is None else ChosenTokens(self._read_tokens, chosen)
        return self._view(rows, ChosenIds(self.ids, chosen), tokens=tokens)

    def join(self, other: Store, *, partial: bool = False) -> Store:
        """Joins the sites of both stores by pair id, in the order of this one; by token, stores of the same rows.

        Args:
            partial: leave out pairs that only one of them has, instead of raising.

        Raises:
            DataError: pairs that only one store has, no common pair, a site that both have, or different tokens.
        """
        shared = [site for site in self.sites if site in other]
        if shared:
            raise DataError(f"both stores have {', '.join(shared)}: join stores of different sites")
        if self.by_token or other.by_token:
            same = self.by_token and other.by_token and self.ids == other.ids
            if not same or not bool((self.tokens == other.tokens).all()):
                raise DataError(
                    f"expected stores of the same rows, as one of them is by token, got {self!r} and {other!r}; pool those "
                    "by token first: store.pool('max')"
                )
        if self.ids == other.ids:
            ours = theirs = None
        else:
            if not partial and len(self) != len(other):
                raise DataError(
                    f"expected stores of the same pairs, got {len(self)} and {len(other)} pairs; partial=True keeps those "
                    "that both have"
                )
            ours = self.ids.rows_of(other.ids, where="the first store", partial=partial).sort().values
            if len(ours) == 0:
                raise DataError(
                    f"expected common pairs, got none of {len(other)} ids among the {len(self)} of the first store"
                )
            theirs = other.ids.rows_of(ChosenIds(self.ids, ours), where="the second store")
        mine = self if ours is None else self.rows(ours)
        yours = other if theirs is None else other.rows(theirs)
        joined = {**self.manifest, "sites": {**self.manifest["sites"], **other.manifest["sites"]}}
        return mine._view(
            {**mine._rows, **yours._rows}, manifest=joined | {"joined": [self.manifest, other.manifest]}
        )

    def apply(
        self, head: Any, at: Sites = ("image.embed", "text.embed"), *, name: str | None = None
    ) -> Store:
        """This store with the latents ``<site>.<head>.latents`` of a head, computed when read.

        The encoder does not run again. Latents are :class:`SparseRows` if the head returns its few active entries.

        Raises:
            UnknownSite: a site that is not stored.
            ShapeMismatch: a site of another width than the head's.
        """
        added = {f"{site}.{name or head.name}.latents": base for site, base in self._chosen(at).items()}
        rows = self._rows | {latents: HeadRows(base, head, latents) for latents, base in added.items()}
        return self._view(rows)

    # -- the folder ------------------------------------------------------------------------------------

    def verify(self, *, progress: bool = False) -> list[Fault]:
        """Every fault of the files (missing, truncated, altered, surplus) and duplicate ids. Reads all bytes."""
        from mmhooks.data.store.check import verify

        if self.folder is None:
            raise MMHooksError("a view of stores has no files: verify the stores it was created from")
        return verify(self.folder, progress=progress)

    @property
    def info(self) -> dict[str, Any]:
        """A summary of the contents: pairs, shards, bytes, sites, model, data, settings, versions."""
        from mmhooks.data.store.check import summary

        if self.folder is None:
            raise MMHooksError("a view of stores has no files: use info of the stores it was created from")
        return summary(self.folder)


_BY_PAIR = "expected a store by token, extracted with tokens=..., for {}, got one whose rows are pairs"


def _check_all(place: Path) -> None:
    from mmhooks.data.store.check import verify

    faults = verify(place)
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise StoreError(
            f"{place} is damaged: {faults[0]}{more}; copy the named files again, or extract again into another folder"
        )
