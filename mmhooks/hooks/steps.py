"""Where a diffusion run is: its denoising step, and which half of a guided batch a module works on.

The pipeline that runs sets both; edits with ``steps=`` and ``guidance=``, caches and hook functions ask. With
classifier-free guidance the U-Net gets the unconditional rows and then the conditional ones in one batch, while
the text encoder is called for each half by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch

from mmhooks.errors import MMHooksError, OutOfRange, ShapeMismatch
from mmhooks.utils.indexing import as_choice

Guidance = Literal["cond", "uncond", "both"]
HALVES = ("uncond", "cond")  # the order in which diffusers puts them into a batch


class Moment(NamedTuple):
    """``step``: number of the denoising step, from 0. ``half``: whose rows a batch holds; ``both``: first the
    unconditional, then the conditional ones."""

    step: int | None = None
    half: Guidance | None = None


_NEVER = Moment()
_NOW: ContextVar[Moment] = ContextVar("mmhooks_moment", default=_NEVER)


def now() -> Moment:
    return _NOW.get()


@contextmanager
def moment(step: int | None, half: Guidance | None) -> Iterator[None]:
    """Marks everything inside as belonging to a denoising step, and to a half of the batch."""
    token = _NOW.set(Moment(step, half))
    try:
        yield
    finally:
        _NOW.reset(token)


def chosen_steps(steps: Any) -> tuple[int, ...] | range | None:
    """``steps=`` of an edit or a cache, as numbers that can be looked up at every step.

    Raises:
        ShapeMismatch: a mask, since nothing here says how many steps a run has, or anything but whole numbers.
        OutOfRange: a negative number.

    >>> chosen_steps([3, 1]), chosen_steps(range(2))
    ((1, 3), range(0, 2))
    """
    if steps is None:
        return None
    choice = as_choice(steps, "steps")
    if choice.dtype == torch.bool:
        raise ShapeMismatch(
            "steps: expected numbers of denoising steps, from 0, got a mask; pass mask.nonzero()"
        )
    if choice.numel() and int(choice.min()) < 0:
        raise OutOfRange(f"steps: {int(choice.min())} is not a denoising step; they are counted from 0")
    return steps if isinstance(steps, range) else tuple(sorted(set(choice.flatten().tolist())))


def asleep(steps: Any, guidance: Guidance, where: str) -> bool:
    """Whether an edit limited to ``steps`` and to a half has to leave the value at ``where`` alone now.

    Raises:
        MMHooksError: there are no steps, or no halves, at this place.
    """
    at = _NOW.get()
    if steps is not None and at.step is None:
        raise MMHooksError(
            f"steps= at {where!r}, but no diffusion run is going on there (text encoders run once, before its "
            "first step); leave steps= out, or edit 'text.cond'"
        )
    if guidance != "both" and at.half is None:
        raise MMHooksError(
            f"guidance={guidance!r} at {where!r}, but nothing says whose rows these are: halves are known in the "
            "text encoders and the U-Net of a pipeline that runs; leave guidance= out"
        )
    return (steps is not None and at.step not in steps) or (
        guidance != "both" and at.half not in ("both", guidance)
    )


def halves(rows: int, where: str) -> list[tuple[Guidance, slice]] | None:
    """The halves of a batch that holds both, with their rows; None for a batch of one kind.

    >>> with moment(0, "both"):
    ...     halves(4, "text.cond")
    [('uncond', slice(0, 2, None)), ('cond', slice(2, 4, None))]
    """
    if _NOW.get().half != "both":
        return None
    if rows % 2:
        raise ShapeMismatch(f"{rows} rows at {where!r} in a guided run, where one half follows the other")
    return [("uncond", slice(0, rows // 2)), ("cond", slice(rows // 2, rows))]
