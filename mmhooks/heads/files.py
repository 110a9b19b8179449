"""A head's folder: ``config.json``, and ``model.safetensors`` with the weights and a copy of the configuration.

``config.json`` contains the SHA-256 of the weights and of itself, so that files of two heads are never mixed up and
any changed bit is detected. Each file is written atomically, weights first: a save killed between the two leaves
weights that carry their own configuration, which is then used.
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
from mmhooks.utils.files import atomic_path, make_folder, write_text
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
REMEDY = "download it again, or save it again with head.save(path)"


def write_head(folder: Path, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files; ``about`` is the content of ``config.json``.

    Raises:
        MMHooksError: ``about`` contains values that JSON cannot represent.
        CannotWrite: a full disk, a read-only folder.
    """
    try:
        about = json.loads(json.dumps(about))
    except (TypeError, ValueError) as error:
        raise MMHooksError(
            f"head.info: expected values that JSON can represent, got others ({error}); store plain values in it"
        ) from error
    about["weights"] = digest_of(None, tensors)
    about["digest"] = digest_of(about, {})
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    make_folder(folder)
    with atomic_path(folder / WEIGHTS) as aside:
        save_file(dict(tensors), aside, metadata={"format": "pt", "id": about["id"], "config": text})
    write_text(folder / CONFIG, text)


def read_head_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """The content of ``config.json``, the weights, and a message if they do not belong together (else None).

    The caller raises the message, after more specific checks. For files written before digests were stored it is None:
    the caller compares their id.

    Raises:
        MissingWeights: one of the files is missing. DamagedFile: one of them cannot be read.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise MissingWeights(
                f"no head in {folder}: expected {CONFIG} and {WEIGHTS}, as Head.save writes them, but {file} is missing"
            )
    about = parse_config(_text(folder / CONFIG), folder / CONFIG)
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
            f"{folder / CONFIG} was changed after it was saved (its digest differs); {REMEDY}",
        )
    if inner is not None:
        carried = parse_config(inner, folder / WEIGHTS)
        if carried.get("digest") == _own_digest(carried) and carried.get("weights") == weights:
            warnings.warn(
                f"{folder / CONFIG} belongs to head {about.get('id')}, {WEIGHTS} to head {carried.get('id')}: a save was "
                f"interrupted between them. The weights and the configuration inside them are used; save it again",
                stacklevel=4,
            )
            return carried, tensors, None
    fault = f"{folder / WEIGHTS} does not hold the weights that were saved with {CONFIG} (digest {weights[:12]}, expected "
    return about, tensors, f"{fault}{str(about.get('weights'))[:12]}); {REMEDY}"


def parse_config(text: str, where: Path) -> dict[str, Any]:
    """The JSON object in ``text``.

    Raises:
        DamagedFile: it is not a JSON object.
    """
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{where}: expected a head's configuration in JSON, got {error}; {REMEDY}"
        ) from error
    if not isinstance(about, dict):
        raise DamagedFile(f"{where}: expected a JSON object, got a {type(about).__name__}; {REMEDY}")
    return about


def check_about(about: Mapping[str, Any], where: Path) -> None:
    """Checks the names and types of the fields that :func:`write_head` writes.

    Raises:
        DamagedFile: a field is missing, unknown or of another type; names all of them.
    """
    faults = [f"unknown field {name!r}" for name in about.keys() - ABOUT.keys()]
    for name, kind in ABOUT.items():
        value = about.get(name)
        if value is None and name in ("kind", "config"):
            faults.append(f"no {name!r}")
        elif value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            faults.append(f"{name} must be {_WORDS[kind]}, got {value!r}")
    if faults:
        raise DamagedFile(f"{where} is not a head's configuration: {'; '.join(sorted(faults))}; {REMEDY}")


_WORDS = {int: "a whole number", str: "text", dict: "an object"}


def _own_digest(about: Mapping[str, Any]) -> str:
    return digest_of({k: v for k, v in about.items() if k != "digest"}, {})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path}: expected JSON in UTF-8, got {error}; {REMEDY}") from error
