"""The state of a training run: one step, the end of an epoch, saving and loading of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import NotFinite
from mmhooks.heads.base import Head
from mmhooks.heads.training.checkpoint import Fingerprint, load_checkpoint, save_checkpoint
from mmhooks.heads.training.objective import Objective, StepLoss
from mmhooks.heads.training.processes import Processes
from mmhooks.heads.vectors import Vectors


@dataclass
class Run:
    """A training run. The fields from ``step`` on are stored in a checkpoint, with head, Adam and ``silent``."""

    head: Head
    objective: Objective
    adam: torch.optim.Optimizer
    image: Vectors
    text: Vectors | None
    per_epoch: int
    total: int
    seed: int
    processes: Processes
    precision: str
    silent: Tensor  # pairs seen since each feature last fired
    compute: Callable[..., StepLoss]  # the objective's loss, or its compiled form
    step: int = 0
    stopped: bool = False
    best: float = math.inf
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    best_state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bare = self.head.bare()  # rows are already normalised here, and possibly centred

    def dead(self) -> Bool[Tensor, " n"]:
        return self.silent > self.objective.dead_after * len(self.image)

    def order(self) -> Int[Tensor, " pairs"]:
        """The order of pairs in this epoch, a function of the seed and the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step // self.per_epoch)
        return torch.randperm(len(self.image), generator=generator)

    def advance(self, rows: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Makes one optimiser step on these pairs; returns the loss and its parts."""
        mine = self.processes.part_of(rows)
        image, text = self.image[mine], None if self.text is None else self.text[mine]
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, fired, parts = self.compute(self.bare, image, text, self.dead())
        # Not at every step on a GPU, where this check synchronises with the device.
        if (loss.device.type == "cpu" or self.step % 50 == 0) and not bool(torch.isfinite(loss)):
            raise NotFinite(
                f"the loss became {float(loss)} at step {self.step} (epoch {self.step // self.per_epoch}); "
                "lower lr, or check the data's scale; the last checkpoint is intact"
            )
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average_(p.grad for p in self.head.parameters())
        self.objective.before_step(self.head)
        self.adam.step()
        self.objective.after_step(self.head)
        self.processes.average_(self.head.buffers())
        self.silent += len(rows)
        self.silent[self.processes.any(fired)] = 0
        self.step += 1
        return {"loss": loss.detach(), **parts}

    def numbers(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """The numbers of a step for the progress bar."""
        return {k: float(v) for k, v in parts.items()} | {"dead": float(self.dead().float().mean())}

    def end_epoch(
        self, parts: dict[str, Tensor], held_out: tuple[Tensor, Tensor | None] | None, patience: int | None
    ) -> None:
        """Appends a row to the history; with ``patience``, keeps the best weights and decides whether to stop."""
        epoch = self.step // self.per_epoch
        row = {
            "epoch": float(epoch),
            **{k: float(self.processes.mean(v.float())) for k, v in parts.items()},
            "silent": float(self.dead().float().mean()),
        }
        self.head.eval()
        if held_out is not None:
            row |= {f"valid_{k}": v for k, v in self.objective.score(self.head, *held_out).items()}
        self.head.train()
        if patience is not None:
            if row["valid_score"] < self.best:
                self.best, self.best_epoch = row["valid_score"], epoch
                self.best_state = {k: v.detach().clone() for k, v in self.head.state_dict().items()}
            self.stopped = epoch - self.best_epoch >= patience
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        dead = self.dead()
        done = self.step / self.total
        if again := self.objective.after_epoch(
            self.head, self.adam, dead, epoch, done, self.sample, generator
        ):
            row["resampled"] = float(again)
            self.silent[dead] = 0
            self.processes.broadcast_(self.head)
        self.history.append(row)

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """A fixed sample of the training pairs."""
        return self.image.sample(4096), None if self.text is None else self.text.sample(4096)

    def store(self, path: Path, fingerprint: Fingerprint) -> None:
        if self.processes.is_main:
            extra = {"silent": self.silent} | {f"best.{k}": v for k, v in self.best_state.items()}
            meta: dict[str, Any] = {
                "fingerprint": fingerprint,
                "step": self.step,
                "stopped": self.stopped,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "history": self.history,
            }
            save_checkpoint(path, self.head, self.adam, extra, meta)
        self.processes.wait()

    def resume(self, path: Path, fingerprint: Fingerprint) -> None:
        extra, meta = load_checkpoint(path, self.head, self.adam, fingerprint)
        self.silent = extra.pop("silent").to(self.silent.device)
        self.best_state = {k.removeprefix("best."): v.to(self.silent.device) for k, v in extra.items()}
        self.step, self.stopped, self.history = meta["step"], meta["stopped"], meta["history"]
        self.best, self.best_epoch = meta["best"], meta["best_epoch"]
