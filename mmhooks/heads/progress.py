"""A progress bar with numbers beside it, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[int, dict[str, float]], None]


@contextmanager
def training_bar(label: str, total: int, *, shown: bool) -> Iterator[Update]:
    """Yields ``update(done, numbers)``; the bar goes to stderr, so that stdout stays for results."""
    if not shown:
        yield lambda done, numbers: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, numbers="")

        def update(done: int, numbers: dict[str, float]) -> None:
            progress.update(
                task, completed=done, numbers="  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            )

        yield update
