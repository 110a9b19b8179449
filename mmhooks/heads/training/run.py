"""The state of a training run: one step, the end of an epoch, saving and loading of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.errors import NotFinite
from mmhooks.heads.base import Head
from mmhooks.heads.training.checkpoint import Fingerprint, load_checkpoint, save_checkpoint
from mmhooks.heads.training.feeds import Batch, Feed, TableFeed
from mmhooks.heads.training.objective import Objective, StepLoss
from mmhooks.heads.training.processes import Processes
from mmhooks.heads.training.progress import Update
from mmhooks.heads.training.schedule import Schedule, lr_factor
from mmhooks.heads.vectors import Rows, evenly_spaced


@dataclass
class Run:
    """A training run. The fields from ``step`` on are stored in a checkpoint, with head, Adam and ``silent``."""

    head: Head
    objective: Objective
    adam: torch.optim.Optimizer
    feed: Feed
    sites: tuple[str, ...]
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
    lr: float = 0.0
    held_out: tuple[Tensor, Tensor | None] | None = None
    path: Path | None = None  # of the checkpoint
    mark: Fingerprint = field(default_factory=dict)  # what the checkpoint belongs to
    fed: Any = None  # of a resumed run: where its feed was

    def __post_init__(self) -> None:
        self.checked = isinstance(self.feed, TableFeed)
        self.bare = self.head.bare()  # rows are already normalised here, and possibly centred

    def dead(self) -> Bool[Tensor, " n"]:
        return self.silent > self.objective.dead_after * self.feed.rows

    def tables(self) -> tuple[Rows, Rows | None]:
        """The rows of both sites as the head sees them, for what is computed over all of them."""
        return self.feed.tables(self.sites, self.head)

    def _vectors(self, batch: Batch) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"] | None]:
        """A batch as the head sees it."""
        found = []
        for site in self.sites:
            rows = batch[site].to(self.processes.device, torch.float32)
            # A table's rows were checked before the first step.
            found.append(self.head.scaled(rows)[0] if self.checked else self.head.prepare(rows))
        return found[0], found[1] if len(found) > 1 else None

    def advance(self, batch: Batch) -> dict[str, Tensor]:
        """Makes one optimiser step on these rows; returns the loss and its parts."""
        image, text = self._vectors(batch)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, fired, parts = self.compute(self.bare, image, text, self.dead())
        # Not at every step on a GPU, where this check synchronises with the device.
        if (loss.device.type == "cpu" or self.step % 50 == 0) and not bool(torch.isfinite(loss)):
            raise NotFinite(
                f"the loss became {float(loss)} at step {self.step} (epoch {self.step // self.feed.per_epoch}); "
                "lower lr, or check the data's scale; the last checkpoint is intact"
            )
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average_(p.grad for p in self.head.parameters())
        self.objective.before_step(self.head)
        self.adam.step()
        self.objective.after_step(self.head)
        self.processes.average_(self.head.buffers())
        self.silent += len(image) * self.processes.size
        self.silent[self.processes.any(fired)] = 0
        self.step += 1
        return {"loss": loss.detach(), **parts}

    def numbers(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """The numbers of a step for the progress bar."""
        return {k: float(v) for k, v in parts.items()} | {"dead": float(self.dead().float().mean())}

    def end_epoch(self, parts: dict[str, Tensor], patience: int | None) -> None:
        """Appends a row to the history; with ``patience``, keeps the best weights and decides whether to stop."""
        epoch = self.step // self.feed.per_epoch
        row = {
            "epoch": float(epoch),
            **{k: float(self.processes.mean(v.float())) for k, v in parts.items()},
            "silent": float(self.dead().float().mean()),
        }
        self.head.eval()
        if self.held_out is not None:
            row |= {f"valid_{k}": v for k, v in self.objective.score(self.head, *self.held_out).items()}
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
        return self.first(4096)

    def first(self, most: int) -> tuple[Tensor, Tensor | None]:
        """Evenly spaced training rows, about as many."""
        image, text = self.tables()
        return evenly_spaced(image, most), None if text is None else evenly_spaced(text, most)

    def store(self) -> None:
        """Writes the checkpoint, if the run has one."""
        if self.path is None:
            return
        if self.processes.is_main:
            extra = {"silent": self.silent} | {f"best.{k}": v for k, v in self.best_state.items()}
            meta: dict[str, Any] = {
                "fingerprint": self.mark,
                "step": self.step,
                "stopped": self.stopped,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "history": self.history,
                "feed": self.feed.state,
            }
            save_checkpoint(self.path, self.head, self.adam, extra, meta)
        self.processes.wait()

    def resume(self) -> None:
        """Goes on from the checkpoint."""
        assert self.path is not None
        extra, meta = load_checkpoint(self.path, self.head, self.adam, self.mark)
        self.silent = extra.pop("silent").to(self.silent.device)
        self.best_state = {k.removeprefix("best."): v.to(self.silent.device) for k, v in extra.items()}
        self.step, self.stopped, self.history = meta["step"], meta["stopped"], meta["history"]
        self.best, self.best_epoch = meta["best"], meta["best_epoch"]
        self.fed = meta.get("feed")


@dataclass(frozen=True)
class Pace:
    """How the learning rate changes, when a run stops early, and how often it is stored within an epoch."""

    schedule: Schedule
    warmup: float
    decay: float
    patience: int | None
    checkpoint_every: int | None

    def lr_factor(self, step: int, total: int) -> float:
        """The learning rate at a step, relative to its peak."""
        return lr_factor(self.schedule, step, total, self.warmup, self.decay)


def run_all(
    runs: Sequence[Run], feed: Feed, pace: Pace, show: Update, logs: Sequence[Callable[..., None]]
) -> None:
    """Trains every run to its end, each batch for all of them; a run that is ahead waits for the others' steps."""
    going = [run for run in runs if not run.stopped]
    if not going:
        return
    last = min(going, key=lambda run: run.step)
    step, total = last.step, last.total
    if step % feed.per_epoch:
        feed.restore(last.fed)
    parts: list[dict[str, Tensor]] = [{} for _ in runs]
    while step < total and not all(run.stopped for run in runs):
        for batch in feed.batches(step // feed.per_epoch, step % feed.per_epoch):
            factor = pace.lr_factor(step, total)
            for i, run in enumerate(runs):
                if run.step == step and not run.stopped:
                    for group in run.adam.param_groups:
                        group["lr"] = run.lr * group["lr_factor"] * factor
                    parts[i] = run.advance(batch)
                    if run.step % 10 == 0:
                        numbers = run.numbers(parts[i])
                        if i == 0:
                            show(run.step, numbers)
                        logs[i](run.step, numbers | {"lr": run.lr * factor})
            step += 1
            every = pace.checkpoint_every
            if every and step % every == 0 and step % feed.per_epoch:
                for run in runs:
                    if run.step == step and not run.stopped:
                        run.store()
        for i, run in enumerate(runs):
            if run.step == step and not run.stopped and len(run.history) < step // feed.per_epoch:
                run.end_epoch(parts[i], pace.patience)
                logs[i](run.step, {f"epoch/{k}": v for k, v in run.history[-1].items()})
                run.store()
