"""Loads pairs as batches of pixels and tokens, decoded in worker processes, shard by shard.

A shard of a store is a fixed range of source rows (of a rank's rows, if a stream is split), and batches do not cross
its end. So the content of a shard does not depend on anything that happened before it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream, RawRow
from mmhooks.errors import DataError, MMHooksError

RowRef = int | RawRow  # a row number of a Pairs, or a row of a stream


class BatchPlan(NamedTuple):
    """The rows of one batch, the shard they belong to, and whether they are its last."""

    shard: int
    last: bool
    rows: list[RowRef]


class Batch(NamedTuple):
    """Decoded rows; ``images`` or ``texts`` is None if it was not requested, both if every row was skipped.

    ``inputs``: what :class:`Decoder` 's ``together`` made of images and texts.
    """

    shard: int
    last: bool
    ids: list[str]
    images: Float[Tensor, "b ..."] | None
    texts: Int[Tensor, "b l"] | None
    skipped: dict[str, str]
    inputs: dict[str, Tensor] = {}  # noqa: RUF012 - never written to


def plan_batches(
    source: Pairs | PairStream,
    *,
    batch_size: int,
    shard_rows: int,
    rank: int = 0,
    world: int = 1,
    done: Collection[int] = (),
) -> Iterator[BatchPlan]:
    """The batches of a rank: shards ``rank``, ``rank + world``, ... except those that are done.

    Rows of a map-style source are in the same shards for any ``world``; in a stream, the shards of all ranks alternate.
    """
    if isinstance(source, Pairs):
        for shard in range(rank, -(-len(source) // shard_rows), world):
            if shard not in done:
                rows = range(shard * shard_rows, min((shard + 1) * shard_rows, len(source)))
                yield from _split_into_batches(shard, rows, batch_size)
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
            yield from _split_into_batches(shard, block, batch_size)


def _split_into_batches(shard: int, rows: Iterable[RowRef], size: int) -> Iterator[BatchPlan]:
    """Batches of a shard; each is held back until it is known whether it is the last."""
    left = iter(rows)
    held = list(itertools.islice(left, size))
    while held:
        following = list(itertools.islice(left, size))
        yield BatchPlan(shard, not following, held)
        held = following


class Decoder:
    """Turns a :class:`BatchPlan` into a :class:`Batch`; runs in the workers.

    Args:
        preprocess, tokenizer: of images one by one and of the texts of a batch; None: not needed.
        together: instead of both, where one processor reads the images and texts of a batch.
    """

    def __init__(
        self,
        source: Pairs | PairStream,
        preprocess: Callable[[Any], Tensor] | None,
        tokenizer: Callable[[list[str]], Tensor] | None,
        together: Callable[[list[Any], list[str]], dict[str, Tensor]] | None = None,
    ) -> None:
        self._pairs = source if isinstance(source, Pairs) else None
        self._name, self._on_error = source.name, getattr(source, "on_error", "raise")
        self._preprocess, self._tokenizer, self._together = preprocess, tokenizer, together

    def __getitem__(self, plan: BatchPlan) -> Batch | MMHooksError:
        try:
            return self._decode(plan)
        except MMHooksError as fault:  # a DataLoader would wrap it into the traceback of its worker
            return fault

    def _decode(self, plan: BatchPlan) -> Batch:
        ids: list[str] = []
        texts: list[str] = []
        pixels: list[Tensor] = []
        images: list[Any] = []
        opens = self._preprocess is not None or self._together is not None
        skipped: dict[str, str] = {}
        for row in plan.rows:
            if isinstance(row, RawRow):
                pair = row.decoded()
                if isinstance(pair, str):
                    if self._on_error == "raise":
                        raise DataError(
                            f'{self._name}, {row.id}: {pair}; on_error="skip" leaves such rows out'
                        )
                    skipped[row.id] = pair
                    continue
                key, text, image = pair.id, pair.text, pair.image
            else:
                assert self._pairs is not None
                key, text = self._pairs.ids[row], self._pairs.texts[row] if self._pairs.has_texts else ""
                image = self._pairs.image(row) if opens else None  # opened only if needed
            ids.append(key)
            texts.append(text)
            if self._preprocess is not None:
                pixels.append(self._preprocess(image))
            elif self._together is not None:
                images.append(image)
        return Batch(
            plan.shard,
            plan.last,
            ids,
            torch.stack(pixels) if pixels else None,
            self._tokenizer(texts) if self._tokenizer is not None and texts else None,
            skipped,
            self._together(images, texts) if self._together is not None and texts else {},
        )


def load_batches(decoder: Decoder, plans: Iterable[BatchPlan], *, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches in the order of ``plans``, decoded by ``workers`` processes (0: by this one)."""
    batches = DataLoader(
        decoder,  # type: ignore[arg-type]
        batch_sampler=_PlanSampler(plans),  # type: ignore[arg-type]
        collate_fn=_unwrap,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
    )
    for batch in batches:
        if isinstance(batch, MMHooksError):
            raise batch
        yield batch


def decoding_workers(asked: int | None, pairs: Pairs | PairStream, world: int) -> int:
    """How many processes decode images for each of ``world``: as many as asked for, or by default the spare cores, at most
    8, and none for fewer than 1,000 pairs.

    Raises:
        MMHooksError: a number below 0.
    """
    if asked is not None:
        if asked < 0:
            raise MMHooksError(f"workers must be at least 0, got {asked}")
        return asked
    if isinstance(pairs, Pairs) and len(pairs) < 1000:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return max(0, min(8, cores // local - 1))


class _PlanSampler:
    """A batch sampler that yields each plan as the only index of a batch."""

    def __init__(self, plans: Iterable[BatchPlan]) -> None:
        self._plans = plans

    def __iter__(self) -> Iterator[list[BatchPlan]]:
        return ([plan] for plan in self._plans)


def _unwrap(batch: list[Any]) -> Any:
    return batch[0]
