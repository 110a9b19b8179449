"""Kills writers and merges of a store by SIGKILL, then repeats them; prints what came of it as JSON.

A process of its own with one thread, so that it can fork: ``python store_writing.py FOLDER ROUNDS SEED``. Half of the
kills come at a chosen call of the system (every call that makes, writes, syncs, renames, links or removes a file),
half at a random moment.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.merge import merge
from mmhooks.data.store.store import Store
from mmhooks.data.store.writer import ShardWriter, begin, finish, finished
from mmhooks.errors import MMHooksError

SPECS = [SiteSpec("image.embed", (8,), "fp32"), SiteSpec("image.sae.latents", (96,), "fp16", sparse=4)]
CALLS = [
    (os, name)
    for name in ("open", "fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir", "pwrite")
]


def write(folder: Path, n: int = 57, first: int = 0) -> None:
    """What an extraction does with its rows, shards that are done left alone."""
    plan = {
        "model": {"name": "m", "weights": "w"},
        "sites": {spec.name: spec.to_json() for spec in SPECS},
        "data": {"name": "d", "fingerprint": str(first), "pairs": n},
        "settings": {"shard_rows": 10},
        "content": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        if begin(folder, plan, {}):
            return
        done, writer = finished(folder), ShardWriter(folder)
        for number, start in enumerate(range(0, n, 10)):
            if number in done:
                continue
            rows, rng = min(10, n - start), torch.Generator().manual_seed(first + start)
            columns = {
                "image.embed": torch.rand(rows, 8, generator=rng),
                "image.sae.latents.values": torch.rand(rows, 4, generator=rng),
                "image.sae.latents.indices": torch.rand(rows, 96, generator=rng).argsort(1)[:, :4],
            }
            writer.add([f"p{first + start + i}" for i in range(rows)], columns, {})
            writer.close(number)
        finish(folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def forked(act: Callable[[], None], *, call: int | None = None, after: float | None = None) -> bool:
    """Runs ``act`` in a child that is killed at its call number ``call``, or after some seconds; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            if call is not None:
                _kill_at(call)
            act()
        except BaseException:
            os._exit(3)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed by itself")
    return os.WIFSIGNALED(status)


def _kill_at(number: int) -> None:
    left = [number]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, counted(getattr(module, name)))
    builtins.open = counted(builtins.open)  # type: ignore[assignment]


def main(base: Path, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    parts = [base / "a", base / "b"]
    write(base / "to warm up")
    start = time.perf_counter()
    write(parts[0])
    written = time.perf_counter()
    write(parts[1], 33, 57)
    merging = time.perf_counter()
    merge(parts, base / "ab")
    # A random moment of the work: on a fast machine a fixed delay would come after its end.
    lasts = {"write": written - start, "merge": time.perf_counter() - merging}
    whole = {"write": bytes_of(base / "a"), "merge": bytes_of(base / "ab")}
    acts = {"write": write, "merge": lambda out: merge(parts, out)}
    report = {"kills": 0, "readable before the end": 0, "wrong": 0, "residue": 0, "lost": 0}
    for number in range(rounds):
        kind = ("write", "merge")[number % 2]
        act, out = acts[kind], base / "out"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        for _ in range(1 + number % 3):  # killed again while it goes on
            by_call = number % 4 < 2
            killed = forked(
                lambda act=act, out=out: act(out),
                call=rng.randrange(80) if by_call else None,
                after=None if by_call else rng.random() * lasts[kind],
            )
            report["kills"] += killed
            if killed and out.exists():
                before = {name: b for name, b in bytes_of_files(out).items() if name.endswith(".arrow")}
                report["lost"] += any(whole[kind].get(name) != b for name, b in before.items())
                try:
                    found = Store(out)
                    report["readable before the end"] += 1
                    report["wrong"] += len(found) != sum(e["rows"] for e in found.manifest["shards"])
                    report["wrong"] += any(whole[kind][n] != (out / n).read_bytes() for n in whole[kind])
                except MMHooksError:
                    pass
        act(out)
        after = bytes_of(out)
        report["residue"] += after.keys() != whole[kind].keys()
        report["wrong"] += after != whole[kind]
        report["slowest"] = round(max(report.get("slowest", 0.0), time.perf_counter() - start), 2)
    print(json.dumps(report))


def bytes_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
