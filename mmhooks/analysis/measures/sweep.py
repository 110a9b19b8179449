"""Sweep: trains a grid of heads on the same vectors and compares them by K, width, variant and seed in one table."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.analysis.inputs.checks import check_finite, check_numbers, check_shapes, unit_rows
from mmhooks.analysis.measures.embed_sim import embed_sim
from mmhooks.analysis.measures.mds import MDS
from mmhooks.analysis.results import Records, Result, plain
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.heads.reconstruction import reconstruction
from mmhooks.heads.sae.archetypal import ArchetypalSAE
from mmhooks.heads.sae.batchtopk import BatchTopKSAE
from mmhooks.heads.sae.jumprelu import JumpReLUSAE
from mmhooks.heads.sae.matching_pursuit import MatchingPursuitSAE
from mmhooks.heads.sae.matryoshka import MatryoshkaSAE
from mmhooks.heads.sae.topk import TopKSAE
from mmhooks.heads.training.checkpoint import rows_hash
from mmhooks.heads.training.sae_objective import SAEObjective
from mmhooks.heads.training.train import train_head
from mmhooks.heads.vectors import SITES, hold_out_every_tenth, training_rows
from mmhooks.utils.files import make_folder, write_text
from mmhooks.utils.json_files import read_json
from mmhooks.utils.progress import track
from mmhooks.utils.tensors import digest_of

KINDS = {
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka": MatryoshkaSAE,
    "matching_pursuit": MatchingPursuitSAE,
    "archetypal": ArchetypalSAE,
}
VARIANTS = (*KINDS, "jumprelu")
"""Variants whose sparsity K sets: the first three by construction, JumpReLU by its target L0."""


@dataclass(frozen=True)
class SweepResult(Result):
    """One row per run, in the order of the grid.

    Attributes:
        rows: ``variant, n, K, seed``; on held-out pairs ``L0``, ``FVU`` (mean of the modalities), ``FVU image``,
            ``FVU text``; ``dead`` (fires for no pair, training or held-out); ``MDS mu``, ``MDS sigma`` and the
            group sizes; ``EmbedSim image``, ``EmbedSim text``; ``pareto``; ``seconds``, ``head`` (its id).
        settings: the training settings, as given.
        judge: the vectors that EmbedSim compares: "given", or "own" (the vectors the head reads; EmbedSim then says
            how close a feature's samples lie in that space, not that another model finds them similar).
        pairs: number of training pairs and of held-out pairs.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(repr=False)
    judge: str
    pairs: tuple[int, int]

    def table(self) -> Records:
        return Records(self.rows)


def make_head(
    variant: str, d: int, n: int, k: int, seed: int, options: dict[str, Any] | None = None
) -> tuple[Head, SAEObjective]:
    """Makes an untrained head of a variant and its training objective; ``options`` are the objective's."""
    given: dict[str, Any] = dict(options or {})
    if variant == "jumprelu":
        return JumpReLUSAE(d, n, seed=seed), SAEObjective(**{**given, "target_l0": float(k)})
    if variant not in KINDS:
        raise MMHooksError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    return KINDS[variant](d, n, k, seed=seed), SAEObjective(**given)


def sweep(
    data: Any,
    text: Float[Tensor, "_ d"] | None = None,
    *,
    out: str | Path,
    k: Sequence[int] = (16, 32, 64),
    n: Sequence[int] = (1024,),
    variants: Sequence[str] = ("topk",),
    seeds: Sequence[int] = (0,),
    valid: tuple[Float[Tensor, "_ d"], Float[Tensor, "_ d"]] | None = None,
    judge: tuple[Float[Tensor, "_ e"], Float[Tensor, "_ f"]] | None = None,
    sites: Sequence[str] = SITES,
    epochs: int = 60,
    batch_size: int | None = None,
    lr: float | None = None,
    objective: dict[str, Any] | None = None,
    top: int = 20,
    progress: bool = True,
) -> SweepResult:
    """Trains a head for every combination and evaluates it on held-out pairs.

    A finished run is a JSON file and a head under ``out`` and is not repeated. An unfinished run resumes from its
    checkpoint and ends bit-identical to an uninterrupted one. So the same call resumes a killed sweep, and a larger
    grid reuses finished runs. ``out/sweep.json`` and ``out/sweep.md`` hold the table.

    Args:
        data, text: a tensor pair, a Store, or the directory of one, as for ``train_head``.
        k, n, variants, seeds: the grid. Combinations with K above n are left out.
        valid: held-out pairs; by default every tenth pair, which is then not trained on.
        judge: vectors of the held-out images and texts by independent models, for EmbedSim.
        objective: options of ``SAEObjective``, the same for all runs.
        top: EmbedSim's m.

    Raises:
        MMHooksError: a variant is unknown, the grid is empty, there is only one modality, or ``out`` holds runs of
            other data or settings.
        ShapeMismatch: rows are not floating-point tensors, differ in shape, or there are fewer than 2 held-out pairs.
        NotFinite: a row holds NaN or infinity, or is all zeros where the head needs a direction.

    >>> import tempfile
    >>> x = torch.randn(200, 8)
    >>> done = sweep(x, x, out=tempfile.mkdtemp(), k=[2, 4], n=[32], epochs=1, progress=False)
    >>> [row["K"] for row in done.rows], done.pairs
    ([2, 4], (180, 20))
    """
    grid = [
        (variant, width, active, seed)
        for variant, width, active, seed in itertools.product(variants, n, k, seeds)
        if active <= width
    ]
    if not grid:
        raise MMHooksError(
            f"expected a grid of runs, got none: variants {list(variants)}, n {list(n)}, K {list(k)}, seeds {list(seeds)}"
        )
    if isinstance(data, (str, Path)) or hasattr(data, "sites"):
        image, text = training_rows(data, text, sites)
    else:
        check_numbers(data, "image rows")
        image = data.detach()
    if text is None:
        raise MMHooksError("a sweep: expected image rows and text rows, got only image rows")
    if isinstance(image, Tensor):
        check_numbers(text, "text rows")
        check_shapes(tuple(image.shape), tuple(text.shape), "rows")
        text = text.detach()
    train: tuple[Any, Any] = (image, text)
    held_out: tuple[Any, Any] = valid or (image, text)
    if valid is None:
        train, held_out = hold_out_every_tenth(image, text)
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "objective": objective or {},
        "top": top,
    }
    judged = "own" if judge is None else "given"
    # A misspelt name or option, or a bad held-out row, fails before hours of training.
    heads = [make_head(variant, image.shape[1], 4, 1, 0, objective)[0] for variant in variants]
    _check_held_out(heads[0], held_out, judge)
    tables = [rows_hash(x) for x in (*train, *held_out, *(judge or ()))]  # every row decides
    mark = digest_of(settings | {"judge": judged, "rows": tables}, {})
    out = Path(out)
    rows = []
    for variant, width, active, seed in track(grid, len(grid), "sweep", show=progress):
        name = f"{variant}-n{width}-k{active}-seed{seed}"
        row = _finished(out / "runs" / f"{name}.json", mark)
        if row is None:
            head, loss = make_head(variant, train[0].shape[1], width, active, seed, objective)
            begin = time.perf_counter()
            checkpoint = out / "checkpoints" / f"{name}.safetensors"
            train_head(
                head, *train, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, objective=loss,
                checkpoint=checkpoint, progress=False,
            )  # fmt: skip
            head.info = {"sweep": name, "settings": settings}
            head.save(out / "heads" / name)
            settings_of_run = {"variant": variant, "n": width, "K": active, "seed": seed}
            row = settings_of_run | evaluate_head(head, train, held_out, judge or held_out, top)
            row |= {"seconds": time.perf_counter() - begin, "head": head.id}
            _write(out / "runs" / f"{name}.json", {"fingerprint": mark, "row": plain(row)})
            checkpoint.unlink(missing_ok=True)
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    best = pareto(torch.tensor([[row["L0"], row["FVU"]] for row in rows], dtype=torch.float64))
    rows = [row | {"pareto": bool(flag)} for row, flag in zip(rows, best, strict=True)]
    result = SweepResult(rows, settings, judged, (len(train[0]), len(held_out[0])))
    result.save(out / "sweep.json")
    write_text(out / "sweep.md", result.table().markdown() + "\n")
    return result


def _check_held_out(head: Head, held_out: tuple[Any, Any], judge: tuple[Any, Any] | None) -> None:
    image, text = held_out
    for side, rows in (("image", image), ("text", text)):
        check_numbers(rows, f"held-out {side} rows")
    check_shapes(tuple(image.shape), tuple(text.shape), "held-out rows")
    if len(image) < 2:
        raise ShapeMismatch(
            f"a sweep: expected at least 2 held-out pairs, got {len(image)}; give valid=, or at least 20 pairs"
        )
    for rows in held_out:
        head.prepare(rows.float())
    for side, vectors in zip(("image", "text"), judge or (), strict=False):
        what = f"judge= of the {side} side"
        check_finite(vectors, what)
        if len(vectors) != len(image):
            raise ShapeMismatch(
                f"{what}: expected one row for each of {len(image)} held-out pairs, got {len(vectors)}"
            )
        unit_rows(vectors, what)


@torch.no_grad()
def evaluate_head(
    head: Head,
    train: tuple[Any, Any],
    held_out: tuple[Float[Tensor, "p d"], Float[Tensor, "p2 d"]],
    judge: tuple[Float[Tensor, "p e"], Float[Tensor, "p2 f"]],
    top: int = 20,
) -> dict[str, Any]:
    """Computes the numbers of one row: fidelity, modality and interpretability of ``head`` on held-out pairs."""
    one, two = (reconstruction(head, x) for x in held_out)
    fired = torch.tensor(one.counts) + torch.tensor(two.counts) > 0
    for rows in train:
        for begin in range(0, len(rows), 4096):
            fired |= (head.encode(head.prepare(rows[begin : begin + 4096].float())) > 0).any(dim=0)
    image, text = (head.encode(head.prepare(x.float())) for x in held_out)
    score = MDS(head.n_features)
    score.update(image, text)
    modality = score.result()
    return {
        "L0": (one.l0 + two.l0) / 2,
        "FVU": (one.fvu + two.fvu) / 2,
        "FVU image": one.fvu,
        "FVU text": two.fvu,
        "dead": float((~fired).double().mean()),
        "MDS mu": modality.mu,
        "MDS sigma": modality.sigma,
        **{name: int(group.mask.sum()) for name, group in zip(("ImgD", "TextD", "CrossD"), modality.groups, strict=True)},
        "EmbedSim image": embed_sim(image, judge[0], m=top).estimate.value,
        "EmbedSim text": embed_sim(text, judge[1], m=top).estimate.value,
    }  # fmt: skip


def pareto(points: Float[Tensor, "runs 2"]) -> Bool[Tensor, " runs"]:
    """Marks the Pareto-optimal points: no other point is better in one number and at least equal in the other; lower is better.

    >>> pareto(torch.tensor([[1.0, 3.0], [2.0, 2.0], [2.0, 4.0]])).tolist()
    [True, True, False]
    """
    not_worse = (points[None] <= points[:, None]).all(dim=2)
    better = (points[None] < points[:, None]).any(dim=2)
    return ~(not_worse & better).any(dim=1)


def _finished(path: Path, mark: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = read_json(
        path, "a finished run of a sweep", {"fingerprint": str, "row": dict}, remedy="delete it to run it again"
    )  # fmt: skip
    if content["fingerprint"] != mark:
        raise MMHooksError(
            f"{path}: expected a run of this sweep, with fingerprint {mark}, got one on other data or with other "
            f"settings, with fingerprint {content['fingerprint']}; choose another out=, or delete that folder"
        )
    return content["row"]


def _write(path: Path, content: dict[str, Any]) -> None:
    make_folder(path.parent)
    write_text(path, json.dumps(content, indent=1) + "\n")
