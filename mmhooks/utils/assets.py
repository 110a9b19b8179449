"""What ships inside the package: embedded models and heads with their cards, compared with their digests before use."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mmhooks.errors import DamagedFile, MissingWeights
from mmhooks.utils.files import sha256_of, write_text

EMBEDDED = ("mini", "mini-declip", "mini-reader")


def card(name: str) -> dict[str, Any]:
    """What is known of an embedded model: data, licences, recipe, seed, held-out retrieval."""
    path = ASSETS / name / "card.json"
    if not path.is_file():
        raise MissingWeights(f"no card of {name!r}: embedded models are {', '.join(EMBEDDED)}")
    return json.loads(asset(path).read_text(encoding="utf-8"))


ASSETS = Path(__file__).parent.parent / "assets"
DIGESTS = "digests.json"


def asset(path: Path) -> Path:
    """``path``, ``assets/<name>/<file>``, after its content was found to be what was shipped; once a process.

    Raises:
        MissingWeights: it is not in this installation. DamagedFile: its content is another one.

    >>> asset(ASSETS / "mini" / "card.json").name
    'card.json'
    """
    if not path.is_file():
        raise MissingWeights(
            f"{path.name} of {path.parent.name!r} is not in this installation; install mmhooks again"
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
            f"{root / DIGESTS} does not say what {path.name} should be ({error!r}); install mmhooks again"
        ) from error
    found = sha256_of(path)
    if found != expected:
        raise DamagedFile(
            f"{path} is not the file that was shipped (SHA-256 {found[:12]}, expected {str(expected)[:12]}, "
            f"{size:,} bytes); install mmhooks again"
        )


def write_digests(folder: Path = ASSETS) -> Path:
    """Writes the digests of everything in ``folder``: whoever changes an asset does so afterwards."""
    files = sorted(p for p in folder.glob("*/*") if p.is_file())  # heads lie deeper and keep their own
    found = {p.relative_to(folder).as_posix(): sha256_of(p) for p in files}
    return write_text(folder / DIGESTS, json.dumps(found, indent=1) + "\n")
