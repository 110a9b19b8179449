"""Which captions of an image become texts of pairs: the first, each, a random one, or none."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

from mmhooks.errors import DataError

Captions = Literal["first", "all", "random", "none"]
CHOICES: tuple[Captions, ...] = ("first", "all", "random", "none")


def check_choice(captions: str) -> None:
    """Raises DataError for a word that is not one of :data:`CHOICES`."""
    if captions not in CHOICES:
        raise DataError(
            f"captions: expected one of {', '.join(map(repr, CHOICES))}, got {captions!r}; 'all' makes a pair of every "
            "caption, 'none' reads the images alone"
        )


def chosen_texts(key: str, captions: Sequence[str], choice: Captions, seed: int = 0) -> list[tuple[str, str]]:
    """The id and text of each pair that an image makes.

    With ``"all"``, ids are numbered as in Flickr8k's ``1000268201_693b08cb0e.jpg#0``. With ``"random"``, the choice
    depends on the seed and the image's id alone: not on its place, on ``limit`` or on the number of processes.

    >>> chosen_texts("a.jpg", ["a cat", "a grey cat"], "all")
    [('a.jpg#0', 'a cat'), ('a.jpg#1', 'a grey cat')]
    >>> chosen_texts("a.jpg", ["a cat", "a grey cat"], "none")
    [('a.jpg', '')]
    """
    if choice == "none":
        return [(key, "")]
    if choice == "all":
        return [(f"{key}#{i}", text) for i, text in enumerate(captions)]
    place = 0
    if choice == "random":
        drawn = blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
        place = int.from_bytes(drawn, "big") % len(captions)
    return [(key, captions[place])]
