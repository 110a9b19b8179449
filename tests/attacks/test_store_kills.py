"""SIGKILL at any moment of writing and merging, and two writers at once: never a wrong row, never one lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

from mmhooks.data.store.check import verify
from mmhooks.data.store.store import Store
from mmhooks.errors import StoreError

sys.path.insert(0, str(Path(__file__).parent))
from store_writing import bytes_of, write


def test_kills(tmp_path, rounds):
    n = rounds(16)
    command = [sys.executable, str(Path(__file__).with_name("store_writing.py")), str(tmp_path), str(n), "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    report = json.loads(done.stdout)
    print(report)
    assert report["kills"] >= n // 2
    assert (report["wrong"], report["residue"], report["lost"]) == (0, 0, 0)


def _race(folder: Path, start: object, refused: list[int] | None = None) -> None:
    start.wait()  # type: ignore[attr-defined]
    try:
        write(folder)
    except StoreError as fault:
        assert "being written by" in str(fault)


def test_writers_that_race(tmp_path, rounds):
    write(tmp_path / "whole")
    whole = bytes_of(tmp_path / "whole")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for number in range(rounds(4)):
            out, start = tmp_path / f"t{number}", threading.Barrier(4)
            threads = [threading.Thread(target=_race, args=(out, start)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert verify(out) == [] and bytes_of(out) == whole and len(Store(out)) == 57
    finally:
        sys.setswitchinterval(before)
    spawn = multiprocessing.get_context("spawn")
    for number in range(max(1, rounds(1) // 20)):
        out, start = tmp_path / f"p{number}", spawn.Barrier(2)
        processes = [spawn.Process(target=_race, args=(out, start)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert verify(out) == [] and bytes_of(out) == whole
