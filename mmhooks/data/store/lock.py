"""One writer per store: a lock file that the system releases when its process ends."""

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
from mmhooks.utils.files import explain_os_errors

LOCK_FILE = ".lock"
# Process, device and inode of a folder: names may be links, and a fork is another process.
Place = tuple[int, int, int]
_HELD: set[Place] = set()  # a process can acquire its own record locks again, so it must remember them
_GUARD = threading.Lock()


class Lock:
    """The lock of the thread that writes to ``folder``; a context manager.

    A POSIX record lock, which ends with its process and is not inherited by workers, so the lock of a killed process is
    taken over. The file also names process and host, for the message and for file systems on which another machine's
    lock is not visible. Within a process the lock is first taken in memory: record locks do not distinguish threads,
    and closing the file anywhere in the process would release the lock.

    Raises:
        StoreError: (on entry) another process or thread writes to this folder.
        CannotWrite: (on entry) the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / LOCK_FILE
        self._handle = -1
        self._place: Place | None = None

    def __enter__(self) -> Lock:
        about = self._path.parent.stat()
        place = (os.getpid(), about.st_dev, about.st_ino)
        with _GUARD:
            if place in _HELD:
                raise StoreError(
                    f"{self._path.parent} is already being written by this process; wait for it to end"
                )
            _HELD.add(place)
        self._place = place
        try:
            while self._handle < 0:
                self._take()
        except BaseException:
            self._release()
            raise
        return self

    def _take(self) -> None:
        with explain_os_errors(self._path):
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._handle = handle if self._lock(handle) else -1
        finally:
            if self._handle < 0:
                os.close(handle)

    def _lock(self, handle: int) -> bool:
        """Whether the lock was acquired; False if the last holder has just removed the file, to try again."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno not in (errno.EACCES, errno.EAGAIN):
                raise StoreError(
                    f"{self._path.parent}: its file system cannot lock files ({fault.strerror}), so two writers would "
                    "not notice each other; extract into a folder on another file system"
                ) from fault
            raise StoreError(
                f"{self._path.parent} is being written by {_describe_writer(_content(handle))}; wait for it to end, or choose "
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
                f"{self._path.parent} was last written by {_describe_writer(before)}, which cannot be checked from this "
                f"machine; if that process has ended, delete {self._path}"
            )
        with explain_os_errors(self._path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return True

    def __exit__(self, *_: object) -> None:
        with suppress(
            OSError
        ):  # if the folder has become read-only, closing the handle still releases the lock
            self._path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = -1
        self._release()

    def _release(self) -> None:
        with _GUARD:
            _HELD.discard(self._place)  # type: ignore[arg-type]


def _content(handle: int) -> dict[str, Any]:
    """The holder's process and host; empty if it was killed before writing them, or the file is damaged."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and {"pid", "host"} <= found.keys() else {}


def _describe_writer(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on {content['host']}" if content else "another process"
