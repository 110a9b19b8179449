"""Checkpoints of the trainings: one safetensors file with every part, the optimiser's state and the step.

A checkpoint stores the digest of its own content and of everything its run started from (plan, initial weights, data).
Damaged checkpoints and those of another run are refused, so a resumed run ends with the bits of an uninterrupted one.
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
    """Returns the digest of what decides a run: its plan, initial weights, which of them are trained, and all data."""
    weights = [(m.state_dict(), {k: p.requires_grad for k, p in m.named_parameters()}) for m in modules]
    return digest(dict(plan), [[dict(state), trained] for state, trained in weights], *data)


def save_checkpoint(
    path: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    started: str,
) -> None:
    """Writes a checkpoint atomically: a kill leaves the old one or the new one."""
    tensors = {
        f"{part}.{name}": value for part, classified in parts.items() for name, value in classified.items()
    }
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    about = {"step": str(step), "started": started}
    with atomic_path(path) as aside:
        save_file(tensors, aside, about | {"digest": digest_of(about, tensors)})


def load_checkpoint(path: Path, optimizer: torch.optim.Optimizer, started: str) -> tuple[int, Parts]:
    """Returns the step and the parts; the optimiser is restored in place.

    Raises:
        DamagedFile: its content is not what was written.
        MMHooksError: it belongs to a run with another plan, other initial weights or other data.
    """
    tensors, about = read_safetensors(path), metadata_of(path)
    if digest_of({k: about.get(k) for k in ("step", "started")}, tensors) != about.get("digest"):
        found = (
            "other content than its digest says"
            if "digest" in about
            else "no digest, as in checkpoints of old versions"
        )
        raise DamagedFile(f"{path}: expected an intact checkpoint, got {found}; delete it to start again")
    if about["started"] != started:
        raise MMHooksError(
            f"{path} is of a run with another plan, other starting weights or other data; choose another --out, or "
            "delete it to start again"
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
        if value.shape == place.shape:
            # Fused AdamW walks through memory, so moments need the layout of their weights.
            value = torch.empty_like(place).copy_(value)
        state["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(state)
    return int(about["step"]), parts


def read_part(path: Path, part: str) -> tuple[int, dict[str, Tensor]]:
    """Returns the step of a checkpoint and one of its parts, such as "average", without the other tensors."""
    with safe_open(path, "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{part}.")]  # noqa: SIM118 - not a dict
        return int(file.metadata()["step"]), {
            key.removeprefix(f"{part}."): file.get_tensor(key) for key in keys
        }


@dataclass(frozen=True)
class Stage:
    """One of several runs that each continue the one before: its plan, its number of steps, the rows of its curve."""

    plan: dict[str, Any]
    steps: int
    curve: list[dict[str, Any]]


def stages(run: Path) -> list[Stage]:
    """Returns a run and all before it, the first one first; a plan's ``start`` names a sibling folder."""
    plan = json.loads((run / "plan.json").read_text())
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        steps = int(file.metadata()["step"])
    curve = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    own = Stage(plan, steps, [row for row in curve if row["step"] <= steps])
    before = run.parent / plan["start"] if plan.get("start", "") not in ("", "mini") else None
    return [*(stages(before) if before else []), own]


def joined_curve(chain: Sequence[Stage]) -> list[dict[str, Any]]:
    """Concatenates the curves of the stages, with steps counted from the first stage on."""
    rows, done = [], 0
    for stage in chain:
        rows += [row | {"step": row["step"] + done} for row in stage.curve]
        done += stage.steps
    return rows
