"""What every training in this folder shares: learning rate, optimiser step, running average, plan file, progress bar."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mmhooks.utils.files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object  # dataclasses have no common class to check at run time


def cosine_rate(lr: float, step: int, *, steps: int, warmup: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then a cosine down to 2 % of ``lr``."""
    ramp = min(1.0, (step + 1) / warmup)
    return lr * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], words: str, *, weight_decay: float, word_lr: float
) -> list[dict[str, Any]]:
    """Groups parameters for AdamW: matrices decay, vectors do not, and the word table has its own learning rate.

    Args:
        words: name of the word table, without prefix.
        word_lr: share of the learning rate that the word table gets.
    """
    matrices, vectors, tables = [], [], []
    for name, p in named:
        is_table = name == words or name.endswith(f".{words}")
        (tables if is_table else matrices if p.ndim > 1 else vectors).append(p)
    return [{"params": matrices, "weight_decay": weight_decay, "share": 1.0},
            {"params": vectors, "weight_decay": 0.0, "share": 1.0},
            {"params": tables, "weight_decay": 0.0, "share": word_lr}]  # fmt: skip


def optimise(
    loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Takes one optimiser step, with the gradients of ``parameters`` clipped to norm 1.

    Raises:
        FloatingPointError: the loss is not finite; nothing was changed.
    """
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"expected a finite loss, got {loss.item()} at step {step}; resume from the last checkpoint, which is intact"
        )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@torch.no_grad()
def update_average(average: dict[str, Tensor], state: Mapping[str, Tensor], decay: float, step: int) -> None:
    """Moves a running average toward ``state`` after ``step`` steps, in place; early steps count more."""
    keep = min(decay, (1 + step) / (10 + step))
    for name, value in average.items():
        value.lerp_(state[name], 1 - keep)


def keep_plan(plan: DataclassInstance, path: Path, *, changeable: Collection[str] = ()) -> None:
    """Writes the plan of a run into its folder; refuses another plan, since resuming would mix two runs.

    Args:
        changeable: settings that may differ from those of the stored plan.

    Raises:
        BadParameter: the folder holds a run of another plan.
    """
    wanted = asdict(plan)
    found = json.loads(path.read_text()) if path.exists() else wanted
    differ = {k: (found.get(k), wanted.get(k)) for k in found | wanted if found.get(k) != wanted.get(k)}
    if set(differ) - set(changeable):
        raise typer.BadParameter(f"{path.parent} holds a run of another plan {differ}; choose another --out")
    write_text(path, json.dumps(wanted, indent=1) + "\n")


def progress_bar() -> Progress:
    """Returns a progress bar with a field ``note``."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"))  # fmt: skip


def small_attention() -> None:
    """Replaces fused attention by its formula while training: torch's fused CPU kernel spends half of a step in its
    backward at 33 tokens (measured: 134 against 285 samples/s on one core)."""

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1).to(v.dtype) @ v

    F.scaled_dot_product_attention = attend
