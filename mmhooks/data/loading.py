"""From pairs to batches of pixels and tokens, decoded in worker processes, shard by shard.

A shard of a store is a fixed run of source rows (of a rank's rows, where a stream is split), and batches do not
cross it. So what a shard holds depends on nothing that happened before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream, Raw
from mmhooks.errors import DataError, MMHooksError

Job = int | Raw


class Work(NamedTuple):
    """Rows that make one batch, the shard they belong to, and whether they are its last."""

    shard: int
    last: bool
    jobs: list[Job]


class Batch(NamedTuple):
    """Decoded rows; ``images`` or ``texts`` is None where it was not asked for, both where every row was skipped."""

    shard: int
    last: bool
    ids: list[str]
    images: Float[Tensor, "b c h w"] | None
    texts: Int[Tensor, "b l"] | None
    skipped: dict[str, str]


def works(
    source: Pairs | PairStream,
    *,
    batch_size: int,
    shard_rows: int,
    rank: int = 0,
    world: int = 1,
    done: Collection[int] = (),
) -> Iterator[Work]:
    """The batches of a rank: shards ``rank``, ``rank + world``, ... but those that are done.

    Rows of a map-style source lie where one process would put them, whatever ``world`` is; of a stream, the
    shards of all ranks take turns.
    """
    if isinstance(source, Pairs):
        for shard in range(rank, -(-len(source) // shard_rows), world):
            if shard not in done:
                rows = range(shard * shard_rows, min((shard + 1) * shard_rows, len(source)))
                yield from _cut(shard, rows, batch_size)
        return
    passed = next(i for i in itertools.count() if rank + i * world not in done)
    rows = source.raw(rank=rank, world=world, skip=passed * shard_rows)
    for number in itertools.count(passed):
        block = itertools.islice(rows, shard_rows)
        first = next(block, None)
        if first is None:
            return
        shard, block = rank + number * world, itertools.chain([first], block)
        if shard in done:
            for _ in block:
                pass
        else:
            yield from _cut(shard, block, batch_size)


def _cut(shard: int, jobs: Iterable[Job], size: int) -> Iterator[Work]:
    """Batches of a shard; one is held back until it is known whether it is the last."""
    left = iter(jobs)
    held = list(itertools.islice(left, size))
    while held:
        following = list(itertools.islice(left, size))
        yield Work(shard, not following, held)
        held = following


class Decoder:
    """Makes a :class:`Batch` of a :class:`Work`; runs in the workers."""

    def __init__(
        self,
        source: Pairs | PairStream,
        preprocess: Callable[[Any], Tensor] | None,
        tokenizer: Callable[[list[str]], Tensor] | None,
    ) -> None:
        self._pairs = source if isinstance(source, Pairs) else None
        self._name, self._on_error = source.name, getattr(source, "on_error", "raise")
        self._preprocess, self._tokenizer = preprocess, tokenizer

    def __getitem__(self, work: Work) -> Batch | MMHooksError:
        try:
            return self._decoded(work)
        except MMHooksError as fault:  # a loader would wrap it into the traceback of its worker
            return fault

    def _decoded(self, work: Work) -> Batch:
        ids: list[str] = []
        texts: list[str] = []
        pixels: list[Tensor] = []
        skipped: dict[str, str] = {}
        for job in work.jobs:
            if isinstance(job, Raw):
                pair = job.decoded()
                if isinstance(pair, str):
                    if self._on_error == "raise":
                        raise DataError(
                            f'{self._name}, {job.id}: {pair}; on_error="skip" leaves such rows out'
                        )
                    skipped[job.id] = pair
                    continue
                key, text, image = pair.id, pair.text, pair.image
            else:
                assert self._pairs is not None
                key, text = self._pairs.ids[job], self._pairs.texts[job]
                image = None if self._preprocess is None else self._pairs.image(job)  # else it is not opened
            ids.append(key)
            texts.append(text)
            if self._preprocess is not None:
                pixels.append(self._preprocess(image))
        return Batch(
            work.shard,
            work.last,
            ids,
            torch.stack(pixels) if pixels else None,
            self._tokenizer(texts) if self._tokenizer is not None and texts else None,
            skipped,
        )


def loader(decoder: Decoder, work: Iterable[Work], *, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches in the order of ``work``, decoded by so many processes (0: by this one)."""
    batches = DataLoader(
        decoder,  # type: ignore[arg-type]
        batch_sampler=_Each(work),  # type: ignore[arg-type]
        collate_fn=_only,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
    )
    for batch in batches:
        if isinstance(batch, MMHooksError):
            raise batch
        yield batch


class _Each:
    """A batch sampler that hands a work on as the one index of its batch."""

    def __init__(self, work: Iterable[Work]) -> None:
        self._work = work

    def __iter__(self) -> Iterator[list[Work]]:
        return ([work] for work in self._work)


def _only(batch: list[Any]) -> Any:
    return batch[0]
