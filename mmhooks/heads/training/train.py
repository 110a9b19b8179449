"""The training loop for heads of every kind; what differs between kinds is in the objective.

Batch ``i`` of epoch ``e`` depends only on the seed, and the learning rate only on the step, so a checkpoint needs no
generator state and a resumed run is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.data.windows import Windows
from mmhooks.errors import MMHooksError
from mmhooks.heads.base import Head
from mmhooks.heads.crosscoder import Crosscoder
from mmhooks.heads.ncl import NCL
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.training.checkpoint import Fingerprint, clear_leftovers, fingerprint, rows_hash
from mmhooks.heads.training.crosscoder_objective import CrosscoderObjective
from mmhooks.heads.training.feeds import START, Feed, StreamFeed, TableFeed, is_stream, names_in, tables_of
from mmhooks.heads.training.ncl_objective import NCLObjective
from mmhooks.heads.training.objective import Objective
from mmhooks.heads.training.processes import Processes
from mmhooks.heads.training.progress import tensorboard as tensorboard_log
from mmhooks.heads.training.progress import training_bar
from mmhooks.heads.training.run import Pace, Run, run_all
from mmhooks.heads.training.sae_objective import SAEObjective
from mmhooks.heads.training.schedule import Schedule
from mmhooks.heads.training.transcoder_objective import TranscoderObjective
from mmhooks.heads.transcoder import Transcoder
from mmhooks.heads.vectors import SITES, as_vectors, training_rows


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


@dataclass(frozen=True, eq=False)
class HeadJob:
    """A head to train, and what of its training differs from the others' in one pass (:func:`train_heads`).

    Attributes:
        head: trained in place.
        sites: one or two; default: those of the call.
        lr, objective, valid, checkpoint: as in :func:`train_head`.
    """

    head: Head
    sites: Sequence[str] | None = None
    lr: float | None = None
    objective: Objective | None = None
    valid: Any = None
    checkpoint: str | Path | None = None


def train_head(
    head: Head,
    image: Any,
    text: Any = None,
    *,
    sites: Sequence[str] = SITES,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    schedule: Schedule = "linear",
    warmup: float = 0.05,
    decay: float = 0.5,
    weight_decay: float = 0.0,
    seed: int = 0,
    windows: Windows | None = None,
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
            whose ``sites`` are read as needed and never held in memory at once; or a stream (:func:`mmhooks.stream`),
            which runs the model while the head trains. From a stream, what is computed over all rows (variance, start,
            thresholds) is computed over the first 65,536.
        epochs: passes over the rows, by default 60.
        steps: instead of ``epochs``, of a stream that does not know its length.
        batch_size, lr: by default the objective's (SAE: 256 and 2e-3, NCL: 512 and 1e-3).
        schedule: how the learning rate decreases: "linear", "cosine", or "constant" (not at all).
        windows: shuffle rows of a table by windows, as a stream with these ``windows`` does: then a head trained from the
            store is bit for bit that trained from the stream, if the model's activations are. A stream has its own.
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
    job = HeadJob(head, sites, lr, objective, valid, checkpoint)
    return train_heads(
        [job], image, text, sites=sites, epochs=epochs, steps=steps, batch_size=batch_size, schedule=schedule,
        warmup=warmup, decay=decay, weight_decay=weight_decay, seed=seed, windows=windows, patience=patience,
        checkpoint_every=checkpoint_every, precision=precision, compile=compile, tensorboard=tensorboard,
        progress=progress,
    )[0]  # fmt: skip


@torch.enable_grad()
def train_heads(
    heads: Sequence[Head | HeadJob],
    image: Any,
    text: Any = None,
    *,
    sites: Sequence[str] = SITES,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    schedule: Schedule = "linear",
    warmup: float = 0.05,
    decay: float = 0.5,
    weight_decay: float = 0.0,
    seed: int = 0,
    windows: Windows | None = None,
    patience: int | None = None,
    checkpoint_every: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    compile: bool = False,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> list[TrainResult]:
    """Trains several heads in one pass over the data: each batch is read, or computed by a stream, once for all of them.

    Every head ends with the bits that :func:`train_head` alone would give it. Heads may differ in kind, width, K, start,
    objective, learning rate and sites.

    Args:
        heads: or :class:`HeadJob` s, where something differs between them.
        image, text: as in :func:`train_head`.
        batch_size: of all; by default the objectives', if these agree.
        tensorboard: a folder, in which each of several heads gets one of its own.
        sites, epochs, steps, schedule, warmup, decay: as in :func:`train_head`, the same for all.
        weight_decay, seed, windows, patience, checkpoint_every, precision, compile, progress: likewise.

    Raises:
        MMHooksError: no head, one head twice, objectives that disagree on the batch size; as :func:`train_head`.

    >>> from mmhooks.heads import TopKSAE, train_heads
    >>> x = torch.randn(256, 8)
    >>> heads = [TopKSAE(8, 32, k=k) for k in (2, 4)]
    >>> [result.steps for result in train_heads(heads, x, epochs=2, batch_size=64, progress=False)]
    [8, 8]
    """
    jobs = [job if isinstance(job, HeadJob) else HeadJob(job) for job in heads]
    _check_jobs(jobs, patience)
    objectives = [job.objective or default_objective(job.head) for job in jobs]
    processes = Processes(jobs[0].head)
    for job, objective in zip(jobs, objectives, strict=True):
        if processes.size > 1 and not objective.shares_batches:
            raise MMHooksError(
                f"{type(objective).__name__} compares all pairs of a batch, of which each of {processes.size} processes "
                "would see only a part; train this head in one process"
            )
        job.head.to(processes.device)
    size = batch_size or _common_batch_size(objectives)
    asked = [job.sites or sites for job in jobs]
    feed, named = _feed(image, text, asked, size, seed, processes, steps, windows)
    size = min(size, feed.rows)
    processes.check_batch(size)
    total = steps or (60 if epochs is None else epochs) * feed.per_epoch
    settings = {
        "epochs": 60 if epochs is None else epochs,
        **({"steps": steps} if steps is not None else {}),
        "batch": size,
        "schedule": [schedule, warmup, decay],
        "weight_decay": weight_decay,
        "seed": seed,
        **({"windows": asdict(windows)} if windows is not None else {}),
        "patience": patience,
        "numerics": [precision, compile, processes.size, processes.device.type],
        "pairs": feed.rows,
    }
    runs, began = [], time.perf_counter()
    for job, objective, names in zip(jobs, objectives, named, strict=True):
        lr = objective.default_lr if job.lr is None else job.lr
        held_out = _held_out(job.head, job.valid, names, processes.device)
        # The loss's constants are part of a run from its first line on: an option that does not apply raises here.
        objective.across = processes.mean
        mark = {} if job.checkpoint is None else _mark(job, objective, lr, settings, feed, names, held_out)
        objective.measure(*feed.tables(names, job.head))
        groups = [
            {"params": [p], "lr_factor": objective.lr_scale(job.head, name)}
            for name, p in job.head.named_parameters()
        ]
        adam = torch.optim.Adam(groups, lr=lr, eps=6.25e-10, weight_decay=weight_decay, fused=True)
        silent = torch.zeros(job.head.n_features, dtype=torch.long, device=processes.device)
        compute = torch.compile(objective.loss) if compile else objective.loss
        path = None if job.checkpoint is None else Path(job.checkpoint)
        run = Run(
            job.head, objective, adam, feed, names, total, seed, processes, precision, silent, compute,
            lr=lr, held_out=held_out, path=path, mark=mark,
        )  # fmt: skip
        if path is not None and processes.is_main:
            clear_leftovers(path)
        if path is not None and path.exists():
            run.resume()
        else:
            objective.start(job.head, *run.first(START))
            processes.broadcast_(job.head)
        job.head.train()
        runs.append(run)
    pace = Pace(schedule, warmup, decay, patience, checkpoint_every)
    name = runs[0].head.name if len(runs) == 1 else f"{len(runs)} heads"
    with ExitStack() as held:
        begin = min(run.step for run in runs)
        shown = progress and processes.is_main
        show = held.enter_context(training_bar(f"training {name}", total, shown=shown, begin=begin))
        logs = [
            held.enter_context(tensorboard_log(folder if processes.is_main else None, begin=run.step))
            for run, folder in zip(runs, _log_folders(tensorboard, len(runs)), strict=True)
        ]
        run_all(runs, feed, pace, show, logs)
    results = []
    for run in runs:
        if run.best_state:
            run.head.load_state_dict(run.best_state)
        run.objective.finish(run.head, *run.tables())
        run.head.eval()
        seconds = time.perf_counter() - began
        results.append(TrainResult(run.head, len(run.history), run.step, run.stopped, seconds, run.history))
    return results


def _feed(
    image: Any,
    text: Any,
    asked: Sequence[Sequence[str]],
    size: int,
    seed: int,
    processes: Processes,
    steps: int | None,
    windows: Windows | None,
) -> tuple[Feed, list[tuple[str, ...]]]:
    """The feed, and the names of each head's rows in it."""
    if is_stream(image):
        if text is not None or windows is not None:
            raise MMHooksError(
                "a stream deals both modalities, in windows of its own: expected no text= and no windows="
            )
        named = [names_in(image, wanted) for wanted in asked]
        return StreamFeed(image, sorted({n for names in named for n in names}), size, processes, steps), named
    if steps is not None:
        raise MMHooksError("steps= is for a stream that does not know its length: expected epochs=")
    tables, named, runs = tables_of(image, text, asked)
    return TableFeed(tables, size, seed, processes, windows, runs), named


def _mark(
    job: HeadJob,
    objective: Objective,
    lr: float,
    settings: Mapping[str, Any],
    feed: Feed,
    names: Sequence[str],
    held_out: tuple[Tensor, Tensor | None] | None,
) -> Fingerprint:
    """What the run's checkpoint belongs to."""
    about = {
        "kind": job.head.kind,
        "config": job.head.config(),
        "lr": lr,
        "objective": [type(objective).__name__, objective.settings()],
        **settings,
    }
    data = {what: feed.digest(name) for what, name in zip(("images", "texts"), names, strict=False)}
    for what, rows in zip(("held-out images", "held-out texts"), held_out or (), strict=False):
        if rows is not None:
            data[what] = rows_hash(rows)
    return fingerprint(about, job.head, data)


def _check_jobs(jobs: Sequence[HeadJob], patience: int | None) -> None:
    if not jobs:
        raise MMHooksError("expected at least one head to train, got none")
    if len({id(job.head) for job in jobs}) < len(jobs):
        raise MMHooksError("expected every head once, got one twice; train a copy")
    paths = [str(job.checkpoint) for job in jobs if job.checkpoint is not None]
    if len(set(paths)) < len(paths):
        raise MMHooksError("expected a checkpoint of its own for each head, got a path twice")
    for job in jobs:
        _check_gradients(job.head)
        if patience is not None and job.valid is None:
            raise MMHooksError("early stopping (patience=) needs held-out pairs: pass valid=(image, text)")


def _common_batch_size(objectives: Sequence[Objective]) -> int:
    sizes = {objective.default_batch_size for objective in objectives}
    if len(sizes) > 1:
        raise MMHooksError(
            f"heads whose objectives take batches of {sorted(sizes)} rows: expected batch_size="
        )
    return sizes.pop()


def _log_folders(folder: str | Path | None, count: int) -> list[Path | None]:
    if folder is None or count == 1:
        return [None if folder is None else Path(folder)] * count
    return [Path(folder) / f"{i:02d}" for i in range(count)]


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
