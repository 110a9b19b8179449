"""Training a head on embeddings: one loop for every kind, what differs is the objective's.

Batch ``i`` of epoch ``e`` is a function of the seed alone, the learning rate of the step alone; so a
checkpoint needs no generator state and a resumed run is bit-identical to an unbroken one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, NotFinite, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.heads.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from mmhooks.heads.ncl import NCL
from mmhooks.heads.ncl_objective import NCLObjective
from mmhooks.heads.objective import Objective
from mmhooks.heads.progress import training_bar
from mmhooks.heads.sae import SAE
from mmhooks.heads.sae_objective import SAEObjective


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train_head` did: the head (trained in place) and one ``history`` row an epoch."""

    head: Head = field(repr=False)
    epochs: int
    steps: int
    stopped_early: bool
    seconds: float
    history: list[dict[str, float]] = field(repr=False)

    @property
    def last(self) -> dict[str, float]:
        """The numbers of the last epoch."""
        return self.history[-1] if self.history else {}


@dataclass
class _Run:
    """A training under way. The second half of its fields is what a checkpoint holds, with head and Adam."""

    head: Head
    objective: Objective
    adam: torch.optim.Optimizer
    image: Tensor
    text: Tensor | None
    per_epoch: int
    silent: Tensor  # pairs seen since each feature last fired
    step: int = 0
    stopped: bool = False
    best: float = math.inf
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)
    best_state: dict[str, Tensor] = field(default_factory=dict)

    def dead(self) -> Bool[Tensor, " n"]:
        return self.silent > self.objective.dead_after * len(self.image)

    def advance(self, rows: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """One optimiser step on these pairs; returns the parts of the loss."""
        text = None if self.text is None else self.text[rows]
        loss, fired, parts = self.objective.loss(self.head, self.image[rows], text, self.dead())
        # Elsewhere than on a CPU this test would wait for the device at every step.
        if (loss.device.type == "cpu" or self.step % 50 == 0) and not bool(torch.isfinite(loss)):
            raise NotFinite(
                f"the loss became {float(loss)} at step {self.step} (epoch {self.step // self.per_epoch}); "
                "lower lr, or look at the data's scale; the last checkpoint is intact"
            )
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.objective.before_step(self.head)
        self.adam.step()
        self.objective.after_step(self.head)
        self.silent += len(rows)
        self.silent[fired] = 0
        self.step += 1
        return parts

    def end_epoch(
        self, parts: dict[str, Tensor], held_out: tuple[Tensor, Tensor | None] | None, patience: int | None
    ) -> None:
        """A row for the history; with ``patience``, keeps the best weights and decides whether to go on."""
        row = {
            "epoch": float(self.step // self.per_epoch),
            **{k: float(v) for k, v in parts.items()},
            "silent": float(self.dead().float().mean()),
        }
        if held_out is not None:
            row |= {f"valid_{k}": v for k, v in self.objective.score(self.head, *held_out).items()}
        self.history.append(row)
        if patience is None:
            return
        if row["valid_score"] < self.best:
            self.best, self.best_epoch = row["valid_score"], len(self.history)
            self.best_state = {k: v.detach().clone() for k, v in self.head.state_dict().items()}
        self.stopped = len(self.history) - self.best_epoch >= patience

    def store(self, path: Path, mark: str) -> None:
        extra = {"silent": self.silent} | {f"best.{k}": v for k, v in self.best_state.items()}
        save_checkpoint(
            path,
            self.head,
            self.adam,
            extra,
            {
                "fingerprint": mark,
                "step": self.step,
                "stopped": self.stopped,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "history": self.history,
            },
        )

    def resume(self, path: Path, mark: str) -> None:
        extra, meta = load_checkpoint(path, self.head, self.adam, mark)
        self.silent = extra.pop("silent").to(self.silent.device)
        self.best_state = {k.removeprefix("best."): v.to(self.silent.device) for k, v in extra.items()}
        self.step, self.stopped, self.history = meta["step"], meta["stopped"], meta["history"]
        self.best, self.best_epoch = meta["best"], meta["best_epoch"]


def train_head(
    head: Head,
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "_ d"] | None = None,
    *,
    epochs: int = 60,
    batch_size: int | None = None,
    lr: float | None = None,
    warmup: float = 0.05,
    decay: float = 0.5,
    weight_decay: float = 0.0,
    seed: int = 0,
    valid: tuple[Float[Tensor, "_ d"], Float[Tensor, "_ d"] | None] | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    objective: Objective | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains ``head`` in place on paired embeddings (rows of ``image`` and ``text`` belong together).

    Vectors are given unit norm where the head expects it. Adam with eps 6.25e-10; the learning rate rises
    over the first ``warmup`` of all steps, and falls linearly to zero over the last ``decay`` of them.

    Args:
        batch_size, lr: by default the objective's (SAE: 256 and 2e-3, NCL: 512 and 1e-3).
        valid: held-out pairs, scored after every epoch.
        patience: stop after so many epochs without a better held-out score, and keep the best weights.
        checkpoint: a file; written after every epoch, and every ``checkpoint_every`` steps inside one, and
            resumed from when it is there: the run ends with the same bits as an unbroken one.
        objective: options of the loss; by default the one that fits the head.

    Raises:
        ShapeMismatch: width other than the head's, or modalities of different length.
        NotFinite: NaN in the data (with the row), or a loss that became NaN.
        MMHooksError: a checkpoint of another training; settings that make no sense.

    >>> from mmhooks.heads import TopKSAE, train_head
    >>> x = torch.randn(256, 8)
    >>> train_head(TopKSAE(8, 32, k=4), x, x, epochs=2, batch_size=64, progress=False).steps
    8
    """
    objective = objective or default_objective(head)
    if patience is not None and valid is None:
        raise MMHooksError("early stopping (patience=) watches held-out pairs: pass valid=(image, text)")
    device = next(head.parameters()).device
    image, text = _ready(head, image, text, device)
    held_out = _ready(head, *valid, device) if valid is not None else None
    batch = min(batch_size or objective.default_batch_size, len(image))
    lr = objective.default_lr if lr is None else lr
    per_epoch = len(image) // batch
    total = epochs * per_epoch
    mark = fingerprint(
        {
            "kind": head.kind,
            "config": head.config(),
            "epochs": epochs,
            "batch": batch,
            "lr": lr,
            "warmup": warmup,
            "decay": decay,
            "weight_decay": weight_decay,
            "seed": seed,
            "patience": patience,
            "objective": [type(objective).__name__, objective.settings()],
        },
        (image, text, *(held_out or ())),
    )
    adam = torch.optim.Adam(head.parameters(), lr=lr, eps=6.25e-10, weight_decay=weight_decay, fused=True)
    silent = torch.zeros(head.n_features, dtype=torch.long, device=device)
    run = _Run(head, objective, adam, image, text, per_epoch, silent)
    path = Path(checkpoint) if checkpoint is not None else None
    objective.measure(image, text)
    if path is not None and path.exists():
        run.resume(path, mark)
    else:
        objective.start(head, image, text)

    began, parts = time.perf_counter(), {}
    head.train()
    with training_bar(f"training {head.name}", total, shown=progress) as show:
        while run.step < total and not run.stopped:
            order = _order(seed, run.step // per_epoch, len(image)).to(device)
            for i in range(run.step % per_epoch, per_epoch):
                for group in adam.param_groups:
                    group["lr"] = lr * _schedule(run.step, total, warmup, decay)
                parts = run.advance(order[i * batch : (i + 1) * batch])
                if run.step % 10 == 0:
                    show(run.step, {k: float(v) for k, v in parts.items()})
                if path and checkpoint_every and run.step % checkpoint_every == 0 and i + 1 < per_epoch:
                    run.store(path, mark)
            run.end_epoch(parts, held_out, patience)
            if path:
                run.store(path, mark)
    if run.best_state:
        head.load_state_dict(run.best_state)
    objective.finish(head, image, text)
    head.eval()
    return TrainResult(
        head, len(run.history), run.step, run.stopped, time.perf_counter() - began, run.history
    )


def default_objective(head: Head) -> Objective:
    """The objective that fits the kind of head, with its default options."""
    if isinstance(head, NCL):
        return NCLObjective()
    if isinstance(head, SAE):
        return SAEObjective()
    raise MMHooksError(f"no objective is known for a {type(head).__name__}: pass objective=")


def _ready(
    head: Head, image: Tensor, text: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    if text is not None and len(text) != len(image):
        raise ShapeMismatch(f"image and text are pairs, row by row: came {len(image)} and {len(text)} rows")
    if len(image) < 2:
        raise ShapeMismatch(f"training needs at least 2 pairs, came {len(image)}")
    vectors = head.prepare(image.detach().to(device, torch.float32))
    return vectors, None if text is None else head.prepare(text.detach().to(device, torch.float32))


def _order(seed: int, epoch: int, n: int) -> Int[Tensor, " n"]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _schedule(step: int, total: int, warmup: float, decay: float) -> float:
    up = (step + 1) / max(1.0, warmup * total)
    down = (total - step) / max(1.0, decay * total)
    return min(1.0, up, down)
