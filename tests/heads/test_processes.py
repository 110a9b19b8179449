"""Training in several processes, and killed ones: each test starts real processes."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmhooks.errors import MMHooksError
from mmhooks.heads import TopKSAE, train_head
from mmhooks.heads.base import load_head_dir
from mmhooks.heads.training.processes import Processes

from .test_train import same

TOGETHER = """
import json, sys, torch
from mmhooks.errors import MMHooksError
from mmhooks.heads import NCL, TopKSAE, train_head
torch.set_num_threads(1)
from tests_conftest import paired_clouds
image, text = paired_clouds(600)
sae = TopKSAE(16, 96, 4)
with torch.no_grad():
    sae.b_enc[:24] = -0.3  # some features start dead: AuxK and the counters take part
result = train_head(sae, image, text, epochs=8, batch_size=60, lr=3e-3, valid=paired_clouds(200, seed=1),
                    checkpoint=sys.argv[1] + "/c", progress=False)
from mmhooks.heads.training.processes import Processes
if Processes.is_first_process():
    sae.save(sys.argv[1] + "/head")
    with open(sys.argv[1] + "/history.json", "w") as file:
        json.dump({"processes": Processes(sae).size, "history": result.history}, file)
try:
    train_head(NCL(16, 32), image, text, epochs=1, progress=False)
except MMHooksError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path) -> None:
    """Same global batch, same curve: within 1e-4 relative after 80 steps, where only rounding differs."""
    script = tmp_path / "train.py"
    script.write_text(TOGETHER)
    (tmp_path / "tests_conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }
    said = {}
    for name, launch in {
        "one": [sys.executable],
        # --multi_gpu with ACCELERATE_USE_CPU: torchrun and gloo. (--cpu would start a single process, without a word.)
        "two": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                "--main_process_port", str(20_000 + os.getpid() % 20_000)],
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [*launch, str(script), str(tmp_path / name)], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said[name] = done.stdout
    found = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    assert [run["processes"] for run in found] == [1, 2]
    one, two = (run["history"] for run in found)
    assert len(one) == len(two) == 8 and any("aux" in row for row in one)
    for mine, theirs in zip(two, one, strict=True):
        # the loss of the last batch is averaged over the processes' shares: the same number, added in other order
        assert mine.keys() == theirs.keys()
        for key in ("loss", "fvu", "valid_fvu_image", "valid_fvu_text"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
        assert mine["silent"] == theirs["silent"] and mine["l0"] == pytest.approx(theirs["l0"], rel=1e-3)
    heads = [load_head_dir(tmp_path / name / "head") for name in ("one", "two")]
    torch.testing.assert_close(heads[0].W_dec, heads[1].W_dec, atol=1e-3, rtol=0)
    assert "each of 2 processes would see" in said["two"] and said["one"] == ""


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch) -> None:
    processes = Processes(TopKSAE(4, 8, 2))
    assert processes.size == 1 and processes.is_main
    processes.size = 3
    with pytest.raises(MMHooksError, match="that 3 processes can split evenly, got 64 pairs.* such as 63"):
        processes.check_batch(64)
    assert [len(x) for x in torch.arange(63).chunk(3)] == [21, 21, 21]


def killed_training(checkpoint: Path, out: Path, torn: bool) -> None:
    """What the processes of the test below do; its checkpoint has 3 MB, so that writing takes part of the time."""
    from mmhooks.heads.training import checkpoint as module

    torch.set_num_threads(1)
    save = module.save_file

    def dying(tensors, path, **kwargs) -> None:
        save(tensors, path, **kwargs)
        if torn and random.random() < 0.2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_file = dying
    x = torch.randn(600, 32, generator=torch.Generator().manual_seed(5))
    sae = TopKSAE(32, 4096, 8)
    train_head(
        sae,
        x,
        x.flip(1),
        epochs=12,
        batch_size=100,
        checkpoint=checkpoint,
        checkpoint_every=2,
        progress=False,
    )
    sae.save(out)


@pytest.mark.slow
def test_twenty_sigkills_change_no_bit(tmp_path) -> None:
    """Killed 20 times, at random moments and in the middle of writing; what is resumed ends with the same bits."""
    context = multiprocessing.get_context("forkserver")  # imports torch once, not in each of the processes
    context.set_forkserver_preload(["torch", "mmhooks.heads.training.train", __name__])

    def start(name: str, torn: bool = False) -> multiprocessing.process.BaseProcess:
        process = context.Process(
            target=killed_training, args=(tmp_path / f"{name}.c", tmp_path / name, torn), daemon=True
        )
        process.start()
        return process

    def finish(name: str) -> float:
        began = time.perf_counter()
        process = start(name)
        process.join()
        assert process.exitcode == 0
        return time.perf_counter() - began

    finish("first")  # the server starts
    took = finish("whole")
    dice, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        name = f"broken{runs}"
        while kills < 20:
            process = start(name, torn=kills % 4 == 3)
            process.join(timeout=dice.random() * took / 3)
            if process.exitcode is None:
                process.kill()
                process.join()
            if process.exitcode == 0:
                break  # it came to its end between two kills
            kills += 1
        finish(name)
        assert same(load_head_dir(tmp_path / name), load_head_dir(tmp_path / "whole"))
        runs += 1
    assert not list(tmp_path.glob(".*.tmp"))  # nor is anything left of the torn files
