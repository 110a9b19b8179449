"""Progress of a training run: a bar with metrics, and TensorBoard logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmhooks.errors import MMHooksError
from mmhooks.utils.escape import one_line

Update = Callable[[int, dict[str, float]], None]


@contextmanager
def training_bar(label: str, total: int, *, shown: bool, begin: int = 0) -> Iterator[Update]:
    """Yields ``update(done, numbers)``; the bar is on stderr, since stdout is for results."""
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
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(one_line(label), total=total, completed=begin, numbers="")

        def update(done: int, numbers: dict[str, float]) -> None:
            progress.update(
                task, completed=done, numbers="  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            )

        yield update


@contextmanager
def tensorboard(folder: str | Path | None, *, begin: int = 0) -> Iterator[Update]:
    """Yields ``log(step, numbers)``, which writes TensorBoard scalars, or does nothing without a folder.

    ``begin`` is the step at which a resumed run continues: later entries of an earlier run are dropped.

    Raises:
        MMHooksError: the package is missing.
    """
    if folder is None:
        yield lambda step, numbers: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as fault:
        raise MMHooksError(
            f'tensorboard={str(folder)!r} needs the package: pip install "mmhooks[tensorboard]" ({fault})'
        ) from fault
    with SummaryWriter(str(folder), purge_step=begin) as writer:

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log
