"""The files of a store: columns, the manifest, and the two files with which ``datasets`` opens it.

    manifest.json        provenance, sites, shards with their checksums
    data-00000.arrow     one record batch: the column ``id``, in a store by token ``token``, and one or two columns per site
    dataset_info.json    features, for datasets.load_from_disk
    state.json           shards in order, likewise

A dense site is one column of fixed-size lists; a sparse one is two, ``<site>.values`` and ``<site>.indices``.
bf16 has no Arrow type and is stored as uint16 with the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from mmhooks.data.store.schema import check_format, check_manifest
from mmhooks.errors import ShapeMismatch, StoreError

MANIFEST, INFO, STATE = "manifest.json", "dataset_info.json", "state.json"

Precision = Literal["fp32", "fp16", "bf16"]
TORCH: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int16": torch.int16,
    "int32": torch.int32,
}
ARROW = {"fp32": "float32", "fp16": "float16", "bf16": "uint16", "int16": "int16", "int32": "int32"}


@dataclass(frozen=True)
class Column:
    """One column of the shards: name, element type (a key of ``TORCH``), shape of a row, and for indices their upper
    bound (exclusive)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    below: int | None = None

    @property
    def row_bytes(self) -> int:
        return prod(self.shape) * TORCH[self.dtype].itemsize


@dataclass(frozen=True)
class SiteSpec:
    """How a site is stored.

    Attributes:
        shape: of a dense row: ``(d,)``, ``(tokens, d)``, or ``(n_features,)`` for latents.
        dtype: "fp32", "fp16" or "bf16".
        sparse: stored entries per row if only active ones are stored, None for dense.
        head: id of the head that the site belongs to.
        positions: whether a row is a map ``(height, width, d)``, on each vector of which a head can train.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Precision
    sparse: int | None = None
    head: str = ""
    positions: bool = False

    def columns(self) -> list[Column]:
        if self.sparse is None:
            return [Column(self.name, self.dtype, self.shape)]
        small = "int16" if self.shape[0] <= 2**15 else "int32"
        return [
            Column(f"{self.name}.values", self.dtype, (self.sparse,)),
            Column(f"{self.name}.indices", small, (self.sparse,), self.shape[0]),
        ]

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype}
        if self.sparse is not None:
            entry["sparse"] = self.sparse
        return (
            entry
            | ({"head": self.head} if self.head else {})
            | ({"positions": True} if self.positions else {})
        )

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> SiteSpec:
        head, positions = entry.get("head", ""), entry.get("positions", False)
        return cls(name, tuple(entry["shape"]), entry["dtype"], entry.get("sparse"), head, positions)


def specs_of(manifest: Mapping[str, Any]) -> dict[str, SiteSpec]:
    return {name: SiteSpec.from_json(name, entry) for name, entry in manifest["sites"].items()}


# The number of a row's token among those that were chosen of its pair, from 0.
TOKEN = Column("token", "int32", ())


def is_by_token(manifest: Mapping[str, Any]) -> bool:
    """Whether a row of the store is a token of a pair, and not a pair."""
    return "tokens" in manifest["settings"]


def columns_in(manifest: Mapping[str, Any]) -> list[Column]:
    """The columns of a store's shards behind ``id``, in order."""
    return [*([TOKEN] if is_by_token(manifest) else []), *columns_of(specs_of(manifest).values())]


def pairs_in(entry: Mapping[str, Any]) -> int:
    """How many pairs a shard's rows belong to."""
    return entry.get("pairs", entry["rows"])


def columns_of(specs: Iterable[SiteSpec]) -> list[Column]:
    """The columns of all sites, in order.

    Raises:
        ShapeMismatch: a site with empty rows, or two columns of the same name.
    """
    columns = [column for spec in specs for column in spec.columns()]
    names = [c.name for c in columns]
    for column in columns:
        if prod(column.shape) < 1:
            raise ShapeMismatch(f"site {column.name!r}: expected non-empty rows, got shape {column.shape}")
        if names.count(column.name) > 1 or column.name in ("id", TOKEN.name):
            raise ShapeMismatch(
                f"expected unique column names, got {column.name!r} twice; attach the head under another name"
            )
    return columns


def shard_name(number: int) -> str:
    return f"data-{number:05d}.arrow"


# -- the manifest --------------------------------------------------------------------------------------------


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as written: JSON with its own checksum, so that alterations are detected."""
    body = {k: v for k, v in manifest.items() if k != "checksum"}
    return (json.dumps({**body, "checksum": _checksum(body)}, indent=1, ensure_ascii=False) + "\n").encode()


def _checksum(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, finished or not.

    Raises:
        StoreError: no store there, or a manifest that is altered, unreadable, or of a later format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        kept = manifest.pop("checksum")
        whole = kept == _checksum(manifest)
    except FileNotFoundError:
        raise StoreError(
            f"no activation store in {folder}: {MANIFEST} is missing; mm.extract(..., out=...) writes one"
        ) from None
    except OSError as fault:
        raise StoreError(
            f"{path} cannot be read: {fault.strerror}; check its permissions and disk"
        ) from fault
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
        raise StoreError(
            f"{path} is damaged ({type(fault).__name__}: {fault}); restore it from a copy"
        ) from fault
    check_format(manifest, path)
    if not whole:
        raise StoreError(
            f"{path} was altered: its content does not match its checksum; restore it from a copy"
        )
    check_manifest(manifest, path)
    return manifest


# -- for datasets --------------------------------------------------------------------------------------------


def dataset_files(manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """``dataset_info.json`` and ``state.json``, derived from the manifest."""
    features: dict[str, Any] = {"id": {"dtype": "string", "_type": "Value"}}
    for column in columns_in(manifest):
        feature: dict[str, Any] = {"dtype": ARROW[column.dtype], "_type": "Value"}
        for length in reversed(column.shape):
            # datasets 4 and later reads "Sequence" as List; earlier versions know only "Sequence".
            feature = {"feature": feature, "length": length, "_type": "Sequence"}
        features[column.name] = feature
    data = manifest["data"]
    about = f"Activations of {manifest['model']['name']} on {data['name']}, written by mmhooks"
    info = {
        "citation": "",
        "description": about,
        "features": features,
        "homepage": "",
        "license": data.get("licence", ""),
    }
    marks = [shard["sha256"] for shard in manifest["shards"]]
    state = {
        "_data_files": [{"filename": shard["file"]} for shard in manifest["shards"]],
        "_fingerprint": sha256("".join(marks).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    return {INFO: json.dumps(info, indent=1).encode(), STATE: json.dumps(state, indent=1).encode()}


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """The differences of two JSON values, as ``settings.batch_size: 64 there, 32 here``."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = [*theirs, *(k for k in ours if k not in theirs)]
        return [
            line
            for k in keys
            for line in differences(ours.get(k), theirs.get(k), f"{where}.{k}" if where else str(k))
        ]
    same = list(ours) == list(theirs) if _is_list(ours) and _is_list(theirs) else ours == theirs
    return [] if same else [f"{where}: {theirs!r} there, {ours!r} here"]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
