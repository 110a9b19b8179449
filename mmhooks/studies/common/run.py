"""Bookkeeping of a study's run: seconds of each step, progress bars, memory and versions."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmhooks.utils.escape import one_line, rich_text


class StepTimer:
    """Measures the seconds of each step, and shows one progress bar per step."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        # Output to a file gets a width with room for tables; a terminal's own width is used as it is.
        self.console = Console(quiet=quiet, width=None if sys.stdout.isatty() else 150)
        self.seconds: dict[str, float] = {}
        self.bars = Progress(
            TextColumn("{task.description:<34}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, disable=quiet,
        )  # fmt: skip

    def bar(self, label: str, total: int) -> Callable[[int], None]:
        task = self.bars.add_task(one_line(label), total=total)
        return lambda done: self.bars.update(task, advance=done)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        start = time.perf_counter()
        task = self.bars.add_task(one_line(label), total=1)
        yield
        self.bars.update(task, advance=1)
        self.seconds[label] = time.perf_counter() - start
        if not self.console.is_terminal:  # a log file shows no bars
            self.console.print(rich_text(f"{label}: {self.seconds[label]:.1f} s"))

    def environment(self, start: float) -> dict[str, Any]:
        """Returns :func:`environment` with the seconds of each step."""
        return environment(start) | {"steps": {k: round(v, 2) for k, v in self.seconds.items()}}


def environment(start: float) -> dict[str, Any]:
    """Returns seconds since ``start``, peak memory, threads and versions."""
    import open_clip
    import torch

    import mmhooks

    unit = 1024**3 if sys.platform == "darwin" else 1024**2
    return {
        "seconds": time.perf_counter() - start,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "mmhooks": mmhooks.__version__,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
