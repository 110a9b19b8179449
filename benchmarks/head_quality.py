"""TopK SAEs of mmhooks and of the other libraries at equal K, n, batches, epochs and schedule: held-out FVU, dead.

    python benchmarks/head_quality.py --embeddings runs/mini.safetensors --out runs/head_quality.md

``--embeddings`` holds ``train.image, train.text, valid.image, valid.text``; where it is missing, it is made with
``--corpus`` the way recipes/embedded/heads/train.py embeds. Every library gets the same batches (images and texts of the
same pairs, stacked), Adam at the same rate and schedule, and its best rate of ``--rates`` by held-out FVU with the
first seed; the table is over ``--seeds``, on ``--judged`` pairs that are taken out of the training pairs and that no
choice, of ours or of this script, has seen. The peers get vectors of norm sqrt(d), the scale their defaults are made for (ours
unit norm; FVU does not depend on it). Dead: fires for no training and no held-out vector. Rows appear as runs end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from peers import available
from safetensors.torch import load_file, save_file

import mmhooks as mm
from mmhooks.heads.training.schedule import lr_factor

Pair = tuple[torch.Tensor, torch.Tensor]


def embeddings(path: Path, corpus: Path | None) -> dict[str, torch.Tensor]:
    if not path.exists():
        from embedded.heads.train import vectors

        assert corpus is not None, f"{path} is not there: pass --corpus to make it"
        found = vectors("mini", corpus, 0)
        image, text = found.pairs("names", "captions")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {
            "train.image": image,
            "train.text": text,
            "valid.image": found.valid_image,
            "valid.text": found.valid_text,
        }
        save_file({name: x.contiguous() for name, x in rows.items()}, path)
    return load_file(path)


def ours(n: int, k: int, lr: float, seed: int, train: Pair, batch: int, epochs: int) -> Callable[..., Any]:
    head = mm.TopKSAE(train[0].shape[1], n, k, seed=seed)
    mm.train_head(head, *train, epochs=epochs, batch_size=batch, lr=lr, seed=seed, progress=False)

    @torch.no_grad()
    def run(x: torch.Tensor) -> Pair:
        codes = head.encode(x)
        return head.decode(codes), codes > 0

    return run


def theirs(
    build: Any, n: int, k: int, lr: float, seed: int, train: Pair, batch: int, epochs: int
) -> Callable[..., Any]:
    torch.manual_seed(seed)
    scale = math.sqrt(train[0].shape[1])
    pairs = len(train[0])
    steps = pairs // batch
    peer = build(train[0].shape[1], n, k, lr, scale * torch.cat(train), steps)
    for step in range(steps * epochs):
        if step % steps == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step // steps)
            order = torch.randperm(pairs, generator=generator)
        rows = order[step % steps * batch :][:batch]
        peer.set_lr(lr * lr_factor("linear", step, steps * epochs, 0.05, 0.5))
        peer.step(scale * torch.cat([x[rows] for x in train]))

    def run(x: torch.Tensor) -> Pair:
        back, active = peer.run(scale * x)
        return back / scale, active

    run.close = getattr(peer, "close", lambda: None)  # type: ignore[attr-defined]
    return run


def measured(run: Callable[..., Any], train: Pair, valid: Pair, n: int) -> dict[str, float]:
    error, spread, l0, fired = [], [], [], torch.zeros(n, dtype=torch.bool)
    for x in valid:
        parts = [run(chunk) for chunk in x.split(1024)]
        back, active = (torch.cat(p) for p in zip(*parts, strict=True))
        error.append(float((x - back).double().square().sum()))
        spread.append(float((x - x.mean(dim=0)).double().square().sum()))
        l0.append(float(active.sum(dim=1).float().mean()))
        fired |= active.any(dim=0)
    for x in train:
        for chunk in x.split(1024):
            fired |= run(chunk)[1].any(dim=0)
    fvu = [e / s for e, s in zip(error, spread, strict=True)]
    return {
        "FVU image": fvu[0],
        "FVU text": fvu[1],
        "FVU mean": mean(fvu),
        "FVU pooled": sum(error) / sum(spread),
        "L0": mean(l0),
        "dead": 1 - float(fired.float().mean()),
    }


def main(
    embeddings_: Annotated[Path, typer.Option("--embeddings", help="safetensors of the vectors")] = Path(
        "runs/mini_embeddings.safetensors"
    ),
    corpus: Annotated[Path | None, typer.Option(help="folder made by recipes/embedded/corpus.py")] = None,
    pairs: Annotated[int, typer.Option(help="training pairs; 0 for all that are not judged")] = 0,
    judged: Annotated[int, typer.Option(help="pairs kept out of the training pairs for the table")] = 2000,
    epochs: int = 15,
    batch: int = 256,
    n: int = 1024,
    k: int = 32,
    rates: str = "1e-3,2e-3,5e-3",
    seeds: int = 3,
    first_seed: int = 10,
    out: Path = Path("runs/head_quality.md"),
) -> None:
    """Quality against peers: python benchmarks/head_quality.py --corpus runs/corpus"""
    data = {
        name: torch.nn.functional.normalize(x, dim=1) for name, x in embeddings(embeddings_, corpus).items()
    }
    train, valid = ((data[f"{s}.image"], data[f"{s}.text"]) for s in ("train", "valid"))
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(17))
    unseen = (train[0][order[:judged]], train[1][order[:judged]])
    chosen = order[judged:][: pairs or None]
    train = (train[0][chosen], train[1][chosen])
    found, missing = available()
    found = [
        build for build in found if build.name != "SAELens, sparse activations"
    ]  # the same head, stored otherwise
    makers: list[Callable[..., Any]] = [ours, *(lambda *a, b=build: theirs(b, *a) for build in found)]
    names = ["mmhooks", *(build.name for build in found)]
    done = out.with_suffix(".json")
    rows: dict[str, Any] = json.loads(done.read_text()) if done.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)

    def one(place: int, lr: float, seed: int) -> dict[str, float]:
        key = f"{names[place]} lr={lr:g} seed={seed} n={n} k={k} pairs={len(train[0])} epochs={epochs}"
        if key not in rows:
            began = time.perf_counter()
            run = makers[place](n, k, lr, seed, train, batch, epochs)
            rows[key] = measured(run, train, unseen, n) | {"seconds": time.perf_counter() - began}
            rows[key]["FVU for the choice"] = measured(run, train, valid, n)["FVU mean"]
            getattr(run, "close", lambda: None)()
            done.write_text(json.dumps(rows, indent=1))
            print(key, {name: round(value, 4) for name, value in rows[key].items()}, flush=True)
        return rows[key]

    lines = [
        f"n = {n}, K = {k}, d = {train[0].shape[1]}; {len(train[0]):,} training pairs, {judged:,} judged; "
        f"{epochs} epochs of batches of {batch} pairs; mean over {seeds} seeds (least to greatest).",
        "",
        "| library | rate | FVU image | FVU text | FVU, mean of both | FVU, pooled | dead |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for place, name in enumerate(names):
        grid = [float(r) for r in rates.split(",")]
        best = min(grid, key=lambda lr: one(place, lr, first_seed)["FVU for the choice"])
        runs = [one(place, best, seed) for seed in range(first_seed, first_seed + seeds)]
        cells = [
            f"{mean(r[c] for r in runs):.4f} ({min(r[c] for r in runs):.4f}–{max(r[c] for r in runs):.4f})"
            for c in ("FVU image", "FVU text", "FVU mean", "FVU pooled", "dead")
        ]
        lines.append(f"| {name} | {best:g} | {' | '.join(cells)} |")
        out.write_text("\n".join([*lines, "", *missing]) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    typer.run(main)
