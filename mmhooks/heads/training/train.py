"""The training loop for heads of every kind; what differs between kinds is in the objective.

Batch ``i`` of epoch ``e`` depends only on the seed, and the learning rate only on the step, so a checkpoint needs no
generator state and a resumed run is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.base import Head
from mmhooks.heads.crosscoder import Crosscoder
from mmhooks.heads.ncl import NCL
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.training.checkpoint import clear_leftovers, fingerprint
from mmhooks.heads.training.crosscoder_objective import CrosscoderObjective
from mmhooks.heads.training.ncl_objective import NCLObjective
from mmhooks.heads.training.objective import Objective
from mmhooks.heads.training.processes import Processes
from mmhooks.heads.training.progress import tensorboard as tensorboard_log
from mmhooks.heads.training.progress import training_bar
from mmhooks.heads.training.run import Run
from mmhooks.heads.training.sae_objective import SAEObjective
from mmhooks.heads.training.schedule import Schedule, lr_factor
from mmhooks.heads.training.transcoder_objective import TranscoderObjective
from mmhooks.heads.transcoder import Transcoder
from mmhooks.heads.vectors import SITES, as_vectors, training_rows

START = 65_536  # number of pairs used for data-dependent initialisation


@dataclass(frozen=True)
class TrainResult:
    """The result of :func:`train_head`: the head (trained in place) and one ``history`` row per epoch."""

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


@torch.enable_grad()
def train_head(
    head: Head,
    image: Any,
    text: Any = None,
    *,
    sites: Sequence[str] = SITES,
    epochs: int = 60,
    batch_size: int | None = None,
    lr: float | None = None,
    schedule: Schedule = "linear",
    warmup: float = 0.05,
    decay: float = 0.5,
    weight_decay: float = 0.0,
    seed: int = 0,
    valid: Any = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    objective: Objective | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    compile: bool = False,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains ``head`` in place on paired embeddings (rows of ``image`` and ``text`` belong together).

    Vectors are given unit norm if the head expects it. Adam with eps 6.25e-10; the learning rate increases over the
    first fraction ``warmup`` of all steps, and decreases to zero over the last fraction ``decay``.

    Under ``accelerate launch`` each process takes its share of every batch; ``batch_size`` counts all processes.

    Args:
        image: ``[n, d]``, with or without ``text [n, d]``; or a ``Store`` of activations, or the directory of one,
            whose ``sites`` are read as needed and never held in memory at once.
        batch_size, lr: by default the objective's (SAE: 256 and 2e-3, NCL: 512 and 1e-3).
        schedule: how the learning rate decreases: "linear", "cosine", or "constant" (not at all).
        valid: held-out pairs, scored after every epoch: ``(image, text)``, a Store or a directory.
        patience: stop after this many epochs without a better held-out score, and keep the best weights.
        checkpoint: a file, written after every epoch and every ``checkpoint_every`` steps within one. If it exists,
            the run resumes from it and ends with the same bits as an uninterrupted one. A damaged checkpoint, or one
            of another run (other settings, starting weights or rows), is refused.
        objective: the loss and its options; by default the one for the head's kind.
        precision: "bf16" computes the large products in half precision; weights and Adam stay in single precision.
        compile: use ``torch.compile``; worthwhile where the dense step is used (a GPU).
        tensorboard: a folder for TensorBoard logs.

    Raises:
        ShapeMismatch: a width other than the head's, or modalities of different length.
        NotFinite: NaN in the data (with the row), or a loss that became NaN.
        MMHooksError: a checkpoint of another run; contradictory settings.

    >>> from mmhooks.heads import TopKSAE, train_head
    >>> x = torch.randn(256, 8)
    >>> train_head(TopKSAE(8, 32, k=4), x, x, epochs=2, batch_size=64, progress=False).steps
    8
    """
    _check_gradients(head)
    objective = objective or default_objective(head)
    if patience is not None and valid is None:
        raise MMHooksError("early stopping (patience=) needs held-out pairs: pass valid=(image, text)")
    processes = Processes(head)
    if processes.size > 1 and not objective.shares_batches:
        raise MMHooksError(
            f"{type(objective).__name__} compares all pairs of a batch, of which each of {processes.size} processes would "
            "see only a part; train this head in one process"
        )
    head.to(processes.device)
    rows = as_vectors(head, *training_rows(image, text, sites), processes.device)
    held_out = _held_out(head, valid, sites, processes.device)
    batch = min(batch_size or objective.default_batch_size, len(rows[0]))
    processes.check_batch(batch)
    lr = objective.default_lr if lr is None else lr
    per_epoch = len(rows[0]) // batch
    total = epochs * per_epoch
    path = Path(checkpoint) if checkpoint is not None else None
    mark = (
        {}
        if path is None
        else fingerprint(
            {
                "kind": head.kind,
                "config": head.config(),
                "epochs": epochs,
                "batch": batch,
                "lr": lr,
                "schedule": [schedule, warmup, decay],
                "weight_decay": weight_decay,
                "seed": seed,
                "patience": patience,
                "objective": [type(objective).__name__, objective.settings()],
                "numerics": [precision, compile, processes.size, processes.device.type],
                "pairs": len(rows[0]),
            },
            head,
            {
                "images": rows[0],
                "texts": rows[1],
                "held-out images": held_out and held_out[0],
                "held-out texts": held_out and held_out[1],
            },
        )
    )
    objective.across = processes.mean
    objective.measure(*rows)
    groups = [
        {"params": [p], "lr_factor": objective.lr_scale(head, name)} for name, p in head.named_parameters()
    ]
    adam = torch.optim.Adam(groups, lr=lr, eps=6.25e-10, weight_decay=weight_decay, fused=True)
    silent = torch.zeros(head.n_features, dtype=torch.long, device=processes.device)
    compute = torch.compile(objective.loss) if compile else objective.loss
    run = Run(head, objective, adam, *rows, per_epoch, total, seed, processes, precision, silent, compute)
    if path is not None and processes.is_main:
        clear_leftovers(path)
    if path is not None and path.exists():
        run.resume(path, mark)
    else:
        objective.start(head, rows[0].sample(START), None if rows[1] is None else rows[1].sample(START))
        processes.broadcast_(head)

    began, parts = time.perf_counter(), {}
    head.train()
    with (
        training_bar(
            f"training {head.name}", total, shown=progress and processes.is_main, begin=run.step
        ) as show,
        tensorboard_log(tensorboard if processes.is_main else None, begin=run.step) as log,
    ):
        while run.step < total and not run.stopped:
            order = run.order()
            for i in range(run.step % per_epoch, per_epoch):
                for group in adam.param_groups:
                    group["lr"] = (
                        lr * group["lr_factor"] * lr_factor(schedule, run.step, total, warmup, decay)
                    )
                parts = run.advance(order[i * batch : (i + 1) * batch])
                if run.step % 10 == 0:
                    numbers = run.numbers(parts)
                    show(run.step, numbers)
                    log(
                        run.step,
                        numbers | {"lr": lr * lr_factor(schedule, run.step - 1, total, warmup, decay)},
                    )
                if path and checkpoint_every and run.step % checkpoint_every == 0 and i + 1 < per_epoch:
                    run.store(path, mark)
            run.end_epoch(parts, held_out, patience)
            log(run.step, {f"epoch/{k}": v for k, v in run.history[-1].items()})
            if path:
                run.store(path, mark)
    if run.best_state:
        head.load_state_dict(run.best_state)
    objective.finish(head, *rows)
    head.eval()
    return TrainResult(
        head, len(run.history), run.step, run.stopped, time.perf_counter() - began, run.history
    )


def _check_gradients(head: Head) -> None:
    """Raises if the head cannot have gradients. no_grad is overridden by training; inference mode cannot be."""
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in head.parameters()):
        raise MMHooksError(
            "a head cannot be trained in torch.inference_mode(), nor if it was created there: its tensors cannot have "
            "gradients. Create it and call train_head outside of the block (torch.no_grad() is fine)"
        )
    if not any(p.requires_grad for p in head.parameters()):
        raise MMHooksError(
            f"expected a head with trainable parameters, got {head.name!r} with requires_grad=False for all of them; "
            "call head.requires_grad_(True), or set it for those to be trained"
        )


def default_objective(head: Head) -> Objective:
    """The default objective for the head's kind."""
    if isinstance(head, NCL):
        return NCLObjective()
    if isinstance(head, Crosscoder):
        return CrosscoderObjective()
    if isinstance(head, SAE):
        return SAEObjective()
    if isinstance(head, Transcoder):
        return TranscoderObjective()
    raise MMHooksError(f"there is no default objective for a {type(head).__name__}: pass objective=")


def _held_out(
    head: Head, valid: Any, sites: Sequence[str], device: torch.device
) -> tuple[Float[Tensor, "_ d"], Float[Tensor, "_ d"] | None] | None:
    """Held-out pairs, in memory."""
    if valid is None:
        return None
    pair = valid if isinstance(valid, tuple) else training_rows(valid, None, sites)
    image, text = as_vectors(head, pair[0], pair[1], device)
    return image[:], None if text is None else text[:]
