"""Where a training run's rows come from: a table that is read in random order, or a stream that deals them.

A feed reads each batch once, whatever the number of heads that train on it. Batch ``i`` of epoch ``e`` depends only on the
seed, so a run is resumed from its number of steps (and, of a stream, from where the stream was).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.data.store.pair_runs import PairRuns
from mmhooks.data.windows import Windows
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.heads.training.checkpoint import rows_hash
from mmhooks.heads.training.processes import Processes
from mmhooks.heads.vectors import SITES, Rows, Vectors, check_all_rows, training_rows
from mmhooks.utils.ahead import read_ahead

START = 65_536  # number of rows used for data-dependent initialisation

Batch = Mapping[str, Float[Tensor, "b d"]]
"""Raw rows by site, those of one pair or token in the same place; this process's part of a batch."""


@runtime_checkable
class RowStream(Protocol):
    """What :func:`mmhooks.stream` gives, as far as training goes."""

    sites: Sequence[str]
    fingerprint: str
    state: Any

    @property
    def rows(self) -> int | None: ...

    def batches(self, size: int, **options: Any) -> Iterator[Mapping[str, Any]]: ...


def is_stream(data: Any) -> TypeGuard[RowStream]:
    """Whether rows are computed as they are read, and not stored."""
    return hasattr(data, "batches") and hasattr(data, "fingerprint")


class Feed(ABC):
    """The rows of a run.

    Attributes:
        rows: of an epoch.
        per_epoch: batches of an epoch.
        epochs: None if there are as many as the run asks for.
    """

    rows: int
    per_epoch: int

    @abstractmethod
    def batches(self, epoch: int, begin: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``begin`` on."""

    @abstractmethod
    def table(self, site: str, head: Head) -> Rows:
        """The rows at a site as ``head`` sees them, for what is computed over all of them; of a stream, of its first rows."""

    def tables(self, sites: Sequence[str], head: Head) -> tuple[Rows, Rows | None]:
        """:meth:`table` of one site, or of two."""
        first, *rest = (self.table(site, head) for site in sites)
        return first, rest[0] if rest else None

    @abstractmethod
    def digest(self, site: str) -> str:
        """A hash of everything that decides the rows at a site."""

    @property
    def state(self) -> dict[str, Any] | None:
        """For a checkpoint, what the number of steps does not say."""
        return None

    def restore(self, state: Any) -> None:  # noqa: B027 - a table needs nothing
        """Goes on from a checkpoint's ``state``."""


class TableFeed(Feed):
    """Rows of tensors or a store, shuffled all together, or by ``windows`` as a stream would.

    Raises:
        ShapeMismatch: sites with different numbers of rows, or fewer than two.
    """

    def __init__(
        self,
        rows: Mapping[str, Any],
        size: int,
        seed: int,
        processes: Processes,
        windows: Windows | None = None,
        runs: PairRuns | None = None,
    ) -> None:
        self._rows, self._seed, self._processes = dict(rows), seed, processes
        lengths = {name: len(table) for name, table in self._rows.items()}
        first = next(iter(lengths.values()))
        if len(set(lengths.values())) > 1:
            raise ShapeMismatch(
                f"expected one row per pair in image and text, got {' and '.join(map(str, lengths.values()))} rows"
            )
        if first < 2:
            raise ShapeMismatch(f"expected at least 2 training pairs, got {first}")
        for name, table in self._rows.items():
            if isinstance(table, Tensor):
                self._rows[name] = table.detach().to(processes.device)
        self.rows, self._size = first, min(size, first)
        self.per_epoch = self.rows // self._size
        self._windows, self._runs = windows, runs or PairRuns(torch.arange(first + 1), None)
        self._tables: dict[tuple[str, Head], Vectors] = {}
        self._digests: dict[str, str] = {}  # every row is read for one: once, however many heads train on it

    def batches(self, epoch: int, begin: int) -> Iterator[Batch]:
        found = self._read(epoch, begin)
        in_memory = all(isinstance(table, Tensor) for table in self._rows.values())
        return found if in_memory else read_ahead(found)

    def _read(self, epoch: int, begin: int) -> Iterator[Batch]:
        for rows in islice(self._order(epoch), begin, None):
            mine = self._processes.part_of(rows)
            yield {name: _rows_of(table, mine) for name, table in self._rows.items()}

    def _order(self, epoch: int) -> Iterator[Tensor]:
        if self._windows is not None:
            yield from self._windows.batches(self._runs, self._size, epoch, drop_last=True)
            return
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(self.rows, generator=generator)
        yield from order[: self.per_epoch * self._size].split(self._size)

    def table(self, site: str, head: Head) -> Vectors:
        key = (site, head)
        if key not in self._tables:
            check_all_rows(head, self._rows[site], site)
            self._tables[key] = Vectors(self._rows[site], head, self._processes.device)
        return self._tables[key]

    def digest(self, site: str) -> str:
        if site not in self._digests:
            self._digests[site] = rows_hash(self._rows[site])
        return self._digests[site]


class StreamFeed(Feed):
    """Rows that a stream deals.

    Args:
        steps: of the run, where the stream does not know its length: all of them are one epoch of the run.

    Raises:
        MMHooksError: a stream of unknown length without ``steps``, or one with both.
    """

    def __init__(
        self, stream: RowStream, sites: Sequence[str], size: int, processes: Processes, steps: int | None
    ) -> None:
        self._stream, self._sites, self._size, self._processes = stream, list(sites), size, processes
        if (stream.rows is None) == (steps is None):
            known = "does not know" if steps is None else "knows"
            raise MMHooksError(
                f"the stream {known} how many rows it has: expected {'steps=' if steps is None else 'epochs='}, not "
                f"{'epochs=' if steps is None else 'steps='}"
            )
        self.per_epoch = steps or (stream.rows or 0) // size
        self.rows = stream.rows or self.per_epoch * size
        if self.per_epoch < 1:
            raise MMHooksError(
                f"expected at least one batch of {size} rows in a pass, got {stream.rows} rows"
            )
        self._state = stream.state
        self._sample: dict[str, Tensor] = {}
        self._first: list[
            tuple[Batch, Any]
        ] = []  # batches of the first pass that were dealt before the first step
        self._rest: Iterator[tuple[Batch, Any]] = iter(())
        self._resumed: Any = None

    def batches(self, epoch: int, begin: int) -> Iterator[Batch]:
        state, self._resumed = self._resumed, None
        if (begin > 0) != (state is not None):
            raise MMHooksError(f"a stream goes on from where it was, not from batch {begin}")
        number, epoch = begin, epoch if state is None else state.epoch
        while number < self.per_epoch:
            before = number
            opening = epoch == 0 and state is None and bool(self._first)
            found = chain(self._first, self._rest) if opening else self._pass(epoch, state)
            self._first, self._rest = [], iter(())
            for batch, self._state in found:
                yield batch
                number += 1
                if number == self.per_epoch:
                    return
            if number == before and state is None:
                raise MMHooksError(
                    f"expected batches of {self._size} rows, got a pass with fewer rows in all"
                )
            epoch, state = epoch + 1, None

    def _pass(self, epoch: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        """A pass of the stream, and where the stream is after each batch."""
        options = {"sites": self._sites, "epoch": epoch, "drop_last": True, "state": state}
        for batch in self._stream.batches(self._size, **options):
            yield batch, self._stream.state

    def table(self, site: str, head: Head) -> Float[Tensor, "_ d"]:
        if not self._sample:
            self._rest = self._pass(0, None)
            while len(self._first) * self._size < START and (dealt := next(self._rest, None)) is not None:
                self._first.append(dealt)
            # What is computed from them has to be the same in every process.
            self._sample = {
                name: self._processes.gather(torch.cat([batch[name] for batch, _ in self._first]))
                for name in self._sites
            }
        return head.prepare(self._sample[site].to(self._processes.device, torch.float32))

    def digest(self, site: str) -> str:
        return f"{self._stream.fingerprint} {site}"

    @property
    def state(self) -> dict[str, Any]:
        return self._state.to_json()

    def restore(self, state: Any) -> None:
        self._resumed = type(self._stream.state).from_json(state)


def _rows_of(table: Any, rows: Tensor) -> Tensor:
    return table[rows.to(table.device)] if isinstance(table, Tensor) else table[rows]


def tables_of(
    data: Any, text: Any, sites: Sequence[Sequence[str]]
) -> tuple[dict[str, Any], list[tuple[str, ...]], PairRuns | None]:
    """The tables that heads train on by name, the names of each head's, and which rows are whose, of a store.

    Args:
        data: a tensor, a store, or the folder of one.
        sites: one or two of each head; of tensors, whose names are "image" and "text", they say nothing.

    Raises:
        MMHooksError, ShapeMismatch: as :func:`~mmhooks.heads.vectors.training_rows`.
    """
    if isinstance(data, str | Path):
        from mmhooks.data.store import Store

        data = Store(data)
    if not hasattr(data, "sites"):
        image, text = training_rows(data, text)
        names = ("image",) if text is None else ("image", "text")
        return dict(zip(names, (image, text), strict=False)), [names] * len(sites), None
    tables: dict[str, Any] = {}
    named = []
    for wanted in sites:
        names = names_in(data, wanted)
        tables |= zip(names, training_rows(data, text, wanted), strict=False)
        named.append(names)
    return tables, named, data.pairs if getattr(data, "by_token", False) else None


def names_in(data: Any, sites: Sequence[str]) -> tuple[str, ...]:
    """The sites to train on: of the default ones the second only if it is there."""
    if not 1 <= len(sites) <= 2:
        raise MMHooksError(f"expected one or two sites to train on, got {list(sites)}")
    return (sites[0], *(s for s in sites[1:] if s in data.sites or tuple(sites) != SITES))
