"""Kills the training of two heads over a stream at random moments and goes on; prints what came of it as JSON.

A process of its own with one thread, so that it can fork: ``python kill_streams.py FOLDER KILLS SEED``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny import folder_of_pairs, tiny_clip

import mmhooks as mm
from mmhooks.heads import load_head_dir

SITE = "image.blocks.1.resid_post"


def equal(one: Path, other: Path) -> bool:
    """Whether two saved heads have the same bits; the order of metadata in their files is safetensors' own."""
    heads = [load_head_dir(folder).state_dict() for folder in (one, other)]
    return all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


def main(base: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    pairs = mm.data.pairs(folder_of_pairs(base / "pairs", 60), progress=False)
    model = tiny_clip()

    def train(out: Path) -> None:
        stream = mm.stream(model, pairs, SITE, tokens="patch", buffer=64, batch_size=4, workers=0)
        jobs = [mm.HeadJob(mm.TopKSAE(32, 48, k), checkpoint=out / f"{k}.safetensors") for k in (3, 6)]
        results = mm.train_heads(
            jobs, stream, sites=(SITE,), epochs=6, batch_size=16, checkpoint_every=2, progress=False
        )
        for result in results:
            result.head.save(out / f"head-{result.head.k}")

    def killed(out: Path, after: float | None) -> bool:
        """Whether the child was killed before it was done."""
        child = os.fork()
        if child == 0:
            train(out)
            os._exit(0)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    train(base / "warm")  # imports and first calls
    start = time.perf_counter()
    train(base / "whole")
    seconds = time.perf_counter() - start
    rng, count, report = random.Random(seed), 0, []
    while count < kills:
        out, here = base / f"round-{len(report)}", 0
        while count < kills and killed(out, rng.random() * seconds):
            here, count = here + 1, count + 1
        train(out)
        same = all(equal(out / f"head-{k}", base / "whole" / f"head-{k}") for k in (3, 6))
        report.append({"kills": here, "same": same})
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
