"""Kills extractions at random moments and finishes them again; prints what came of it as JSON.

A process of its own with one thread, so that it can fork: ``python kill_extractions.py FOLDER ROUNDS SEED``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tiny import bytes_of, folder_of_pairs, tiny_clip

import mmhooks as mm
from mmhooks.data.store.writer import finished
from mmhooks.heads import TopKSAE


def main(base: Path, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    pairs = mm.data.pairs(folder_of_pairs(base / "pairs", 240), progress=False)
    model = tiny_clip()
    model.attach(TopKSAE(24, 96, k=8), at=["image.embed", "text.embed"])

    def extract(out: Path, workers: int) -> None:
        sites = ["*.embed", "*.sae.latents"]
        mm.extract(model, pairs, sites, out, batch_size=8, shard_rows=16, workers=workers, progress=False)

    def forked(out: Path, workers: int, kill_after: float | None) -> bool:
        """Whether the child was killed before it was done."""
        child = os.fork()
        if child == 0:
            extract(out, workers)
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    extract(base / "whole", 0)
    whole = bytes_of(base / "whole")
    start = time.perf_counter()
    forked(base / "timed", 0, None)
    seconds = time.perf_counter() - start
    rng = random.Random(seed)
    report = []
    for number in range(rounds):
        out, workers = base / f"round-{number}", int(number % 10 == 9)
        kills = 0
        while kills < 1 + (number % 3 == 0):  # every third is killed again while it resumes
            if forked(out, workers, rng.random() * seconds * (2 if workers else 1)):
                kills += 1
            else:  # it was done before that moment: another one
                shutil.rmtree(out)
        began = (out / "manifest.json").exists()
        shards = len(finished(out)) if began else 0
        left = [p.name for p in out.glob(".*")] if out.exists() else []
        extract(out, workers)
        report.append({"kills": kills, "shards": shards, "left": left, "same": bytes_of(out) == whole})
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
