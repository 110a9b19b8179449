"""A head's folder: ``config.json`` for readers, ``model.safetensors`` for its weights with the same text inside.

``config.json`` keeps the SHA-256 of the weights and one of itself, so weights and configuration of two heads are
never taken for one, and a changed bit is found. Each file is written aside and renamed, weights first: a save that
was killed between the two leaves weights that carry their own configuration, which then counts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mmhooks.errors import DamagedFile, MissingWeights, MMHooksError
from mmhooks.utils.files import make_folder, write_text, written_aside
from mmhooks.utils.tensors import digest_of, metadata_of, read_safetensors

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
ABOUT = {
    "format": int,
    "kind": str,
    "name": str,
    "id": str,
    "config": dict,
    "info": dict,
    "weights": str,
    "digest": str,
}
AGAIN = "fetch it again, or save it again with head.save(path)"


def write_head(folder: Path, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files; ``about`` is what ``config.json`` says of the head.

    Raises:
        MMHooksError: ``about`` holds what JSON has no word for.
        CannotWrite: a full disk, a read-only folder.
    """
    try:
        about = json.loads(json.dumps(about))
    except (TypeError, ValueError) as error:
        raise MMHooksError(
            f"head.info is kept as JSON, which it is not ({error}); keep plain values in it"
        ) from error
    about["weights"] = digest_of(None, tensors)
    about["digest"] = digest_of(about, {})
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    make_folder(folder)
    with written_aside(folder / WEIGHTS) as aside:
        save_file(dict(tensors), aside, metadata={"format": "pt", "id": about["id"], "config": text})
    write_text(folder / CONFIG, text)


def read_head_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """What ``config.json`` says, the weights, and the fault that they do not belong together (None: they do).

    The fault is the caller's to raise, after those that say more. A file without digests, of before they were kept,
    has None: its id is compared by the caller.

    Raises:
        MissingWeights: one of the files is not there. DamagedFile: one of them cannot be read.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise MissingWeights(
                f"no head in {folder}: expected {CONFIG} and {WEIGHTS}, as Head.save writes them, and {file} is not there"
            )
    about = parse(_text(folder / CONFIG), folder / CONFIG)
    tensors = read_safetensors(folder / WEIGHTS)
    inner = metadata_of(folder / WEIGHTS).get("config")
    if "digest" not in about and inner is None:
        return about, tensors, None
    weights = digest_of(None, tensors)
    whole = about.get("digest") == _own_digest(about)
    if whole and about.get("weights") == weights:
        return about, tensors, None
    if "digest" in about and not whole:
        return (
            about,
            tensors,
            f"{folder / CONFIG} was changed after it was saved (its digest differs); {AGAIN}",
        )
    if inner is not None:
        carried = parse(inner, folder / WEIGHTS)
        if carried.get("digest") == _own_digest(carried) and carried.get("weights") == weights:
            warnings.warn(
                f"{folder / CONFIG} is of head {about.get('id')}, {WEIGHTS} of head {carried.get('id')}: a save was "
                f"broken off between them. The weights and the configuration inside them are taken; save it again",
                stacklevel=4,
            )
            return carried, tensors, None
    fault = f"{folder / WEIGHTS} are not the weights that were saved with {CONFIG} (digest {weights[:12]}, expected "
    return about, tensors, f"{fault}{str(about.get('weights'))[:12]}); {AGAIN}"


def parse(text: str, where: Path) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        DamagedFile: it is none.
    """
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{where}: expected a head's configuration in JSON, got {error}; {AGAIN}"
        ) from error
    if not isinstance(about, dict):
        raise DamagedFile(f"{where}: expected a JSON object, got a {type(about).__name__}; {AGAIN}")
    return about


def check_about(about: Mapping[str, Any], where: Path) -> None:
    """Every field that :func:`write_head` writes, by name and type; a missing, unknown or mistyped one raises.

    Raises:
        DamagedFile: names the fields.
    """
    faults = [f"unknown field {name!r}" for name in about.keys() - ABOUT.keys()]
    for name, kind in ABOUT.items():
        value = about.get(name)
        if value is None and name in ("kind", "config"):
            faults.append(f"no {name!r}")
        elif value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            faults.append(f"{name} must be {_WORDS[kind]}, got {value!r}")
    if faults:
        raise DamagedFile(f"{where} is not a head's configuration: {'; '.join(sorted(faults))}; {AGAIN}")


_WORDS = {int: "a whole number", str: "text", dict: "an object"}


def _own_digest(about: Mapping[str, Any]) -> str:
    return digest_of({k: v for k, v in about.items() if k != "digest"}, {})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path}: expected JSON in UTF-8, got {error}; {AGAIN}") from error
