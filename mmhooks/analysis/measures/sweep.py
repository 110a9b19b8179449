"""Many heads on the same vectors: what K, width, kind and seed buy, in one table."""

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

from mmhooks.analysis.measures.embed_sim import embed_sim
from mmhooks.analysis.measures.mds import MDS
from mmhooks.analysis.results import Records, Result, plain
from mmhooks.errors import MMHooksError
from mmhooks.heads.base import Head
from mmhooks.heads.reconstruction import reconstruction
from mmhooks.heads.sae.batchtopk import BatchTopKSAE
from mmhooks.heads.sae.jumprelu import JumpReLUSAE
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

VARIANTS = ("topk", "batchtopk", "matryoshka", "jumprelu")
"""Kinds that K steers: the first three by construction, JumpReLU by its target L0."""


@dataclass(frozen=True)
class SweepResult(Result):
    """One row a run, in the order of the grid.

    Attributes:
        rows: ``variant, n, K, seed``; on held-out pairs ``L0``, ``FVU`` (mean of the modalities), ``FVU image``,
            ``FVU text``; ``dead`` (fires for no pair, training or held out); ``MDS mu``, ``MDS sigma`` and the
            group sizes; ``EmbedSim image``, ``EmbedSim text``; ``pareto``; ``seconds``, ``head`` (its id).
        settings: of training, as they were given.
        judge: whose vectors EmbedSim compares: "given", or "own" (the vectors the head reads: then it says
            how tight a feature's samples lie in that space, not that anyone else finds them alike).
        pairs: trained on, and held out.
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
    """A fresh head of a variant and the objective that trains it. ``options`` are the objective's."""
    given: dict[str, Any] = dict(options or {})
    if variant == "jumprelu":
        return JumpReLUSAE(d, n, seed=seed), SAEObjective(**{**given, "target_l0": float(k)})
    kinds = {"topk": TopKSAE, "batchtopk": BatchTopKSAE, "matryoshka": MatryoshkaSAE}
    if variant not in kinds:
        raise MMHooksError(f"no variant {variant!r} to sweep over K; there are {', '.join(VARIANTS)}")
    return kinds[variant](d, n, k, seed=seed), SAEObjective(**given)


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
    """Trains a head for every combination and measures it on held-out pairs.

    A finished run is a JSON file and a head under ``out``, and is not repeated; an unfinished one goes on from its
    checkpoint, with the bits an unbroken one would have. So a killed sweep is started again with the same call, and
    a larger grid reuses what is there. ``out/sweep.json`` and ``out/sweep.md`` hold the table.

    Args:
        data, text: a tensor pair, a Store, or the directory of one, as for ``train_head``.
        k, n, variants, seeds: the grid. A K above n is left out.
        valid: held-out pairs; by default every tenth pair, which then is not trained on.
        judge: vectors of the held-out images and texts by independent models, for EmbedSim.
        objective: options of ``SAEObjective``, the same for all runs.
        top: EmbedSim's m.

    Raises:
        MMHooksError: an unknown variant, an empty grid, one modality only, or an ``out`` that holds runs of other
            data or settings.

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
            f"an empty grid: variants {list(variants)}, n {list(n)}, K {list(k)}, seeds {list(seeds)}"
        )
    image, text = training_rows(data, text, sites)
    if text is None:
        raise MMHooksError("a sweep compares modalities: it needs image rows and text rows")
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
    for variant, *_ in grid:
        make_head(
            variant, 4, 4, 1, 0, objective
        )  # a misspelt name or option speaks up before hours of training
    tables = [rows_hash(x) for x in (*train, *held_out, *(judge or ()))]  # every row decides
    mark = digest_of(settings | {"judge": judged, "rows": tables}, {})
    out = Path(out)
    rows = []
    for variant, width, active, seed in track(grid, len(grid), "sweep", show=progress):
        name = f"{variant}-n{width}-k{active}-seed{seed}"
        row = _finished(out / "runs" / f"{name}.json", mark)
        if row is None:
            head, loss = make_head(variant, train[0].shape[1], width, active, seed, objective)
            began = time.perf_counter()
            checkpoint = out / "checkpoints" / f"{name}.safetensors"
            train_head(
                head, *train, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, objective=loss,
                checkpoint=checkpoint, progress=False,
            )  # fmt: skip
            head.info = {"sweep": name, "settings": settings}
            head.save(out / "heads" / name)
            place = {"variant": variant, "n": width, "K": active, "seed": seed}
            row = place | measure(head, train, held_out, judge or held_out, top)
            row |= {"seconds": time.perf_counter() - began, "head": head.id}
            _write(out / "runs" / f"{name}.json", {"fingerprint": mark, "row": plain(row)})
            checkpoint.unlink(missing_ok=True)
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    best = pareto(torch.tensor([[row["L0"], row["FVU"]] for row in rows], dtype=torch.float64))
    rows = [row | {"pareto": bool(flag)} for row, flag in zip(rows, best, strict=True)]
    result = SweepResult(rows, settings, judged, (len(train[0]), len(held_out[0])))
    result.save(out / "sweep.json")
    write_text(out / "sweep.md", result.table().markdown() + "\n")
    return result


@torch.no_grad()
def measure(
    head: Head,
    train: tuple[Any, Any],
    held_out: tuple[Float[Tensor, "p d"], Float[Tensor, "p2 d"]],
    judge: tuple[Float[Tensor, "p e"], Float[Tensor, "p2 f"]],
    top: int = 20,
) -> dict[str, Any]:
    """The numbers of one row: fidelity, modality and interpretability of ``head`` on held-out pairs."""
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
    """Which points no other point beats in one number and equals or beats in the other; less is better.

    >>> pareto(torch.tensor([[1.0, 3.0], [2.0, 2.0], [2.0, 4.0]])).tolist()
    [True, True, False]
    """
    no_worse = (points[None] <= points[:, None]).all(dim=2)
    better = (points[None] < points[:, None]).any(dim=2)
    return ~(no_worse & better).any(dim=1)


def _finished(path: Path, mark: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = read_json(
        path, "a finished run of a sweep", {"fingerprint": str, "row": dict}, remedy="delete it and the run is made again"
    )  # fmt: skip
    if content["fingerprint"] != mark:
        raise MMHooksError(
            f"{path} is a run on other data or with other settings (fingerprint {content['fingerprint']}, this "
            f"sweep's {mark}); choose another out=, or delete that folder"
        )
    return content["row"]


def _write(path: Path, content: dict[str, Any]) -> None:
    make_folder(path.parent)
    write_text(path, json.dumps(content, indent=1) + "\n")
