"""What decides the rows of an extraction, and the plan of the store that they are written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.data.store.layout import Precision, SiteSpec, columns_in, columns_of
from mmhooks.errors import MMHooksError
from mmhooks.hooks.dispatch import current
from mmhooks.hooks.splice import HeadSite
from mmhooks.models.provenance import attachment_digest, describe_transform, edits_of, weights_hash
from mmhooks.models.site_runner import SiteRunner
from mmhooks.utils.digest import digest

SHARD_ROWS, SHARD_BYTES = 8192, 256 * 2**20


def identity(
    reader: SiteRunner,
    specs: Sequence[SiteSpec],
    pairs: Pairs | PairStream,
    *,
    batch_size: int,
    key: str | None,
) -> dict[str, Any]:
    """Everything that decides the rows, by name and by content: equal identities give equal rows.

    Raises:
        NoDigest: a part has no hashable content, and there is no ``key``.
        MMHooksError: no rows in a forward pass.
    """
    if batch_size < 1:
        raise MMHooksError(f"batch_size must be at least 1, got {batch_size}")
    model = reader.model
    autocast = getattr(model, "autocast", None)
    edits = edits_of(model.model, current().contexts)
    processor = getattr(model, "processor", None) if reader.together is not None else None
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
            "pairs": len(pairs) if isinstance(pairs, Pairs) else None,
            "licence": pairs.licence,
            "attribution": pairs.attribution,
        },
        "settings": {
            "batch_size": batch_size,
            "preprocess": describe_transform(reader.preprocess),
            "tokenizer": describe_transform(reader.tokenizer),
            **({"processor": describe_transform(processor)} if processor is not None else {}),
            **({"tokens": reader.tokens.to_json()} if reader.tokens is not None else {}),
            **({"grid": list(reader.grid)} if reader.grid is not None else {}),
        },
        # What the names above cannot tell apart, by content.
        "content": {
            "preprocess": digest(reader.preprocess, what="preprocess", key=key),
            "tokenizer": digest(reader.tokenizer, what="tokenizer", key=key),
            **({"processor": digest(processor, what="processor", key=key)} if processor is not None else {}),
            "heads": {
                place.name: attachment_digest(place.attachment, key=key)
                for place in reader.places
                if isinstance(place, HeadSite)
            },
            "edits": [edit.digest(key=key) for edit in edits],
        },
    }


def plan_store(
    reader: SiteRunner,
    pairs: Pairs | PairStream,
    *,
    dtype: Precision,
    batch_size: int,
    shard_rows: int | None,
    world: int,
    key: str | None,
) -> dict[str, Any]:
    """The plan of what will be written; extractions with equal plans write equal stores.

    Raises:
        MMHooksError: an unknown ``dtype``, or sizes below 1.
        NoDigest: as :func:`identity`.
    """
    if dtype not in ("fp32", "fp16", "bf16"):
        raise MMHooksError(f'dtype: expected "fp32", "fp16" or "bf16", got {dtype!r}')
    if batch_size < 1 or (shard_rows is not None and shard_rows < 1):
        raise MMHooksError(f"batch_size and shard_rows must be at least 1, got {batch_size} and {shard_rows}")
    specs = reader.specs(dtype)
    plan = identity(reader, specs, pairs, batch_size=batch_size, key=key)
    pair_bytes = reader.tokens_a_pair * sum(column.row_bytes for column in columns_of(specs))
    most = max(1, min(SHARD_ROWS, SHARD_BYTES // pair_bytes) // batch_size) * batch_size
    plan["settings"] |= {"shard_rows": shard_rows or most}
    if not isinstance(pairs, Pairs):  # rows of a stream lie differently for another number of processes
        plan["settings"] |= {"ranks": world}
    return plan


def expected_bytes(plan: Mapping[str, Any], reader: SiteRunner, pairs: Pairs | PairStream) -> int | None:
    """Bytes of the values of a whole store.

    None if that is not known before it is written: of a stream of pairs, and of tokens whose number differs between pairs.
    """
    ragged = reader.tokens is not None and reader.tokens.is_ragged
    if ragged or not isinstance(pairs, Pairs):
        return None
    return len(pairs) * reader.tokens_a_pair * sum(column.row_bytes for column in columns_in(plan))
