"""Braces in the names of shards, as in WebDataset and in the shell: ``laion/{00000..00012}.tar``."""

from __future__ import annotations

import re
from itertools import product

from mmhooks.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 10**6


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, in the order of the shell; braces with neither ``..`` nor a comma stay.

    A range is padded with zeros to the width of its ends, if one of them is. Braces inside braces are not expanded.

    Raises:
        DataError: a range that runs backwards, or more than a million names.

    >>> expand_braces("a/{08..10}.tar"), expand_braces("{a,b}{1..2}")
    (['a/08.tar', 'a/09.tar', 'a/10.tar'], ['a1', 'a2', 'b1', 'b2'])
    """
    parts, end, names = [], 0, 1
    for found in _BRACES.finditer(pattern):
        choices = _choices(found[1], pattern)
        names *= len(choices)
        if names > MOST:
            raise DataError(f"{pattern}: expected at most {MOST:,} names, got {names:,} or more")
        parts += [[pattern[end : found.start()]], choices]
        end = found.end()
    return ["".join(chosen) for chosen in product(*parts, [pattern[end:]])]


def _choices(inner: str, pattern: str) -> list[str]:
    between = _RANGE.fullmatch(inner)
    if between is None:
        return inner.split(",") if "," in inner else [f"{{{inner}}}"]
    first, last = between[1], between[2]
    if int(last) < int(first):
        raise DataError(f"{pattern}: expected a range from a lower to a higher number, got {{{inner}}}")
    if int(last) - int(first) >= MOST:
        raise DataError(f"{pattern}: expected at most {MOST:,} names, got {{{inner}}}")
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
