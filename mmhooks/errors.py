"""The errors that mmhooks raises. Messages say what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MMHooksError(Exception):
    """Base of every error raised by mmhooks."""


class MMHooksWarning(UserWarning):
    """Something allowed that may not be what was meant, such as a cache that kept only the last of several values."""


class UnknownSite(MMHooksError, KeyError):
    """A site name or pattern that matches nothing; the message lists close matches."""

    def __init__(self, name: str, known: Iterable[str], *, where: str = "this model") -> None:
        known = list(known)
        near = get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"close matches: {', '.join(near)}" if near else "model.sites() lists all of them"
        self.name, self.near = name, near
        super().__init__(f"no site of {where} matches {name!r} ({len(known)} sites known); {hint}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class HookDidNotFire(MMHooksError):
    """An edit or a hook that ran at none of its sites while its context was open."""


class ShapeMismatch(MMHooksError, ValueError):
    """A width, shape, dtype or device other than a site or head expects."""


class OutOfRange(ShapeMismatch, IndexError):
    """An index of a feature, token, row, neuron or layer that does not exist."""


class WrongHead(MMHooksError, ValueError):
    """A FeatureSet used with a head other than the one it was computed for."""


class WrongOrigin(MMHooksError, ValueError):
    """A mean, decomposition or other statistic used where it does not apply: from another tower, model or weights,
    normalized instead of raw (or the reverse), or a different statistic altogether."""


class NoDecoder(MMHooksError, TypeError):
    """An edit that needs a decoder, on a head that has none: its features can be read but not spliced back."""


class NotFinite(MMHooksError, ValueError):
    """NaN or infinity in the input of a measure, a training run or an edit."""


class DataError(MMHooksError, ValueError):
    """An image, caption, file or table that cannot be used; the message names it."""


class MissingWeights(MMHooksError, OSError):
    """Weights, a data set or a model file that is not on this machine and cannot be downloaded."""


class DamagedFile(MMHooksError, ValueError):
    """A truncated or altered file, or one of another format; the message says what it contains."""


class CannotWrite(MMHooksError, OSError):
    """A file or folder that cannot be written (full disk, read-only folder); the message names it."""


class NoDigest(MMHooksError, TypeError):
    """An object whose content cannot be hashed, where stored results would be keyed by it."""


class StoreError(MMHooksError, OSError):
    """An activation store that is damaged, unfinished, locked by another writer, or written with other settings."""


class NoExactSum(MMHooksError, TypeError):
    """A tower whose embedding is not an exact sum of its components' outputs, or of an unknown kind; says why."""
