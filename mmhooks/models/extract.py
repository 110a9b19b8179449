"""``mm.extract``: runs a hooked model over pairs and writes its activations to a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image
from torch import Tensor, nn

from mmhooks.data.loading import Batch, Decoder, load_batches, plan_batches
from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.data.store import Store
from mmhooks.data.store.background import Background
from mmhooks.data.store.layout import Precision, SiteSpec, columns_of
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.site_rows import sparse_entries
from mmhooks.data.store.writer import ShardWriter, begin, finish, finished
from mmhooks.data.tensor_pairs import TensorPairs
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.dispatch import current
from mmhooks.hooks.places import Place
from mmhooks.hooks.sites import Pattern
from mmhooks.hooks.splice import HeadSite
from mmhooks.models.hooked import HookedModel
from mmhooks.models.pair_inputs import preprocess_for, required_part
from mmhooks.models.provenance import attachment_digest, describe_transform, edits_of, versions, weights_hash
from mmhooks.utils.digest import digest
from mmhooks.utils.distributed import Ranks
from mmhooks.utils.files import make_folder
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import rate_bar

SHARD_ROWS, SHARD_BYTES = 8192, 256 * 2**20


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
    key: str | None = None,
    progress: bool = True,
) -> Store:
    """Runs ``model`` over ``pairs`` and writes the activations at ``sites`` to the store ``out``, one row per pair.

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
        key: a name for exactly this preprocessing, tokenizer, model and these open edits. Needed if a part of
            them has no hashable content; it stands for that part.

    Raises:
        UnknownSite: a site that the model does not have.
        NoDigest: a part of what determines the rows has no hashable content, and there is no ``key``.
        StoreError: ``out`` is being written by another process, or holds a store of another model, data set or
            setting; the disk is full. Finished shards are kept in any case.
        NotFinite: a pair whose activations are NaN or infinite, by its id.
        ShapeMismatch: rows of another shape than those before, or of numbers that are not floating-point.
        DataError: a pair that cannot be used (``on_error="raise"``), by its id.

    >>> import mmhooks as mm
    >>> model = mm.load("mini")                                             # doctest: +SKIP
    >>> model.attach(mm.load_head("mini/sae"), at=["image.embed", "text.embed"])  # doctest: +SKIP
    >>> store = mm.extract(model, mm.data.pairs("mini"), ["*.embed", "*.sae.latents"], out="runs/acts")  # doctest: +SKIP
    """
    folder = Path(out).expanduser()
    places = _places(model, sites)
    reader = _SiteRunner(model, places, pairs, sparse=sparse)
    ranks = Ranks()
    with ExitStack() as held:
        plan = _plan(
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
            _write(reader, pairs, folder, plan, ranks, _workers(workers, pairs, ranks), progress)
            ranks.barrier()
            ranks.first(lambda: finish(folder, ranks=ranks.world))
        held.close()
        ranks.barrier()
    return Store(folder)


def _write(
    reader: _SiteRunner,
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
    decoder = Decoder(pairs, reader.preprocess, reader.tokenizer)
    batches = load_batches(decoder, work, workers=workers, pin=device.type == "cuda")
    first = next(batches, None)  # workers are forked before there is a thread
    writer = ShardWriter(folder, rank=ranks.rank)
    whole = {shard for shard in done if shard % ranks.world == ranks.rank}

    def keep(item: _Computed) -> None:
        if item.ready is not None:
            item.ready.synchronize()
        writer.add(item.ids, item.columns, item.skipped)
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


# -- running the model ---------------------------------------------------------------------------------------


class _Computed(NamedTuple):
    """The results of one batch for the writer; ``last``: the shard that it completes."""

    ids: list[str]
    columns: dict[str, Shaped[Tensor, "..."]]
    skipped: dict[str, str]
    last: int | None
    ready: Any  # a CUDA event after which the copies are there


class _SiteRunner:
    """Runs the towers that the sites need, under one open context; a context manager."""

    def __init__(
        self, model: HookedModel, places: Sequence[Place], pairs: Pairs | PairStream, *, sparse: bool
    ) -> None:
        self.model, self.places = model, places
        known, towers = model.places.sites.towers, {place.site.tower for place in places}
        if not towers <= known:  # a native path does not name its tower
            towers = known
        self.medium = getattr(getattr(model, "family", None), "medium", "image")
        self.preprocess = preprocess_for(model, self.medium, pairs) if self.medium in towers else None
        self._blank = pairs.image(0) if isinstance(pairs, TensorPairs) else Image.new("RGB", (64, 64))
        self.tokenizer = required_part(model, "tokenizer", "text") if "text" in towers else None
        self._sparse = sparse
        self._held = ExitStack()

    def __enter__(self) -> _SiteRunner:
        heads = (a.head for a in self.model.places.attachments.values())
        modules = [m for m in (self.model.model, *heads) if isinstance(m, nn.Module)]
        self._held.enter_context(evaluating(*modules))
        self._held.enter_context(torch.no_grad())
        names = [place.name for place in self.places]
        self._cache = self._held.enter_context(self.model.caching(names, strict=False))
        return self

    def __exit__(self, *fault: Any) -> None:
        self._held.__exit__(*fault)

    def run(
        self, images: Float[Tensor, "b ..."] | None, texts: Int[Tensor, "b2 l"] | None
    ) -> dict[str, Tensor]:
        """What flows at every site."""
        given = {self.medium: images, "text": texts}
        inputs = {k: self.model.to_input(v) for k, v in given.items() if v is not None}
        if self.medium == "image":
            self.model.forward(**{f"{k}s": v for k, v in inputs.items()})
        else:
            for tower, value in inputs.items():
                getattr(self.model, f"encode_{tower}")(value)
        return {place.name: _vectors_last(place, self._cache[place.name]) for place in self.places}

    def specs(self, dtype: Precision) -> list[SiteSpec]:
        """Shapes of the sites, from a run over one blank pair.

        Raises:
            ShapeMismatch: a site whose rows are not one a pair, or not floating-point.
            UnknownSite: a site that did not fire.
        """
        images = None if self.preprocess is None else self.preprocess(self._blank)[None]
        texts = None if self.tokenizer is None else self.tokenizer(["a"])
        specs = []
        with self:
            values = self.run(images, texts)
        for place in self.places:
            value = values[place.name]
            if value.dim() < 2 or len(value) != 1 or not value.is_floating_point():
                raise ShapeMismatch(
                    f"site {place.name!r} gave {tuple(value.shape)} of {value.dtype} for one pair; a store keeps sites "
                    "with floating-point rows, one a pair"
                )
            shape = tuple(value.shape[1:])
            head = place.attachment.head if isinstance(place, HeadSite) else None
            latents = self._sparse and isinstance(place, HeadSite) and place.leaf == "latents"
            specs.append(
                SiteSpec(
                    place.name,
                    shape,
                    dtype,
                    sparse_entries(head, shape) if latents else None,
                    head.id if head else "",
                    positions=place.site.is_map,
                )
            )
        self._specs = specs
        return specs

    def __call__(self, batch: Batch) -> _Computed:
        columns: dict[str, Tensor] = {}
        if batch.ids:
            values = self.run(batch.images, batch.texts)
            for spec in self._specs:
                names = [column.name for column in spec.columns()]
                kept = [values[spec.name]] if spec.sparse is None else _active(values[spec.name], spec)
                columns |= zip(names, kept, strict=True)
        ready = None
        if self.model.device.type == "cuda":
            columns = {name: _to_host(value) for name, value in columns.items()}
            ready = torch.cuda.Event()
            ready.record()
        return _Computed(batch.ids, columns, batch.skipped, batch.shard if batch.last else None, ready)


def _vectors_last(place: Place, value: Tensor) -> Tensor:
    """A feature map in stored layout, with channels last; a head's outputs already are."""
    return value if isinstance(place, HeadSite) else place.vectors_last(value)


def _active(latents: Float[Tensor, "b n"], spec: SiteSpec) -> list[Tensor]:
    """Values, largest first, and indices of a row's active entries; padded with entries of value 0."""
    k = int(spec.sparse or 0)
    most = int(latents.count_nonzero(dim=1).max())
    if most > k:
        raise ShapeMismatch(
            f"{spec.name}: a row has {most} active entries, its head promises {k}: edits that are open add some; "
            "extract with sparse=False"
        )
    indices = latents.abs().topk(k, dim=1).indices
    return [latents.gather(1, indices), indices]


def _to_host(value: Tensor) -> Tensor:
    kept = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    return kept.copy_(value, non_blocking=True)


def _places(model: HookedModel, sites: Pattern | Sequence[Pattern]) -> list[Place]:
    patterns = [sites] if isinstance(sites, str) or callable(sites) else list(sites)
    found = {place.name: place for pattern in patterns for place in model.places.find(pattern)}
    if not found:
        raise MMHooksError("no site to extract: name at least one, e.g. sites=['image.embed', 'text.embed']")
    return list(found.values())


# -- what will be written ------------------------------------------------------------------------------------


def _plan(
    reader: _SiteRunner,
    pairs: Pairs | PairStream,
    *,
    dtype: Precision,
    batch_size: int,
    shard_rows: int | None,
    world: int,
    key: str | None,
) -> dict[str, Any]:
    """The plan of what will be written; extractions with equal plans write equal stores."""
    if dtype not in ("fp32", "fp16", "bf16"):
        raise MMHooksError(f'dtype: expected "fp32", "fp16" or "bf16", got {dtype!r}')
    if batch_size < 1 or (shard_rows is not None and shard_rows < 1):
        raise MMHooksError(f"batch_size and shard_rows must be at least 1, got {batch_size} and {shard_rows}")
    model, specs = reader.model, reader.specs(dtype)
    row = sum(column.row_bytes for column in columns_of(specs))
    most = max(1, min(SHARD_ROWS, SHARD_BYTES // row) // batch_size) * batch_size
    stream = isinstance(pairs, PairStream)
    autocast = getattr(model, "autocast", None)
    edits = edits_of(model.model, current().contexts)
    return {
        "model": {
            "name": model.name or type(model.model).__name__,
            "class": type(model.model).__name__,
            "weights": weights_hash(model.model, key=key),
            "dtype": str(model.dtype).removeprefix("torch."),
            **({"autocast": str(autocast).removeprefix("torch.")} if autocast is not None else {}),
            **({"edits": [edit.label for edit in edits]} if edits else {}),
        },
        "sites": {spec.name: spec.to_json() for spec in specs},
        "data": {
            "name": pairs.name,
            "fingerprint": pairs.fingerprint,
            "pairs": None if stream else len(pairs),
            "licence": pairs.licence,
            "attribution": pairs.attribution,
        },
        "settings": {
            "batch_size": batch_size,
            "shard_rows": shard_rows or most,
            "preprocess": describe_transform(reader.preprocess),
            "tokenizer": describe_transform(reader.tokenizer),
            # Rows of a stream lie differently for another number of processes.
            **({"ranks": world} if stream else {}),
        },
        # What the names above cannot tell apart, by content.
        "content": {
            "preprocess": digest(reader.preprocess, what="preprocess", key=key),
            "tokenizer": digest(reader.tokenizer, what="tokenizer", key=key),
            "heads": {
                place.name: attachment_digest(place.attachment, key=key)
                for place in reader.places
                if isinstance(place, HeadSite)
            },
            "edits": [edit.digest(key=key) for edit in edits],
        },
    }


def _workers(asked: int | None, pairs: Pairs | PairStream, ranks: Ranks) -> int:
    if asked is not None:
        if asked < 0:
            raise MMHooksError(f"workers must be at least 0, got {asked}")
        return asked
    if isinstance(pairs, Pairs) and len(pairs) < 1000:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    return max(0, min(8, cores // local - 1))
