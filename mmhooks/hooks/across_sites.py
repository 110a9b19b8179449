"""Splices heads that read and write several sites at once, such as crosscoders.

With ``x_s`` the values at its sites, joined features ``f = enc(x_1, x_2, ...)`` and ``f'`` after edits, site ``s`` becomes

    ``out_s = x_s + (f' - f) W_dec,s``        (with the error term; ``x_s`` itself if nothing changed)
    ``out_s = dec_s(f')``                     (``error_term=False``)

The features are known once the last site has run, and an edit must act at the first. So edits act on the features of an
earlier run, whose values are handed over: :class:`given_run`. Reads need one run: they are recorded when all sites have run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.between_sites import Feed, Inbox
from mmhooks.hooks.program import Op, describe_tensor
from mmhooks.hooks.splice import Attachment, HeadStep

_GIVEN: ContextVar[Mapping[str, Tensor] | None] = ContextVar("mmhooks_given_run", default=None)


@runtime_checkable
class CrossLike(Protocol):
    """What a head across sites has besides :class:`~mmhooks.hooks.splice.HeadLike`: the sites' widths, and ``join``, which
    makes one row of their vectors; ``W_dec`` and ``decode`` hold the sites one behind another."""

    widths: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor: ...


class given_run:
    """A block in which edits of a crosscoder act on the features of an earlier run.

    Args:
        cache: the values of that run at all sites of the crosscoder, as a cache holds them.

    >>> import mmhooks as mm, torch
    >>> model, head = mm.load("mini"), mm.Crosscoder(384, 64, k=4, widths=(192, 192))
    >>> sites = ["image.blocks.1.resid_post", "image.blocks.2.resid_post"]
    >>> images = torch.randn(2, 3, 64, 64)
    >>> _ = model.attach(head, at=sites)
    >>> with model.caching(sites) as cache:
    ...     before = model.encode_image(images)
    >>> with given_run(cache), model.hooks(mask=range(64)):
    ...     after = model.encode_image(images)
    >>> torch.equal(before, after)
    False
    """

    def __init__(self, cache: Mapping[str, Tensor]) -> None:
        self.cache = cache
        self._tokens: list[Token[Any]] = []

    def __enter__(self) -> None:
        self._tokens.append(_GIVEN.set(self.cache))

    def __exit__(self, *_: object) -> None:
        _GIVEN.reset(self._tokens.pop())


def _given_rows(attachment: Attachment) -> Tensor:
    """The joined vectors of the given run.

    Raises:
        MMHooksError: no run was given, or one without a site.
    """
    names = [site.name for site in attachment.sources]
    given = _GIVEN.get()
    if given is None:
        raise MMHooksError(
            f"head {attachment.name!r} reads {', '.join(names)}: its features are known once all have run, and an edit acts "
            "at the first; run the model once in `with model.caching(sites) as cache`, then edit in "
            "`with mmhooks.given_run(cache), model.hooks(...)`"
        )
    missing = [name for name in names if name not in given]
    if missing:
        raise MMHooksError(
            f"head {attachment.name!r}: expected a run with values at {', '.join(names)}, got one without "
            f"{', '.join(missing)}; cache all of its sites"
        )
    return attachment.head.join([site.vectors_last(given[site.name]) for site in attachment.sources])


class CrossStep(HeadStep):
    """Edits of one site by a head across sites, and reads there in the same context."""

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        self.part = self.attachment.sources.index(self.site)

    def seal(self) -> None:
        super().seal()
        self.active_only = False

    def _check(self, x: Tensor) -> None:
        width = self.head.widths[self.part]
        if x.shape[-1] != width:
            raise ShapeMismatch(
                f"head {self.attachment.name!r} has width {width} at {self.site.name!r}, which carries {describe_tensor(x)}; "
                "attach it where it was trained, with its sites in their order"
            )

    def _run(self, x: Tensor) -> Tensor:
        rows = _given_rows(self.attachment)
        if rows.shape[:-1] != x.shape[:-1] or rows.device != x.device:
            raise ShapeMismatch(
                f"head {self.attachment.name!r} at {self.site.name!r}: expected the inputs of the given run, got "
                f"{describe_tensor(x)} for features of {describe_tensor(rows)}; cache the run of these inputs"
            )
        before, after = self._encode(rows)
        after, change = self._latents(before, after)
        whole = not self.attachment.error_term and bool(self.edits)
        recon = x
        if self.ops["recon"] or self.ops["error"] or whole:
            recon = self._own(self.head.decode(after)).to(x.dtype)
            self._read(self.ops["recon"], recon)
            own = recon if after is before else self._own(self.head.decode(before)).to(x.dtype)
            self._read(self.ops["error"], x - own)
        if not self.attachment.splice:
            return x
        if whole:
            return recon
        return x if change is None else x + self._own(change).to(x.dtype)

    def _own(self, joined: Tensor) -> Tensor:
        return joined.split(self.head.widths, dim=-1)[self.part]


class Collector:
    """Reads of a head across sites in one context: recorded once all of its sites have run."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment, self.ops = attachment, list[Op]()
        self.inboxes = [Inbox(site, attachment.sources[-1]) for site in attachment.sources]

    @property
    def detached(self) -> bool:
        return all(op.detached for op in self.ops)

    def feeds(self) -> list[Feed]:
        return [_CollectorFeed(inbox, self) for inbox in self.inboxes]

    def arrive(self, inbox: Inbox, value: Tensor) -> None:
        """Takes the value of one site.

        Raises:
            MMHooksError: the site ran twice before the others ran: which of its vectors belong to theirs is not known.
        """
        if inbox.holds:
            missing = [other.source.name for other in self.inboxes if not other.holds]
            raise MMHooksError(
                f"head {self.attachment.name!r} reads several sites together: {inbox.source.name!r} ran twice before "
                f"{', '.join(missing)}; run all of them on one batch before the next"
            )
        inbox.put(value)
        missing = [other.source.name for other in self.inboxes if not other.holds]
        for op in self.ops:
            op.binding.hint = f"of the sites that the head reads together, {', '.join(missing)} did not run"
        if not missing:
            values = [other.get() for other in self.inboxes]
            for other in self.inboxes:
                other.clear()
            self._record(values)

    def _record(self, values: list[Tensor]) -> None:
        head = self.attachment.head
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            rows = head.join(values)
            f = head.encode(rows)
            back = head.decode(f).split(head.widths, dim=-1)
            for op in self.ops:
                op.binding.fired = True
                leaf, part = op.target.leaf, self.attachment.sources.index(op.target.site)  # type: ignore[arg-type]
                if leaf in ("pre", "latents"):
                    op.act(head.pre(rows) if leaf == "pre" else f)
                else:
                    recon = back[part].to(values[part].dtype)
                    op.act(recon if leaf == "recon" else values[part] - recon)


class _CollectorFeed(Feed):
    def __init__(self, inbox: Inbox, collector: Collector) -> None:
        super().__init__(inbox, detached=collector.detached)
        self.collector = collector

    def __call__(self, raw: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() == -1:  # not when checkpointing recomputes what was read already
            self.collector.arrive(self.inbox, raw if self.view is None else self.view.show(raw))
        return raw


def check_cross_edit(attachment: Attachment, leaf: str) -> None:
    """Raises :class:`MMHooksError` for an edit of a reconstruction or an error of a head across sites."""
    where = f"{attachment.site.name}.{attachment.name}"
    if len(attachment.sources) > 1 and leaf in ("recon", "error"):
        raise MMHooksError(f"{where}.{leaf} can be read but not edited; edit {where}.latents")


def check_cross_gradient(attachment: Attachment, leaf: str) -> None:
    """Raises :class:`MMHooksError` for a backward hook at a place of a head across sites."""
    if len(attachment.sources) > 1:
        raise MMHooksError(
            f"{attachment.site.name}.{attachment.name}.{leaf}: the features of a head across sites are computed beside the "
            "model's flow, so no gradient passes through them; cache them with detach=False, or hook a site that it reads"
        )
