"""Compiles the operations of all open contexts into one program per place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mmhooks.hooks.across_sites import Collector, CrossStep
from mmhooks.hooks.between_sites import MapStep
from mmhooks.hooks.program import Capture, CaptureOp, EditOp, FunctionStep, GradOp, GradStep, Op, Program
from mmhooks.hooks.splice import HeadSite, HeadStep

Parts = tuple[list[Any], list[Any]]


def taps_of(op: Op) -> list[Any]:
    """The taps that an operation needs: its site's, and those of the sites that its head reads."""
    sources = op.target.sources if isinstance(op.target, HeadSite) else ()
    return [op.target.site.tap, *(source.tap for source in sources)]


def compile_programs(ops: list[Op]) -> dict[Any, Any]:
    """Maps each tap to its program, or for taps with several places to ``{leaf: program}``."""
    places: dict[tuple[Any, str], list[Op]] = {}
    for op in ops:
        site = op.target.site
        places.setdefault((site.tap, site.leaf), []).append(op)
    collectors: dict[Any, Collector] = {}
    parts = {place: _parts(here, collectors) for place, here in places.items()}
    steps = [step for steps, _ in parts.values() for step in steps if isinstance(step, MapStep)]
    for feed in (feed for reader in (*steps, *collectors.values()) for feed in reader.feeds()):
        source = feed.inbox.source
        parts.setdefault((source.tap, source.leaf), ([], []))[1].append(feed)
    table: dict[Any, Any] = {}
    for (tap, leaf), (steps, captures) in parts.items():
        program = _lone_capture(steps, captures) or Program(steps, captures)
        if tap.leaves:
            table.setdefault(tap, {})[leaf] = program
        else:
            table[tap] = program
    return table


def _parts(ops: list[Op], collectors: dict[Any, Collector]) -> Parts:
    """The steps of a place and what records the value that flows on after them; reads that need other places too go to
    ``collectors``."""
    steps: list[Any] = []
    captures: list[Any] = []
    grads: dict[str, list[GradOp]] = {}
    head_reads: list[Op] = []
    for op in ops:
        if isinstance(op.target, HeadSite) and not isinstance(op, EditOp):
            head_reads.append(op)
        elif isinstance(op, EditOp):
            _add_edit(steps, op)
        elif isinstance(op, GradOp):
            grads.setdefault(op.target.name, []).append(op)
        elif isinstance(op, CaptureOp):
            captures.append(Capture(op))
    for op in head_reads:
        _add_head_read(steps, op, collectors)
    steps.extend(GradStep(ops) for ops in grads.values())
    for step in steps:
        if isinstance(step, HeadStep):
            step.seal()
    return steps, captures


def _new_step(op: Op) -> HeadStep:
    assert isinstance(op.target, HeadSite)
    sources = len(op.target.sources)
    return HeadStep(op) if not sources else MapStep(op) if sources == 1 else CrossStep(op)


def _add_edit(steps: list[Any], op: EditOp) -> None:
    """Adjacent edits of one head share a single run of it."""
    last = steps[-1] if steps else None
    if not isinstance(op.target, HeadSite):
        steps.append(FunctionStep(op))
    elif isinstance(last, HeadStep) and last.fits(op.target):
        last.add(op)
    else:
        steps.append(_new_step(op))


def _add_head_read(steps: list[Any], op: Op, collectors: dict[Any, Collector]) -> None:
    """Reads of a head use its last run at this place, or a separate run if there is none."""
    run = next(
        (step for step in reversed(steps) if isinstance(step, HeadStep) and step.fits(op.target)), None
    )
    if run is not None:
        run.add(op)
    elif isinstance(op.target, HeadSite) and len(op.target.sources) > 1:
        attachment = op.target.attachment
        key = (attachment.name, id(attachment.head), attachment.sources)
        collectors.setdefault(key, Collector(attachment)).ops.append(op)
    else:
        steps.append(_new_step(op))


def _lone_capture(steps: Sequence[Any], captures: list[Any]) -> Callable[[Tensor], Tensor] | None:
    """For the most common program, a single cache at a site, the cache's own function, without any wrapper.

    When checkpointing recomputes a block, it stores the same value a second time.
    """
    if steps or len(captures) != 1 or not isinstance(captures[0], Capture):
        return None
    if not captures[0].detached or captures[0].view is not None:
        return None
    record = captures[0].record
    record.detached = True  # type: ignore[attr-defined]
    return record
