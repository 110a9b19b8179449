"""Validation of manifests and journals read from files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from mmhooks.errors import StoreError

# Format 1 identified what determines the rows only by labels, and had no digests of shard headers. Format 3 is that of
# stores by token: a version that knows only format 2 would take each token for a pair.
BY_PAIR, BY_TOKEN = 2, 3
FORMAT = BY_TOKEN
SHARD_NAME = re.compile(r"data-\d{5,9}\.arrow")
_HEX = re.compile(r"[0-9a-f]{64}")


def check_format(manifest: Mapping[str, Any], path: Path) -> None:
    """Raises StoreError for a manifest of a later format, whatever else it contains."""
    number = manifest.get("format")
    if _is_count(number) and number > FORMAT:
        raise StoreError(f"{path}: expected a format up to {FORMAT}, got {number}; upgrade mmhooks")


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Raises StoreError for the first invalid entry of a manifest."""
    for name, (fits, expected) in _MANIFEST.items():
        if not fits(manifest.get(name)):
            raise StoreError(
                f"{path}: expected {name} to be {expected}, got {manifest.get(name)!r:.80}; restore it from a copy"
            )
    for name, site in manifest["sites"].items():
        _check(site, _SITE, path, f"site {name!r}")
    for number, entry in enumerate(manifest["shards"]):
        _check(entry, _SHARD, path, f"shard {number}")
        if entry["rows"] < 1:
            raise StoreError(
                f"{path}: expected shard {number} to hold rows, got {entry['rows']}; restore it from a copy"
            )
    if manifest["complete"]:
        check_count(manifest, path)


def check_count(manifest: Mapping[str, Any], path: Path) -> None:
    """Raises StoreError unless a complete store accounts for every pair of its source, stored or skipped."""
    rows = sum(entry.get("pairs", entry["rows"]) for entry in manifest["shards"])
    skipped = len(manifest.get("skipped", {}))
    expected = manifest["data"].get("pairs")
    # Format 1 counted only the rows of a merged store.
    left_out = 0 if manifest["format"] == 1 and "merged" in manifest else skipped
    if manifest.get("pairs") != rows or (expected is not None and rows + left_out != expected):
        raise StoreError(
            f"{path} is marked complete: expected {expected} pairs, got {rows} and {skipped} skipped pairs; rows are "
            "missing: extract again into another folder"
        )


def is_entry(entry: Any) -> bool:
    """Whether this is a valid shard entry of a journal."""
    try:
        _check(entry, {**_SHARD, "shard": (_is_count, ""), "skipped": (_is_texts, "")}, Path(), "entry")
    except StoreError:
        return False
    return True


Rule = tuple[Callable[[Any], bool], str]


def _check(entry: Any, rules: Mapping[str, Rule], path: Path, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise StoreError(
            f"{path}: expected {where} to be an object, got {entry!r:.80}; restore it from a copy"
        )
    for name, (fits, expected) in rules.items():
        if not fits(entry.get(name)):
            raise StoreError(
                f"{path}: expected {name} of {where} to be {expected}, got {entry.get(name)!r:.80}; restore it from a "
                "copy"
            )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_count(n) and n > 0 for n in value)


def _is_data(value: Any) -> bool:
    named = isinstance(value, Mapping) and isinstance(value.get("name"), str)
    return named and (value.get("pairs") is None or _is_count(value["pairs"]))


def _is_settings(value: Any) -> bool:
    return isinstance(value, Mapping) and _is_count(value.get("shard_rows")) and value["shard_rows"] > 0


def _is_model(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)


def _is_head(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and _is_count(value.get("bytes")) and _is_hex(value.get("sha256"))


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


_MANIFEST: dict[str, Rule] = {
    "format": (lambda v: _is_count(v) and v >= 1, "a number"),
    "complete": (lambda v: isinstance(v, bool), "true or false"),
    "model": (_is_model, "an object with a name"),
    "sites": (lambda v: isinstance(v, Mapping) and len(v) > 0, "an object with at least one site"),
    "data": (_is_data, "an object with a name and a number of pairs or null"),
    "settings": (_is_settings, "an object with shard_rows"),
    "versions": (lambda v: isinstance(v, Mapping), "an object"),
    "shards": (lambda v: isinstance(v, list), "a list"),
    "skipped": (lambda v: v is None or _is_texts(v), "an object of texts"),
}
_SITE: dict[str, Rule] = {
    "shape": (_is_shape, "a list of positive numbers"),
    "dtype": (lambda v: v in ("fp32", "fp16", "bf16"), "fp32, fp16 or bf16"),
    "sparse": (lambda v: v is None or (_is_count(v) and v > 0), "a positive number"),
    "head": (lambda v: v is None or isinstance(v, str), "a text"),
}
_SHARD: dict[str, Rule] = {
    # Only names that we write: a path could lead out of the folder.
    "file": (
        lambda v: isinstance(v, str) and SHARD_NAME.fullmatch(v) is not None,
        "a name like data-00000.arrow",
    ),
    "rows": (_is_count, "a number"),
    "pairs": (lambda v: v is None or _is_count(v), "a number"),
    "bytes": (_is_count, "a number"),
    "sha256": (lambda v: v == "" or _is_hex(v), "64 hexadecimal digits"),
    "head": (_is_head, "an object of bytes and sha256"),
}
