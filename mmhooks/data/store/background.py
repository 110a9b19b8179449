"""A background thread that writes while the next batches are computed."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Calls ``act`` for every item put into its queue, in order, in a separate thread; a context manager.

    At most ``depth`` items wait. An exception in ``act`` is raised by ``put`` or at the end of the block. If the block
    raises, waiting items are dropped.
    """

    def __init__(self, act: Callable[[T], None], *, depth: int = 8) -> None:
        self._act = act
        self._items: Queue[T | None] = Queue(depth)
        self._stop = Event()
        self._fault: BaseException | None = None
        self._thread = Thread(target=self._run, name="mmhooks-writer", daemon=True)

    def __enter__(self) -> Background[T]:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        self._push(item)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._stop.set()
        elif self._fault is None:
            self._push(None)
        self._thread.join()
        if error is None and self._fault is not None:
            raise self._fault

    def _push(self, item: T | None) -> None:
        while True:
            if self._fault is not None:
                raise self._fault
            try:
                return self._items.put(item, timeout=0.2)
            except Full:
                continue

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                item = self._items.get(timeout=0.2)
            except Empty:
                continue
            if item is None:
                return
            try:
                self._act(item)
            except BaseException as fault:
                self._fault = fault
                return
