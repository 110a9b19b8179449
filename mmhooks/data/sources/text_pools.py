"""Pools of short texts for describing images, attention heads and neurons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmhooks.data.sources.local_files import read_regular
from mmhooks.errors import DataError
from mmhooks.utils.assets import ASSETS

POOLS = ("general", "imagenet", "mini")
_GENERAL = ASSETS / "texts" / "general.txt"


@dataclass(frozen=True)
class TextPool:
    """Distinct texts in a fixed order; ``kinds``: the kind of each text, if known ("colour", "place", ...)."""

    name: str
    texts: tuple[str, ...]
    kinds: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def text_pool(source: str | Path = "general", *, template: str | None = None) -> TextPool:
    """A pool by name, or from a user's file.

    Args:
        source: "general" (colours, shapes, counts, places, textures, moods, animals, objects, styles; ships with
            mmhooks), "imagenet" (the 1,000 class names that open_clip carries, in a prompt), "mini" (the names of
            the embedded corpus), or a file with one text per line; a line ``# word`` sets the kind of those below it.
        template: prompt with ``{}`` in place of the text; default "a photo of a {}." for imagenet, else none.

    Raises:
        DataError: no such pool or file, a file without texts, or a template without ``{}``.

    >>> pool = text_pool("general"); len(pool) > 1000, "colour" in pool.kinds
    (True, True)
    """
    if template is not None and "{}" not in template:
        raise DataError(f"template: expected {{}} in place of the text, got {template!r}")
    name, kinds = str(source), None
    if name == "general":
        texts, kinds = _read(_GENERAL)
    elif name == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        texts, template = list(IMAGENET_CLASSNAMES), template or "a photo of a {}."
    elif name == "mini":
        from mmhooks.data.sources.pairs import pairs

        texts = list(pairs("mini").texts)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(
                f"no text pool {name!r}: give one of {', '.join(POOLS)}, or a file with one text per line"
            )
        name, (texts, kinds) = path.name, _read(path)
    texts = [t if template is None else template.replace("{}", t) for t in texts]
    return _distinct(name, texts, kinds)


def splice_vocabulary(path: str | Path, *, size: int = 10_000) -> TextPool:
    """Reads a vocabulary of SpLiCE's code (``data/vocab/laion.txt``, ``mscoco.txt``): one concept per line, the rarest
    first, of which its ``load`` takes the last ``size``; what follows a comma and a space is left out.

    Raises:
        DataError: no such file, no text in it, or a size below 1.

    >>> splice_vocabulary("laion.txt", size=10_000)                       # doctest: +SKIP
    """
    place = Path(path).expanduser()
    if size < 1:
        raise DataError(f"size: expected at least 1 concept, got {size}")
    if not place.is_file():
        raise DataError(
            f"no vocabulary {path}: give a file with one concept per line, as in SpLiCE's data/vocab"
        )
    texts = [line.strip().split(", ")[0] for line in _lines(place)]
    texts = [text for text in texts[-size:] if text]
    if not texts:
        raise DataError(f"{path}: expected one concept per line, got no texts")
    return _distinct(place.name, texts, None)


def _read(path: Path) -> tuple[list[str], list[str] | None]:
    texts, kinds, kind = [], [], ""
    for line in _lines(path):
        line = line.strip()
        if line.startswith("#"):
            kind = line.lstrip("# ")
        elif line:
            texts.append(line)
            kinds.append(kind)
    if not texts:
        raise DataError(f"{path}: expected one text per line, got no texts")
    return texts, kinds if any(kinds) else None


def _lines(path: Path) -> list[str]:
    try:
        return read_regular(path).decode("utf-8-sig").splitlines()
    except (DataError, UnicodeDecodeError) as fault:
        raise DataError(
            f"{path}: expected a list of texts in UTF-8, got a file that cannot be read: {fault}"
        ) from fault


def _distinct(name: str, texts: Iterable[str], kinds: Iterable[str] | None) -> TextPool:
    """Removes duplicate texts, keeping the first."""
    texts = list(texts)
    first = {t: i for i, t in reversed(list(enumerate(texts)))}
    rows = sorted(first.values())
    kept = None if kinds is None else tuple(list(kinds)[i] for i in rows)
    return TextPool(name, tuple(texts[i] for i in rows), kept)
