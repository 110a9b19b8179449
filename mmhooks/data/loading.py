"""Loads pairs as batches of pixels and tokens, decoded in worker processes, shard by shard.

A shard of a store is a fixed range of source rows (of a rank's rows, if a stream is split), and batches do not cross
its end. So the content of a shard does not depend on anything that happened before it.
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
from mmhooks.data.pair_stream import PairStream, RawRow
from mmhooks.errors import DataError, MMHooksError

RowRef = int | RawRow  # a row number of a Pairs, or a row of a stream


class BatchPlan(NamedTuple):
    """The rows of one batch, the shard they belong to, and whether they are its last."""

    shard: int
    last: bool
    rows: list[RowRef]


class Batch(NamedTuple):
    """Decoded rows; ``images`` or ``texts`` is None if it was not requested, both if every row was skipped."""

    shard: int
    last: bool
    ids: list[str]
    images: Float[Tensor, "b ..."] | None
    texts: Int[Tensor, "b l"] | None
    skipped: dict[str, str]


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
    """Turns a :class:`BatchPlan` into a :class:`Batch`; runs in the workers."""

    def __init__(
        self,
        source: Pairs | PairStream,
        preprocess: Callable[[Any], Tensor] | None,
        tokenizer: Callable[[list[str]], Tensor] | None,
    ) -> None:
        if tokenizer is not None and not source.has_texts:
            raise DataError(
                f"{source.name}: expected pairs with texts for sites of the text tower, got images without; extract sites "
                "of the image tower only, or give captions to them"
            )
        self._pairs = source if isinstance(source, Pairs) else None
        self._name, self._on_error = source.name, getattr(source, "on_error", "raise")
        self._preprocess, self._tokenizer = preprocess, tokenizer

    def __getitem__(self, plan: BatchPlan) -> Batch | MMHooksError:
        try:
            return self._decode(plan)
        except MMHooksError as fault:  # a DataLoader would wrap it into the traceback of its worker
            return fault

    def _decode(self, plan: BatchPlan) -> Batch:
        ids: list[str] = []
        texts: list[str] = []
        pixels: list[Tensor] = []
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
                image = None if self._preprocess is None else self._pairs.image(row)  # opened only if needed
            ids.append(key)
            texts.append(text)
            if self._preprocess is not None:
                pixels.append(self._preprocess(image))
        return Batch(
            plan.shard,
            plan.last,
            ids,
            torch.stack(pixels) if pixels else None,
            self._tokenizer(texts) if self._tokenizer is not None and texts else None,
            skipped,
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


class _PlanSampler:
    """A batch sampler that yields each plan as the only index of a batch."""

    def __init__(self, plans: Iterable[BatchPlan]) -> None:
        self._plans = plans

    def __iter__(self) -> Iterator[list[BatchPlan]]:
        return ([plan] for plan in self._plans)


def _unwrap(batch: list[Any]) -> Any:
    return batch[0]
