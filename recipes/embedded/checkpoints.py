"""Checkpoints of the trainings: one safetensors file with every part, the optimiser's state and the step.

A checkpoint keeps the digest of its own content and that of what its run started from (plan, starting weights, data):
a damaged one and one of another run are refused, so a resumed run ends with the bits of an unbroken one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.utils.digest import digest
from mmhooks.utils.files import atomic_path
from mmhooks.utils.tensors import digest_of, metadata_of, read_safetensors

Parts = dict[str, dict[str, Tensor]]


def starting_point(plan: Mapping[str, Any], modules: Sequence[nn.Module], *data: Any) -> str:
    """The digest of what decides a run: its plan, the weights it starts from, which of them learn, all its data."""
    weights = [(m.state_dict(), {k: p.requires_grad for k, p in m.named_parameters()}) for m in modules]
    return digest(dict(plan), [[dict(state), trained] for state, trained in weights], *data)


def save_checkpoint(
    path: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    started: str,
) -> None:
    """Writes everything aside, then renames: a kill leaves the old checkpoint or the new one."""
    tensors = {f"{part}.{name}": value for part, named in parts.items() for name, value in named.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    about = {"step": str(step), "started": started}
    with atomic_path(path) as aside:
        save_file(tensors, aside, about | {"digest": digest_of(about, tensors)})


def load_checkpoint(path: Path, optimizer: torch.optim.Optimizer, started: str) -> tuple[int, Parts]:
    """The step and the parts; the optimiser is restored in place.

    Raises:
        DamagedFile: its content is not what was written. MMHooksError: it is of a run that started otherwise.
    """
    tensors, about = read_safetensors(path), metadata_of(path)
    if digest_of({k: about.get(k) for k in ("step", "started")}, tensors) != about.get("digest"):
        found = (
            "other content than its digest says"
            if "digest" in about
            else "no digest, as before they were kept"
        )
        raise DamagedFile(f"{path}: expected a whole checkpoint, got {found}; delete it to start anew")
    if about["started"] != started:
        raise MMHooksError(
            f"{path} is of a run with another plan, other starting weights or other data; choose another --out, or "
            "delete it to start anew"
        )
    parts: Parts = {}
    for key, value in tensors.items():
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
    return int(about["step"]), parts


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
