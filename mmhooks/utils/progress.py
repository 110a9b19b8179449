"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

from mmhooks.utils.escape import one_line

T = TypeVar("T")

EVERY = 30.0  # seconds between the lines that a log file gets, which shows no bar


def track(items: Iterable[T], total: int | None, what: str, *, show: bool = True) -> Iterator[T]:
    """Yields ``items`` while a bar shows how many of ``total`` are done and the time remaining."""
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=one_line(what))


@contextmanager
def rate_bar(
    what: str, total: int | None, *, unit: str, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(n)``; the bar shows how many are done, the rate per second, and the time remaining."""
    if not show:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {unit}/s" if speed else f"- {unit}/s")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(one_line(what), total=total)
        if bar.console.is_terminal:
            yield lambda n: bar.advance(task, n)
            return
        line = _lines(bar.console, one_line(what), total, unit)

        def advance(n: int) -> None:
            bar.advance(task, n)
            line(n)

        yield advance


def _lines(console: Any, what: str, total: int | None, unit: str) -> Callable[[int], None]:
    """Returns ``advance(n)``, which writes a line every :data:`EVERY` seconds."""
    start = last = monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = monotonic()
        if now - last < EVERY or done == total:  # the bar itself is written at the end
            return
        last = now
        rate = done / (now - start)
        left = f", {(total - done) / rate / 60:.1f} min left" if total and rate else ""
        of = f" of {total:,}" if total else ""
        line = f"{what}: {done:,}{of} {unit}, {rate:,.1f} {unit}/s{left}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return advance
