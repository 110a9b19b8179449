"""Checkpoints of the recipes' trainings: damaged ones and those of other runs are refused, whole ones give the same bits."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from embedded import checkpoints

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
    path, dice = tmp_path / "c.safetensors", random.Random(0)
    state = write(path)
    whole = path.read_bytes()
    refused = 0
    for i in range(60):
        bad = bytearray(whole)
        if i % 3 == 0:
            bad = bad[: dice.randrange(len(bad))]
        else:
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        try:
            step, parts = checkpoints.load_checkpoint(path, trainer()[1], started())
        except DamagedFile as error:
            assert path.name in str(error)
            refused += 1
        else:
            assert step == 1 and all(torch.equal(parts["model"][k], v) for k, v in state.items())
    assert refused > 40
