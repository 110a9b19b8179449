"""Checkpoints of the recipes' trainings: damaged ones and those of other runs are refused, whole ones give the same bits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from embedded import checkpoints
from safetensors.torch import save_file
from torch import nn

from mmhooks.errors import DamagedFile, MMHooksError


def trainer(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def started(seed: int = 0, data: float = 0.0, frozen: bool = False, **plan) -> str:
    model = trainer(seed)[0]
    model.bias.requires_grad_(not frozen)
    return checkpoints.starting_point({"steps": 4} | plan, [model], [{"name": "cat"}], torch.zeros(9) + data)


def write(path: Path) -> dict[str, torch.Tensor]:
    model, optimizer = trainer()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    checkpoints.save_checkpoint(path, 1, {"model": model.state_dict()}, optimizer, started())
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_every_part_of_the_start_decides(tmp_path) -> None:
    path = tmp_path / "c.safetensors"
    state = write(path)
    step, parts = checkpoints.load_checkpoint(path, trainer()[1], started())
    assert step == 1 and all(torch.equal(parts["model"][k], v) for k, v in state.items())
    for other in (
        started(seed=1),
        started(seed=2),
        started(data=1e-7),
        started(frozen=True),
        started(steps=5),
    ):
        with pytest.raises(MMHooksError, match=r"c\.safetensors is of a run with another plan"):
            checkpoints.load_checkpoint(path, trainer()[1], other)


def test_damaged_files_are_refused_or_the_same(tmp_path) -> None:
    path, rng = tmp_path / "c.safetensors", random.Random(0)
    state = write(path)
    whole = path.read_bytes()
    refused = 0
    for i in range(60):
        bad = bytearray(whole)
        if i % 3 == 0:
            bad = bad[: rng.randrange(len(bad))]
        else:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            step, parts = checkpoints.load_checkpoint(path, trainer()[1], started())
        except DamagedFile as error:
            assert path.name in str(error)
            refused += 1
        else:
            assert step == 1 and all(torch.equal(parts["model"][k], v) for k, v in state.items())
    assert refused > 40


def test_stages_of_a_run_that_went_on_from_others(tmp_path: Path) -> None:
    for name, initialise, done in (("a", "mini", 3), ("b", "a", 5)):
        run = tmp_path / name
        run.mkdir()
        (run / "plan.json").write_text(json.dumps({"start": initialise, "steps": 9}))
        save_file({"average.x": torch.zeros(1)}, run / "checkpoint.safetensors", {"step": str(done)})
        rows = [
            {"step": step, "loss": 0.0} for step in (2, done, 8)
        ]  # 8: past the checkpoint, not in the weights
        (run / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chain = checkpoints.stages(tmp_path / "b")
    assert [(s.plan["start"], s.steps) for s in chain] == [("mini", 3), ("a", 5)]
    assert [row["step"] for row in checkpoints.joined_curve(chain)] == [2, 3, 5, 8]


def test_one_part_is_read_with_the_step(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    state = write(path)
    step, part = checkpoints.read_part(path, "model")
    assert step == 1 and set(part) == set(state)
    assert all(torch.equal(part[k], v) for k, v in state.items())
