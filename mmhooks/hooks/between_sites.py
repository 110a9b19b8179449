"""Splices heads that read one site and write another, such as transcoders.

With ``x`` the value at the site that is read, ``y`` the value at the site that is written, features ``f = enc(x)`` and a
prediction ``y' = dec(f) + skip(x)``, edited features ``f'`` replace ``y`` by

    ``out = y + (f' - f) W_dec``              (with the error term ``y - y'``; ``y`` itself if nothing changed)
    ``out = dec(f') + skip(x)``               (``error_term=False``: the head takes the place of what computed ``y``)

``x`` is what flows on at its site, after all edits there, so an edit upstream of the head changes ``f`` and what the module
between the sites computes alike.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.program import Op, describe_tensor
from mmhooks.hooks.sites import Site
from mmhooks.hooks.splice import HeadStep


@runtime_checkable
class MapLike(Protocol):
    """What a head that maps between sites has besides :class:`~mmhooks.hooks.splice.HeadLike`: the width that it writes,
    and ``predict(f, x) = dec(f) + skip(x)``."""

    d_out: int

    def predict(self, f: Tensor, x: Tensor) -> Tensor: ...


class Inbox:
    """Holds the value at a site until the step that needs it runs, for each thread: contexts are inherited by threads that
    copy them, and each runs the model on inputs of its own."""

    def __init__(self, source: Site, target: Site) -> None:
        self.source, self.target = source, target

    @property
    def holds(self) -> bool:
        """Whether a value was put since the last :meth:`clear`."""
        return self in _HELD.get()

    def put(self, value: Tensor) -> None:
        _HELD.set({**_HELD.get(), self: (value, _version(value))})

    def get(self) -> Tensor:
        """The value put since the last :meth:`clear`.

        Raises:
            MMHooksError: the target ran and the source did not, or the model wrote into the value in between.
        """
        value, version = _HELD.get().get(self, (None, 0))
        if value is None:
            raise MMHooksError(
                f"expected {self.source.name!r} to run before {self.target.name!r}, as the head attached there reads it, got "
                "a run without it; attach the head where its input is computed first, and do not checkpoint "
                f"{self.target.name!r} without it"
            )
        if _version(value) != version:
            raise MMHooksError(
                f"the model wrote into the value of {self.source.name!r} before {self.target.name!r} ran, so the head attached "
                "there cannot read it; build the model without in-place activations"
            )
        return value

    def clear(self) -> None:
        _HELD.set({key: held for key, held in _HELD.get().items() if key is not self})


_HELD: ContextVar[dict[Inbox, tuple[Tensor, int]]] = ContextVar("mmhooks_inboxes", default={})  # noqa: B039 - never written into


def forget_inboxes() -> None:
    """Lets go of values whose target did not run; called when a context closes."""
    if _HELD.get():
        _HELD.set({})


def _version(value: Tensor) -> int:
    """Changes when something writes into the value; inference tensors do not tell."""
    return 0 if value.is_inference() or torch.compiler.is_compiling() else value._version


class Feed:
    """Puts the value that flows on at a site into an inbox; unlike a cache also when a checkpointed block is recomputed."""

    def __init__(self, inbox: Inbox, *, detached: bool) -> None:
        self.inbox, self.view, self.detached = inbox, inbox.source.vectors, detached

    def __call__(self, raw: Tensor) -> Tensor:
        self.inbox.put(raw if self.view is None else self.view.show(raw))
        return raw


class MapStep(HeadStep):
    """One run of a head at the site that it writes, on what it reads elsewhere."""

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        self.inbox = Inbox(self.attachment.sources[0], self.site)

    def seal(self) -> None:
        super().seal()
        if isinstance(self.reads, MapStep):
            self.reads.inbox = self.inbox

    def feeds(self) -> list[Feed]:
        """What must run at the site that is read."""
        return [Feed(self.inbox, detached=self.detached)]

    def __call__(self, raw: Tensor) -> Tensor:
        try:
            return super().__call__(raw)
        finally:
            self.inbox.clear()

    def _input(self, x: Tensor) -> Tensor:
        return self.inbox.get()

    def _decode(self, f: Tensor, unit: Tensor) -> Tensor:
        return self.head.predict(f, unit)

    def _check(self, x: Tensor) -> None:
        head, read = self.head, self.inbox.get()
        for value, site, width in (
            (read, self.inbox.source, head.d_in),
            (x, self.site, head.d_out),
        ):
            if value.shape[-1] != width:
                raise ShapeMismatch(
                    f"head {self.attachment.name!r} maps vectors of width {head.d_in} to width {head.d_out}, site "
                    f"{site.name!r} carries {describe_tensor(value)}; attach it where it was trained"
                )
        if read.shape[:-1] != x.shape[:-1]:
            raise ShapeMismatch(
                f"head {self.attachment.name!r}: expected as many vectors at {self.inbox.source.name!r} as at "
                f"{self.site.name!r}, got {describe_tensor(read)} and {describe_tensor(x)}; it maps vector by vector"
            )
        if head.W_dec.device != x.device:
            raise ShapeMismatch(
                f"head {self.attachment.name!r} is on {head.W_dec.device}, site {self.site.name!r} carries "
                f"{describe_tensor(x)}; move it with head.to({str(x.device)!r})"
            )
