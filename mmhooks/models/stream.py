"""``mm.stream``: activations of a hooked model without a disk, shuffled in a buffer, with a store's interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmhooks.data.loading import BatchPlan, decoding_workers, load_batches, plan_batches
from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.data.store.layout import TORCH, Precision, SiteSpec
from mmhooks.data.store.pair_runs import PairRuns
from mmhooks.data.store.site_rows import Rows
from mmhooks.data.windows import Mixing, Windows, mixing, whole_batches
from mmhooks.errors import MMHooksError, NotFinite, UnknownSite
from mmhooks.hooks.selection import Tokens
from mmhooks.hooks.sites import Pattern
from mmhooks.models.extract_plan import identity
from mmhooks.models.hooked import HookedModel
from mmhooks.models.site_runner import SiteRunner, chosen_places
from mmhooks.utils.digest import digest
from mmhooks.utils.distributed import Ranks

BUFFER = 65_536


@dataclass(frozen=True)
class StreamState:
    """Where a stream is, for :meth:`ActivationStream.batches`: with it, the next batch is the one after the last dealt.

    Attributes:
        epoch: pass over the pairs.
        window: whose batches are being dealt.
        dealt: how many of them were.
        held: rows that the window before held for this one, and those that it had been held itself.
    """

    epoch: int = 0
    window: int = 0
    dealt: int = 0
    held: tuple[int, int] = (0, 0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> StreamState:
        return cls(entry["epoch"], entry["window"], entry["dealt"], tuple(entry["held"]))


def stream(
    model: HookedModel,
    pairs: Pairs | PairStream,
    sites: Pattern | Sequence[Pattern] = ("image.embed", "text.embed"),
    *,
    tokens: Tokens = None,
    buffer: int = BUFFER,
    seed: int = 0,
    dtype: Precision = "fp32",
    batch_size: int = 128,
    workers: int | None = None,
    key: str | None = None,
) -> ActivationStream:
    """Activations of ``model`` on ``pairs``, computed as they are read, with the interface of :class:`~mmhooks.data.Store`.

    Nothing is written: ``batches`` runs the model over a window of pairs, shuffles the rows of the window together, deals
    them, and goes on to the next. :func:`~mmhooks.heads.train_head` trains from it as from a store. The model and its
    heads run in evaluation mode.

    Args:
        model, pairs, sites, tokens, key: as in :func:`mmhooks.extract`.
        buffer: rows that are held and shuffled together, on the model's device. More mix better;
            :meth:`ActivationStream.mixing` says how well.
        seed: of the order.
        dtype: of the rows in the buffer.
        batch_size: pairs of a forward pass.
        workers: processes that decode images; as in :func:`mmhooks.extract`.

    Raises:
        UnknownSite, ShapeMismatch, NoDigest: as :func:`mmhooks.extract`.

    >>> import mmhooks as mm
    >>> model, drawings = mm.load("mini"), mm.data.pairs("mini", limit=64)      # doctest: +SKIP
    >>> acts = mm.stream(model, drawings, "image.blocks.4.resid_post", tokens="patch")  # doctest: +SKIP
    >>> next(acts.batches(1024))["image.blocks.4.resid_post"].shape             # doctest: +SKIP
    torch.Size([1024, 192])
    """
    if buffer < 1:
        raise MMHooksError(f"buffer: expected at least 1 row, got {buffer}")
    reader = SiteRunner(model, chosen_places(model, sites), pairs, sparse=False, tokens=tokens)
    specs = reader.specs(dtype)
    windows = Windows(-(-buffer // reader.tokens_a_pair), seed, in_order=isinstance(pairs, PairStream))
    about = identity(reader, specs, pairs, batch_size=batch_size, key=key)
    return ActivationStream(reader, pairs, specs, windows, batch_size, workers, about)


class ActivationStream:
    """What :func:`stream` gives.

    Attributes:
        sites: names, in the order in which they were requested.
        windows: how rows are shuffled.
        state: where the last batch was dealt; :meth:`batches` goes on from a state.
        fingerprint: a digest of everything that determines the rows and their order.
    """

    def __init__(
        self,
        reader: SiteRunner,
        pairs: Pairs | PairStream,
        specs: Sequence[SiteSpec],
        windows: Windows,
        batch_size: int,
        workers: int | None,
        about: Mapping[str, Any],
    ) -> None:
        self._reader, self._pairs, self._specs = reader, pairs, {spec.name: spec for spec in specs}
        self.windows, self._batch_size, self._ranks = windows, batch_size, Ranks()
        self._workers = decoding_workers(workers, pairs, self._ranks.world)
        self.sites = list(self._specs)
        self.state = StreamState()
        self.fingerprint = digest([about, asdict(windows)], what="stream")
        if reader.tokens is not None and reader.tokens.is_ragged and self._ranks.world > 1:
            raise MMHooksError(
                f"stream: expected tokens of which every pair has as many, on {self._ranks.world} processes, got "
                f"{reader.tokens.tokens!r}: the processes would deal different numbers of batches"
            )

    @property
    def by_token(self) -> bool:
        """Whether a row is a token of a pair."""
        return self._reader.tokens is not None

    def __contains__(self, site: object) -> bool:
        return site in self._specs

    def __len__(self) -> int:
        """Rows of a pass over all pairs.

        Raises:
            MMHooksError: it is not known, as pairs are streamed too, or hold different numbers of tokens.
        """
        rows = self.rows
        if rows is None:
            raise MMHooksError(
                f"{self!r}: the number of rows of a pass is not known before it ends; train for a number of steps="
            )
        return rows

    @property
    def rows(self) -> int | None:
        """Rows of a pass over all pairs; None: not known beforehand."""
        ragged = self._reader.tokens is not None and self._reader.tokens.is_ragged
        if ragged or not isinstance(self._pairs, Pairs):
            return None
        return len(self._pairs) // self._ranks.world * self._ranks.world * self._reader.tokens_a_pair

    def __repr__(self) -> str:
        return f"ActivationStream({self._pairs.name!r}, sites: {', '.join(self.sites)})"

    def width(self, site: str) -> int:
        """Length of the vectors at a site."""
        return self._spec(site).shape[-1]

    def mixing(self, size: int) -> Mixing:
        """How well the buffer mixes: pairs in a batch of ``size`` rows, against rows shuffled all together.

        Raises:
            MMHooksError: as :meth:`__len__`.
        """
        count = len(self) // self._reader.tokens_a_pair
        starts = torch.arange(count + 1) * self._reader.tokens_a_pair
        return mixing(self.windows, PairRuns(starts, None), size)

    def batches(
        self,
        size: int = 4096,
        *,
        sites: str | Sequence[str] | None = None,
        epoch: int = 0,
        drop_last: bool = False,
        state: StreamState | None = None,
    ) -> Iterator[dict[str, Rows]]:
        """``{site: rows}`` in batches of ``size``, over one pass of the pairs.

        Under several processes each deals its own part of every batch, ``size`` divided by their number; pairs left over by
        that number, fewer than it, are left out of the pass.

        Args:
            sites: all by default; the model runs for all of them.
            epoch: of the order.
            drop_last: leave out the last batch if it is smaller.
            state: go on where a pass stopped. The rows of its window, and those held for it, are computed again; every
                batch is bit-identical to that of the uninterrupted pass.

        Raises:
            UnknownSite: a site that is not streamed.
            NotFinite: a pair whose activations are NaN or infinite, by its id.
            MMHooksError: windows smaller than a batch.
        """
        names = self.sites if sites is None else [sites] if isinstance(sites, str) else list(sites)
        for name in names:
            self._spec(name)
        if size < 1 or size % self._ranks.world:
            raise MMHooksError(
                f"size: expected a positive multiple of {self._ranks.world} processes, got {size}"
            )
        size //= self._ranks.world
        begin = state or StreamState(epoch)
        first = max(0, begin.window - 1)  # the window whose rows are held for the one that is gone on with
        held: dict[str, Tensor] = {}
        before = begin.held[1]
        for window, table, last in self._windows(begin.epoch, first, held):
            count, rows = _length(held), _length(table)
            # Rows that the first window computed was held itself were dealt already and are not in its table.
            incoming = before if window == first < begin.window else count
            dealt = self.windows.deal(begin.epoch, window, incoming, rows - count, size, last=last)
            if window >= begin.window:
                for i, chosen in enumerate(whole_batches(dealt.order, size, drop_last=drop_last)):
                    if window > begin.window or i >= begin.dealt:
                        self.state = StreamState(begin.epoch, window, i + 1, (incoming, before))
                        yield {name: _rows_of(table[name], chosen) for name in names}
            kept = dealt.held - (incoming - count)
            held.clear()
            held.update({name: _rows_of(value, kept) for name, value in table.items()})
            before = incoming

    def _spec(self, site: str) -> SiteSpec:
        if site not in self._specs:
            raise UnknownSite(site, self.sites, where="this stream")
        return self._specs[site]

    def _windows(
        self, epoch: int, first: int, held: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, dict[str, Tensor], bool]]:
        """Each window's number, its rows behind the held ones, and whether it is the last."""
        decoder, device = self._reader.decoder(self._pairs), self._reader.model.device
        plans = self._plans(epoch, first)
        batches = load_batches(decoder, plans, workers=self._workers, pin=device.type == "cuda")
        table = _Table(list(self._specs.values()), device)
        batch = next(batches, None)
        while batch is not None:
            window, last = batch.shard, False
            table.begin(held)
            with (
                self._reader as reader
            ):  # closed before anything is dealt: its modes and contexts are not the caller's
                while batch is not None and not last:
                    table.add(batch.ids, *reader.columns(batch))
                    last, batch = batch.last, next(batches, None)
            yield window, table.end(), batch is None

    def _plans(self, epoch: int, first: int) -> Iterator[BatchPlan]:
        rank, world, size = self._ranks.rank, self._ranks.world, self.windows.pairs
        if not isinstance(self._pairs, Pairs):
            done = [rank + i * world for i in range(first)]
            found = plan_batches(
                self._pairs, batch_size=self._batch_size, shard_rows=size, rank=rank, world=world, done=done
            )
            yield from (plan._replace(shard=(plan.shard - rank) // world) for plan in found)
            return
        count = len(self._pairs) // world * world
        mine = self.windows.pair_order(count, epoch)[rank::world].split(size)
        for window in range(first, len(mine)):
            parts = mine[window].split(self._batch_size)
            for i, rows in enumerate(parts):
                yield BatchPlan(window, i == len(parts) - 1, rows.tolist())


class _Table:
    """The rows of one window, in memory that is used again for the next."""

    def __init__(self, specs: Sequence[SiteSpec], device: torch.device) -> None:
        self._specs, self._device = specs, device
        self._room: dict[str, Tensor] = {}
        self._pairs: list[tuple[str, int]] = []  # ids, and how many rows each has
        self._filled = self._held = 0

    def begin(self, held: Mapping[str, Tensor]) -> None:
        """Starts a window with the rows that were held for it."""
        self._filled, self._pairs = 0, []
        if held:
            self._append(held)
        self._held = self._filled

    def add(self, ids: Sequence[str], columns: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        if ids:
            self._append(columns)
            self._pairs.extend(zip(ids, counts, strict=True))

    def end(self) -> dict[str, Tensor]:
        """The window's rows, held ones first.

        Raises:
            NotFinite: a pair whose activations are NaN or infinite, or do not fit the dtype.
        """
        table = {name: room[: self._filled] for name, room in self._room.items()}
        for name, rows in table.items():
            if not bool(torch.isfinite(rows).all()):
                bad = int((~torch.isfinite(rows).flatten(1).all(1)).nonzero()[0]) - self._held
                ends = torch.tensor([count for _, count in self._pairs]).cumsum(0)
                pair = self._pairs[int(torch.searchsorted(ends, bad, right=True))][0]
                raise NotFinite(
                    f"{name}: expected finite numbers, got NaN or infinity, first of pair {pair!r}: check its image and text, "
                    "or leave it out; values that do not fit fp16 need fp32 or bf16"
                )
        return table

    def _append(self, columns: Mapping[str, Tensor]) -> None:
        end = self._filled + _length(columns)
        for spec in self._specs:
            value, room = columns[spec.name], self._room.get(spec.name)
            if room is None or len(room) < end:
                size = max(end, 2 * len(room if room is not None else ()))
                grown = torch.empty(size, *spec.shape, dtype=TORCH[spec.dtype], device=self._device)
                if room is not None:
                    grown[: self._filled].copy_(room[: self._filled])
                room = self._room[spec.name] = grown
            room[self._filled : end].copy_(value)
        self._filled = end


def _length(table: Mapping[str, Tensor]) -> int:
    return len(next(iter(table.values()))) if table else 0


def _rows_of(table: Tensor, rows: Int[Tensor, " b"]) -> Tensor:
    return table.index_select(0, rows.to(table.device))
