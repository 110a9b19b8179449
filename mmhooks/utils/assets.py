"""Files shipped inside the package: embedded models and heads with their cards, verified by digest before use."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mmhooks.errors import DamagedFile, MissingWeights, MMHooksError
from mmhooks.utils.files import sha256_of, write_text

EMBEDDED = ("mini", "mini-declip", "mini-reader")
EMBEDDED_VLMS = ("mini-vlm",)
REPLACED = {"mini-llava": "mini-vlm"}  # models of earlier versions


def check_not_replaced(name: str) -> None:
    """Checks that a name is not that of a model that is no longer shipped.

    Raises:
        MMHooksError: it is; the message names what to load instead.

    >>> check_not_replaced("mini-vlm")
    """
    if name in REPLACED:
        raise MMHooksError(
            f"expected an embedded model, got {name!r}, which is no longer shipped: {REPLACED[name]!r} replaces it "
            f"(mm.load({REPLACED[name]!r}))"
        )


def card(name: str) -> dict[str, Any]:
    """The card of an embedded model: data, licences, recipe, seed, held-out retrieval."""
    check_not_replaced(name)
    path = ASSETS / name / "card.json"
    if not path.is_file():
        raise MissingWeights(
            f"no card of {name!r}: embedded models are {', '.join((*EMBEDDED, *EMBEDDED_VLMS))}"
        )
    return json.loads(asset(path).read_text(encoding="utf-8"))


ASSETS = Path(__file__).parent.parent / "assets"
DIGESTS = "digests.json"


def asset(path: Path) -> Path:
    """Returns ``path`` (``assets/<name>/<file>``) after verifying its digest, once per process.

    Raises:
        MissingWeights: it is not in this installation. DamagedFile: its content differs from what was shipped.

    >>> asset(ASSETS / "mini" / "card.json").name
    'card.json'
    """
    if not path.is_file():
        raise MissingWeights(
            f"{path.name} of {path.parent.name!r} is not in this installation; reinstall mmhooks"
        )
    state = path.stat()
    _compare(path, state.st_size, state.st_mtime_ns)
    return path


@cache
def _compare(path: Path, size: int, changed: int) -> None:
    root = path.parents[1]
    try:
        expected = json.loads((root / DIGESTS).read_text(encoding="utf-8"))[path.relative_to(root).as_posix()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(
            f"{root / DIGESTS} has no digest of {path.name} ({error!r}); reinstall mmhooks"
        ) from error
    found = sha256_of(path)
    if found != expected:
        raise DamagedFile(
            f"{path} is not the file that was shipped (SHA-256 {found[:12]}, expected {str(expected)[:12]}, "
            f"{size:,} bytes); reinstall mmhooks"
        )


def write_digests(folder: Path = ASSETS) -> Path:
    """Writes the digests of all files in ``folder``; to be called after an asset has changed."""
    files = sorted(
        p for p in folder.glob("*/*") if p.is_file()
    )  # heads lie deeper and carry their own digests
    found = {p.relative_to(folder).as_posix(): sha256_of(p) for p in files}
    return write_text(folder / DIGESTS, json.dumps(found, indent=1) + "\n")
