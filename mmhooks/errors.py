"""Every error that mmhooks raises on its own account. Messages carry the numbers and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MMHooksError(Exception):
    """Base of every error raised by mmhooks: what was expected, what came, what to do."""


class MMHooksWarning(UserWarning):
    """Something that is allowed and yet not what it may seem: a cache that kept the last of several values, ..."""


class UnknownSite(MMHooksError, KeyError):
    """A site name or pattern that selects nothing; the message lists near matches."""

    def __init__(self, name: str, known: Iterable[str], *, where: str = "this model") -> None:
        known = list(known)
        near = get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"near matches: {', '.join(near)}" if near else "model.sites() lists them all"
        self.name, self.near = name, near
        super().__init__(f"no site of {where} matches {name!r} ({len(known)} sites known); {hint}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class HookDidNotFire(MMHooksError):
    """An edit or a hook that ran at none of its sites while its context was open."""


class ShapeMismatch(MMHooksError, ValueError):
    """A width, shape, dtype or device that differs from what a site or a head expects."""


class OutOfRange(ShapeMismatch, IndexError):
    """A feature, token, row, neuron or layer that is not there."""


class WrongHead(MMHooksError, ValueError):
    """A FeatureSet used on a head other than the one it was computed for."""


class WrongOrigin(MMHooksError, ValueError):
    """A mean, a decomposition or another statistic used where it does not belong: of another tower, model or weights,
    normalized for raw (or the other way round), or not that statistic at all."""


class NoDecoder(MMHooksError, TypeError):
    """A head that can be read but not spliced back, because it has no decoder."""


class NotFinite(MMHooksError, ValueError):
    """NaN or infinity where a measure, a training or an edit needs numbers."""


class DataError(MMHooksError, ValueError):
    """A picture, caption, file or table that cannot be used; names it."""


class MissingWeights(MMHooksError, OSError):
    """Weights, a data set or a model file that is not on this machine and cannot be fetched."""


class DamagedFile(MMHooksError, ValueError):
    """A file that is not what it should be: cut off, changed, of another format; says what was found in it."""


class CannotWrite(MMHooksError, OSError):
    """A file or folder that cannot be written: a full disk, a read-only folder; names it and says what to do."""


class NoDigest(MMHooksError, TypeError):
    """An object whose content cannot be told from another's, where results would be kept under its name."""


class StoreError(MMHooksError, OSError):
    """An activation store that is damaged, unfinished, being written by another, or of other settings."""


class NoExactSum(MMHooksError, TypeError):
    """A tower whose embedding is not the sum of what its components write, or not one known here; says why."""
