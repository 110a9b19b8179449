"""One writer a store: a lock file that the system lets go when its process dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from mmhooks.errors import StoreError

NAME = ".lock"
_HELD: set[Path] = set()  # a process can take its own record locks again, so it has to remember them


class Lock:
    """Held by the process that writes into ``folder``; a context manager.

    A POSIX record lock, which ends with its process and is not inherited by workers: what a killed process
    leaves behind is taken over. The file also names process and host, for the message and for file systems
    on which another machine's lock cannot be seen.

    Raises:
        StoreError: (on entry) another process or thread writes into this folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.resolve() / NAME
        self._handle = -1

    def __enter__(self) -> Lock:
        if self._path in _HELD:
            raise StoreError(f"{self._path.parent} is being written by this very process; wait for it to end")
        while self._handle < 0:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._handle = handle if self._lock(handle) else -1
            finally:
                if self._handle < 0:
                    os.close(handle)
        _HELD.add(self._path)
        return self

    def _lock(self, handle: int) -> bool:
        """False: the file was removed by its last holder just now, try again."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
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
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return True

    def __exit__(self, *_: object) -> None:
        _HELD.discard(self._path)
        self._path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = -1


def _content(handle: int) -> dict[str, Any]:
    try:
        return json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}


def _spell(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on {content['host']}" if content else "another process"
