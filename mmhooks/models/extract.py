"""``mm.extract``: runs a hooked model over pairs and writes its activations to a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import disk_usage
from typing import Any

from mmhooks.data.loading import Batch, decoding_workers, load_batches, plan_batches
from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.data.store import Store
from mmhooks.data.store.background import Background
from mmhooks.data.store.layout import Precision
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.writer import ShardWriter, begin, finish, finished
from mmhooks.errors import StoreError
from mmhooks.hooks.selection import Tokens
from mmhooks.hooks.sites import Pattern
from mmhooks.models.extract_plan import expected_bytes, plan_store
from mmhooks.models.hooked import HookedModel
from mmhooks.models.provenance import versions
from mmhooks.models.site_runner import Computed, SiteRunner, chosen_places
from mmhooks.utils.distributed import Ranks
from mmhooks.utils.files import make_folder
from mmhooks.utils.progress import rate_bar


def extract(
    model: HookedModel,
    pairs: Pairs | PairStream,
    sites: Pattern | Sequence[Pattern] = ("image.embed", "text.embed"),
    out: str | Path = "runs/acts",
    *,
    dtype: Precision = "fp32",
    batch_size: int = 128,
    workers: int | None = None,
    shard_rows: int | None = None,
    sparse: bool = True,
    tokens: Tokens = None,
    key: str | None = None,
    progress: bool = True,
) -> Store:
    """Runs ``model`` over ``pairs`` and writes the activations at ``sites`` to the store ``out``, one row per pair or token.

    The model and its heads run in evaluation mode; each module's mode is restored afterwards. Everything that
    determines a row is part of the store's identity, by its content: weights and structure, preprocessing, tokenizer,
    heads and the edits of open contexts.

    Images are decoded in worker processes and shards are written by a thread, so the model waits for neither.
    To resume a killed call, repeat it: it continues after the last finished shard, and the store has the same bytes
    as after an uninterrupted run (on the same device, with the same versions and number of threads). A store that
    is finished is opened and returned. Under ``torchrun`` or ``accelerate launch`` each process takes its
    share; the store of a :class:`~mmhooks.data.Pairs` is the same for any number of them.

    Args:
        model: with ``preprocess`` if sites of the image tower are requested, ``tokenizer`` for the text
            tower's. Open contexts of the model apply: their edits are recorded in the manifest.
        pairs: from :func:`mmhooks.data.pairs` or :func:`mmhooks.data.pair_stream`; of sounds and videos (CLAP, X-CLIP,
            V-JEPA 2, VideoMAE) from :func:`mmhooks.data.from_tensors`, with sites such as ``audio.embed``.
        sites: names, globs or predicates, also of attached heads: ``image.embed.sae.latents``.
        out: a new folder, or one in which the same extraction stopped.
        dtype: "fp32", "fp16" or "bf16" of the stored rows; the model runs in its own.
        batch_size: rows of a forward pass; results can depend on it in the last bit, so it may not change
            within a store.
        workers: processes that decode images; 0: this process. By default the number of spare cores,
            at most 8, and none for fewer than 1,000 pairs.
        shard_rows: rows of a shard, the unit of resuming: by default 8,192, or fewer whole batches where these
            are larger than 256 MiB.
        sparse: keep latents of a head that names its ``k`` active entries as these entries, where ``4 k`` is at
            most the number of features.
        tokens: rows are these tokens of each pair, in order: a kind ("patch", "cls", "register", "text", "eot"; in a
            vision-language model "image", ("image", i), "text", "prompt", "last"), positions, a slice or a mask. The sites of
            a store have the same tokens; :class:`~mmhooks.data.Store` reads one pair's, its grid, or all shuffled. None:
            a row is a pair.
        key: a name for exactly this preprocessing, tokenizer, model and these open edits. Needed if a part of
            them has no hashable content; it stands for that part.

    Raises:
        UnknownSite: a site that the model does not have.
        NoDigest: a part of what determines the rows has no hashable content, and there is no ``key``.
        StoreError: ``out`` is being written by another process, or holds a store of another model, data set or
            setting; the disk is full, or too small for what is known to come. Finished shards are kept in any case.
        NotFinite: a pair whose activations are NaN or infinite, by its id.
        ShapeMismatch: rows of another shape than those before, or of numbers that are not floating-point.
        DataError: a pair that cannot be used (``on_error="raise"``), by its id.

    >>> import mmhooks as mm
    >>> model = mm.load("mini")                                             # doctest: +SKIP
    >>> model.attach(mm.load_head("mini/sae"), at=["image.embed", "text.embed"])  # doctest: +SKIP
    >>> store = mm.extract(model, mm.data.pairs("mini"), ["*.embed", "*.sae.latents"], out="runs/acts")  # doctest: +SKIP
    """
    folder = Path(out).expanduser()
    reader = SiteRunner(model, chosen_places(model, sites), pairs, sparse=sparse, tokens=tokens)
    ranks = Ranks()
    with ExitStack() as held:
        plan = plan_store(
            reader,
            pairs,
            dtype=dtype,
            batch_size=batch_size,
            shard_rows=shard_rows,
            world=ranks.world,
            key=key,
        )

        def opened() -> bool:
            make_folder(folder)
            held.enter_context(Lock(folder))
            return begin(folder, plan, versions())

        if not ranks.first(opened):
            ranks.first(lambda: _check_room(folder, plan, reader, pairs))
            _write(
                reader, pairs, folder, plan, ranks, decoding_workers(workers, pairs, ranks.world), progress
            )
            ranks.barrier()
            ranks.first(lambda: finish(folder, ranks=ranks.world))
        held.close()
        ranks.barrier()
    return Store(folder)


def _write(
    reader: SiteRunner,
    pairs: Pairs | PairStream,
    folder: Path,
    plan: dict[str, Any],
    ranks: Ranks,
    workers: int,
    progress: bool,
) -> None:
    """Writes this rank's shards, except those that an earlier run finished."""
    settings, done = plan["settings"], finished(folder)
    work = plan_batches(
        pairs,
        batch_size=settings["batch_size"],
        shard_rows=settings["shard_rows"],
        rank=ranks.rank,
        world=ranks.world,
        done=done.keys(),
    )
    device = reader.model.device
    batches = load_batches(reader.decoder(pairs), work, workers=workers, pin=device.type == "cuda")
    first = next(batches, None)  # workers are forked before there is a thread
    writer = ShardWriter(folder, rank=ranks.rank)
    whole = {shard for shard in done if shard % ranks.world == ranks.rank}

    def keep(item: Computed) -> None:
        if item.ready is not None:
            item.ready.synchronize()
        writer.add(item.ids, item.columns, item.skipped, item.counts)
        if item.last is not None:
            writer.close(item.last)
            whole.add(item.last)

    total = None
    if isinstance(pairs, Pairs):
        size, shards = (
            settings["shard_rows"],
            range(ranks.rank, -(-len(pairs) // settings["shard_rows"]), ranks.world),
        )
        total = sum(min(size, len(pairs) - s * size) for s in shards if s not in done)
    label = f"extracting {len(plan['sites'])} sites" + (
        f", rank 0 of {ranks.world}" if ranks.world > 1 else ""
    )
    bar = rate_bar(label, total, unit="pairs", show=progress and ranks.rank == 0)
    with bar as advance, Background(keep) as background, reader:
        batch: Batch | None = first
        while batch is not None:
            background.put(reader(batch))
            advance(len(batch.ids) + len(batch.skipped))
            batch = next(batches, None)
    writer.end(ranks.rank, len(whole))


def _check_room(folder: Path, plan: Mapping[str, Any], reader: SiteRunner, pairs: Pairs | PairStream) -> None:
    """Raises StoreError if the disk has no room for the rows that are not written yet."""
    expected = expected_bytes(plan, reader, pairs)
    if expected is None:
        return
    held = sum(entry["bytes"] for entry in finished(folder).values())
    free = disk_usage(folder).free
    if expected - held > free:
        raise StoreError(
            f"{folder}: expected room for {(expected - held) / 2**30:.3g} GiB of rows that are still to be written, got "
            f'{free / 2**30:.3g} GiB free; take fewer sites, pairs or tokens, dtype="fp16", or train from mm.stream, which '
            "writes nothing"
        )
