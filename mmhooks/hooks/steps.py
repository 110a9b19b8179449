"""The state of a run in steps: its step, and the half of a guided batch that a module processes.

Steps are those of denoising, or of a generation: the prompt, then one for each new token.

The running pipeline sets both; edits with ``steps=`` and ``guidance=``, caches and hook functions read them. With
classifier-free guidance the U-Net receives the unconditional and then the conditional rows in one batch, while the
text encoder is called separately for each half.
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
HALVES = ("uncond", "cond")  # their order in a batch of diffusers


class Moment(NamedTuple):
    """``step``: its number, from 0. ``half``: which rows a batch holds; ``both``: the unconditional, then the conditional
    ones."""

    step: int | None = None
    half: Guidance | None = None


_NEVER = Moment()
_NOW: ContextVar[Moment] = ContextVar("mmhooks_moment", default=_NEVER)


def current_moment() -> Moment:
    return _NOW.get()


@contextmanager
def moment(step: int | None, half: Guidance | None) -> Iterator[None]:
    """Sets the step, and the half of the batch, for everything inside the block."""
    token = _NOW.set(Moment(step, half))
    try:
        yield
    finally:
        _NOW.reset(token)


def chosen_steps(steps: Any) -> tuple[int, ...] | range | None:
    """``steps=`` of an edit or a cache as numbers, for membership tests at every step.

    Raises:
        ShapeMismatch: a mask, since the number of steps is not known here, or anything but whole numbers.
        OutOfRange: a negative number.

    >>> chosen_steps([3, 1]), chosen_steps(range(2))
    ((1, 3), range(0, 2))
    """
    if steps is None:
        return None
    choice = as_choice(steps, "steps")
    if choice.dtype == torch.bool:
        raise ShapeMismatch(
            "steps: expected numbers of steps, counted from 0, got a mask; pass mask.nonzero()"
        )
    if choice.numel() and int(choice.min()) < 0:
        raise OutOfRange(f"steps: expected numbers of steps, counted from 0, got {int(choice.min())}")
    return steps if isinstance(steps, range) else tuple(sorted(set(choice.flatten().tolist())))


def inactive(steps: Any, guidance: Guidance, where: str) -> bool:
    """Whether an edit limited to ``steps`` and to one half does not apply to the current value at ``where``.

    Raises:
        MMHooksError: there are no steps, or no halves, at this place.
    """
    at = _NOW.get()
    if steps is not None and at.step is None:
        raise MMHooksError(
            f"steps= at {where!r}, which does not run inside a denoising step or a step of a generation (text "
            "encoders of pipelines and image towers run once, before the first step); leave steps= out, or in a pipeline edit "
            "'text.cond'"
        )
    if guidance != "both" and at.half is None:
        raise MMHooksError(
            f"guidance={guidance!r} at {where!r}, where the halves of the batch are not known: they are known in the "
            "text encoders and the U-Net of a running pipeline; leave guidance= out"
        )
    return (steps is not None and at.step not in steps) or (
        guidance != "both" and at.half not in ("both", guidance)
    )


def halves(rows: int, where: str) -> list[tuple[Guidance, slice]] | None:
    """The halves of a batch that holds both, with their rows; None for a batch of one half.

    >>> with moment(0, "both"):
    ...     halves(4, "text.cond")
    [('uncond', slice(0, 2, None)), ('cond', slice(2, 4, None))]
    """
    if _NOW.get().half != "both":
        return None
    if rows % 2:
        raise ShapeMismatch(f"{where!r}: expected an even number of rows in a guided run, got {rows}")
    return [("uncond", slice(0, rows // 2)), ("cond", slice(rows // 2, rows))]
