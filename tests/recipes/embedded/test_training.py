"""Shared steps of the trainings: plans, rates, running averages, and losses that are not finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from embedded import training
from embedded.clip.train import Plan
from torch import nn


def test_one_folder_holds_one_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    training.keep_plan(Plan(), path)
    training.keep_plan(Plan(), path)
    with pytest.raises(typer.BadParameter, match="seed"):
        training.keep_plan(Plan(seed=1), path)
    training.keep_plan(Plan(steps=5), path, changeable=("steps",))
    with pytest.raises(typer.BadParameter, match="another plan.*lr"):
        training.keep_plan(replace(Plan(steps=5), lr=1.0), path, changeable=("steps",))


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="got nan at step 3"):
        training.optimise(model(torch.ones(1, 2)).sum() * torch.nan, model.parameters(), optimizer, 3)
    assert torch.equal(model.weight, before)
    training.optimise(model(torch.ones(1, 2)).sum(), model.parameters(), optimizer, 3)
    assert not torch.equal(model.weight, before)


def test_the_average_moves_fast_at_first_and_slowly_later() -> None:
    for step, keep in ((1, 2 / 11), (10_000, 0.99)):
        average = {"w": torch.zeros(3)}
        training.update_average(average, {"w": torch.ones(3)}, 0.99, step)
        torch.testing.assert_close(average["w"], torch.full((3,), 1 - keep))


def test_words_have_a_group_of_their_own() -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 2), "out": nn.Linear(2, 2)})
    groups = training.parameter_groups(
        model.named_parameters(), "embed_tokens.weight", weight_decay=0.1, word_lr=0.5
    )
    assert [len(g["params"]) for g in groups] == [1, 1, 1]
    assert groups[2]["params"][0] is model["embed_tokens"].weight
    assert [(g["weight_decay"], g["share"]) for g in groups] == [(0.1, 1.0), (0.0, 1.0), (0.0, 0.5)]
