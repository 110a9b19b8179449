"""The step of a diffusion run, for edits with ``steps=``; set by the pipeline that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from mmhooks.errors import MMHooksError

_STEP: ContextVar[int | None] = ContextVar("mmhooks_step", default=None)


@contextmanager
def step(number: int | None) -> Iterator[None]:
    """Marks everything inside as belonging to denoising step ``number``."""
    token = _STEP.set(number)
    try:
        yield
    finally:
        _STEP.reset(token)


def active_step(steps: Sequence[int] | range | None, where: str) -> bool:
    """Whether an edit limited to ``steps`` acts now; raises where there are no steps at all."""
    if steps is None:
        return True
    now = _STEP.get()
    if now is None:
        raise MMHooksError(f"steps= at {where!r}, but no diffusion run is going on; leave steps= out")
    return now in steps
