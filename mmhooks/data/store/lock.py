"""One writer a store: a lock file that the system lets go when its process dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmhooks.errors import StoreError
from mmhooks.utils.files import wrapped

NAME = ".lock"
Place = tuple[
    int, int, int
]  # process, device and inode of a folder: names may be links, a fork is another process
_HELD: set[Place] = set()  # a process can take its own record locks again, so it has to remember them
_GUARD = threading.Lock()


class Lock:
    """Held by the thread that writes into ``folder``; a context manager.

    A POSIX record lock, which ends with its process and is not inherited by workers: what a killed process
    leaves behind is taken over. The file also names process and host, for the message and for file systems
    on which another machine's lock cannot be seen. Inside a process the place is taken in memory first: record
    locks do not tell its threads apart, and closing the file anywhere in the process would let the lock go.

    Raises:
        StoreError: (on entry) another process or thread writes into this folder.
        CannotWrite: (on entry) the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / NAME
        self._handle = -1
        self._place: Place | None = None

    def __enter__(self) -> Lock:
        about = self._path.parent.stat()
        place = (os.getpid(), about.st_dev, about.st_ino)
        with _GUARD:
            if place in _HELD:
                raise StoreError(
                    f"{self._path.parent} is being written by this very process; wait for it to end"
                )
            _HELD.add(place)
        self._place = place
        try:
            while self._handle < 0:
                self._take()
        except BaseException:
            self._let_go()
            raise
        return self

    def _take(self) -> None:
        with wrapped(self._path):
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._handle = handle if self._lock(handle) else -1
        finally:
            if self._handle < 0:
                os.close(handle)

    def _lock(self, handle: int) -> bool:
        """False: the file was removed by its last holder just now, try again."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno not in (errno.EACCES, errno.EAGAIN):
                raise StoreError(
                    f"{self._path.parent}: its file system cannot lock files ({fault.strerror}), so that two writers "
                    "would not see each other; extract into a folder on another one"
                ) from fault
            raise StoreError(
                f"{self._path.parent} is being written by {_spell(_content(handle))}; wait for it to end, or choose "
                "another folder"
            ) from None
        try:
            if os.fstat(handle).st_ino != self._path.stat().st_ino:
                return False
        except FileNotFoundError:
            return False
        before = _content(handle)
        if before.get("host", socket.gethostname()) != socket.gethostname():
            raise StoreError(
                f"{self._path.parent} was last written by {_spell(before)}, which this machine cannot ask; if that "
                f"process is dead, delete {self._path}"
            )
        with wrapped(self._path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return True

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a folder that became read-only: the lock still ends with its handle
            self._path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = -1
        self._let_go()

    def _let_go(self) -> None:
        with _GUARD:
            _HELD.discard(self._place)  # type: ignore[arg-type]


def _content(handle: int) -> dict[str, Any]:
    """What the holder wrote about itself; nothing where it was killed before, or the file is damaged."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and {"pid", "host"} <= found.keys() else {}


def _spell(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on {content['host']}" if content else "another process"
