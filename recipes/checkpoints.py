"""Checkpoints of the trainings: one safetensors file with every part, the optimiser's state and the step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, dict[str, Tensor]]


def save_checkpoint(
    path: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer
) -> None:
    """Writes everything aside, then renames: a kill leaves the old checkpoint or the new one."""
    tensors = {f"{part}.{name}": value for part, named in parts.items() for name, value in named.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
    aside = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, aside, {"step": str(step)})
    aside.rename(path)


def load_checkpoint(path: Path, optimizer: torch.optim.Optimizer) -> tuple[int, Parts]:
    """The step and the parts; the optimiser is restored in place."""
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    parts: Parts = {}
    for key, value in load_file(path).items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = value
    places = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    state["state"] = {}
    for key, value in parts.pop("adam", {}).items():
        number, name = key.split(".")
        place = places[int(number)]
        if value.shape == place.shape:  # fused AdamW walks through memory: moments lie as their weights do
            value = torch.empty_like(place).copy_(value)
        state["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(state)
    return step, parts


@dataclass(frozen=True)
class Stage:
    """One run of several that went on from one another: its plan, the steps it made, the rows of its curve."""

    plan: dict[str, Any]
    steps: int
    curve: list[dict[str, Any]]


def stages(run: Path) -> list[Stage]:
    """A run and all before it, the first one first: a plan's ``start`` names the folder beside its own."""
    plan = json.loads((run / "plan.json").read_text())
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        steps = int(file.metadata()["step"])
    curve = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    own = Stage(plan, steps, [row for row in curve if row["step"] <= steps])
    before = run.parent / plan["start"] if plan.get("start", "") not in ("", "mini") else None
    return [*(stages(before) if before else []), own]


def joined_curve(chain: Sequence[Stage]) -> list[dict[str, Any]]:
    """The curves of stages one after another, their steps counted through."""
    rows, done = [], 0
    for stage in chain:
        rows += [row | {"step": row["step"] + done} for row in stage.curve]
        done += stage.steps
    return rows
