"""FVU of the SAE of an embedded model on held-out pairs, compared with the best that its dictionary allows.

    PYTHONPATH=recipes python -m embedded.heads.fvu_floor --corpus runs/corpus --out runs/sae_floor

Trains the shipped plan with one setting changed at a time (texts, weight of the images, K, n, rate, epochs, seed).
Each head's FVU is compared with that of a pursuit: for every text, the K features of the same dictionary that explain
it best, found greedily instead of by the encoder. Rows that exist already are not computed again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor

from embedded.heads.train import Vectors, groups, measured, plan_of, train, vectors
from mmhooks.analysis.results import Records
from mmhooks.heads import Head, TopKSAE
from mmhooks.utils.files import write_text

SHIPPED = "shipped plan"


def changes() -> dict[str, dict[str, Any]]:
    """Returns what each row changes in the shipped plan."""
    rows: dict[str, dict[str, Any]] = {SHIPPED: {}}
    rows |= {"names alone": {"texts": ("names",), "epochs": 108}}  # as many steps
    rows |= {"no crossed names": {"texts": ("names", "captions"), "epochs": 36}}
    rows |= {f"image share {s}": {"image_share": s} for s in (0.5, 0.7, 0.9)}
    rows |= {f"K = {k}": {"k": k} for k in (16, 48, 64, 128)}
    rows |= {f"n = {n}": {"features": n} for n in (512, 2048, 4096)}
    rows |= {f"rate {lr}": {"lr": lr} for lr in (0.001, 0.003, 0.005)}
    rows |= {f"epochs {e}": {"epochs": e} for e in (6, 24)}
    return rows | {f"seed {s}": {"seed": s} for s in (1, 2)}


def refit(
    gram: Float[Tensor, "b k k"], target: Float[Tensor, "b k"], start: Float[Tensor, "b k"], sweeps: int = 20
) -> Float[Tensor, "b k"]:
    """Solves non-negative least squares over each row's own atoms, by coordinate descent."""
    values = start.clone()
    for _ in range(sweeps):
        for i in range(values.shape[1]):
            rest = target[:, i] - (gram[:, i] * values).sum(1)
            values[:, i] = (values[:, i] + rest / gram[:, i, i].clamp_min(1e-12)).clamp_min(0)
    return values


def explained(
    x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"], chosen: Int[Tensor, "b k"], sweeps: int = 20
) -> Float[Tensor, "b d"]:
    """Returns the best non-negative combination of each row's chosen atoms."""
    own = atoms[chosen]
    values = refit(own @ own.mT, (own @ x[:, :, None]).squeeze(2), x.new_zeros(chosen.shape), sweeps)
    return (values[:, None, :] @ own).squeeze(1)


def pursuit(x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"], k: int) -> Float[Tensor, "b d"]:
    """Runs non-negative orthogonal matching pursuit: ``k`` times adds the best atom for the residual and refits all."""
    chosen = torch.empty(len(x), 0, dtype=torch.long)
    recon = torch.zeros_like(x)
    for _ in range(k):
        score = ((x - recon) @ atoms.T).scatter(1, chosen, -torch.inf)
        chosen = torch.cat([chosen, score.argmax(1, keepdim=True)], 1)
        recon = explained(x, atoms, chosen, sweeps=6)
    return explained(x, atoms, chosen)


def unexplained(x: Float[Tensor, "b d"], recon: Float[Tensor, "b d"]) -> float:
    """Returns the fraction of variance unexplained (FVU)."""
    return float((x - recon).square().sum() / (x - x.mean(0)).square().sum())


@torch.no_grad()
def bounds(head: TopKSAE, x: Float[Tensor, "b d"], most: int = 600) -> dict[str, float]:
    """Returns the FVU of the head, of its features with optimal values, and of the best features; on the same rows."""
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most]]
    atoms = head.W_dec / head.W_dec.norm(dim=1, keepdim=True)
    centred = x - head.b_pre
    own = explained(centred, atoms, head.encode_topk(x)[1]) + head.b_pre
    best = pursuit(centred, atoms, head.k) + head.b_pre
    return {"head": unexplained(x, head(x)), "own": unexplained(x, own), "pursuit": unexplained(x, best)}


def pca(train: Float[Tensor, "n d"], x: Float[Tensor, "b d"], k: int) -> float:
    """Returns the FVU of ``x`` in the ``k`` principal directions of the training vectors."""
    mean = train.mean(0)
    basis = torch.linalg.eigh((train - mean).T @ (train - mean)).eigenvectors[:, -k:]
    return unexplained(x, mean + (x - mean) @ basis @ basis.T)


def row(name: str, data: Vectors, plan: dict[str, Any]) -> tuple[dict[str, Any], Head]:
    head, result = train("sae-wide", data, **plan)
    assert isinstance(head, TopKSAE)
    seen = data.seen_concepts
    held = measured(head, data.valid_image, data.valid_text)
    return {
        "plan": plan,
        "steps": result.steps,
        "held_out": held,
        "pictures": measured(head, data.valid_image[:seen], data.valid_text[:seen]),
        "concepts": measured(head, data.valid_image[seen:], data.valid_text[seen:]),
        "training": measured(head, *data.pairs(*plan["texts"])),
        "bounds": {
            "image": bounds(head, data.valid_image),
            "pictures": bounds(head, data.valid_text[:seen]),
            "concepts": bounds(head, data.valid_text[seen:]),
        },
        "mds": groups(head, name),
    }, head


def table(rows: dict[str, dict[str, Any]]) -> Records:
    """Returns the table, one line per row; texts are split by whether their concept was in training."""
    out = Records()
    for label, r in rows.items():
        held, best, mds = r["held_out"], r["bounds"], r["mds"]
        out.append(
            {
                "change": label,
                "FVU image": held["fvu_image"],
                "FVU text": held["fvu_text"],
                "of seen concepts": r["pictures"]["fvu_text"],
                "of unseen concepts": r["concepts"]["fvu_text"],
                "in training": r["training"]["fvu_text"],
                "own features, best values": best["concepts"]["own"],
                "best features": best["concepts"]["pursuit"],
                "dead %": f"{100 * held['dead']:.1f}",
                "ImgD / TextD / CrossD": f"{mds['ImgD']} / {mds['TextD']} / {mds['CrossD']}",
            }
        )
    return out


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    name: Annotated[str, typer.Option(help="embedded model: mini or mini-declip")] = "mini",
    out: Annotated[Path, typer.Option(help="one JSON a row, results.json, floor.md")] = Path(
        "runs/sae_floor"
    ),
    only: Annotated[str, typer.Option(help="rows with this in their name")] = "",
    seed: int = 0,
) -> None:
    """Sweeps around the shipped SAE: PYTHONPATH=recipes python -m embedded.heads.fvu_floor --corpus runs/corpus --only "K =" """
    data = vectors(name, corpus, seed)
    out.mkdir(parents=True, exist_ok=True)
    train_text = data.pairs(*plan_of("sae-wide")["texts"])[1]
    spectrum = {
        modality: {k: pca(train, valid, k) for k in (16, 32, 64, 128)}
        for modality, train, valid in (("image", data.image, data.valid_image), ("text", train_text, data.valid_text))
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for label, change in changes().items():
        plan = plan_of("sae-wide") | {"seed": seed} | change
        path = out / f"{label.replace(' ', '_').replace('=', '')}.json"
        kept = json.loads(path.read_text()) if path.exists() else None
        if kept is None or kept["plan"] != json.loads(json.dumps(plan)):
            if only not in label:
                continue
            kept, _ = row(name, data, plan)
            write_text(path, json.dumps(kept, indent=1) + "\n")
            typer.echo(table({label: kept}).markdown().splitlines()[-1])
        rows[label] = kept
    write_text(out / "results.json", json.dumps({"pca": spectrum, "rows": rows}, indent=1) + "\n")
    lines = [f"{m}: " + ", ".join(f"{k} leave {v:.3f}" for k, v in s.items()) for m, s in spectrum.items()]
    text = "\n\n".join([table(rows).markdown(), "Principal directions:", *lines]) + "\n"
    write_text(out / "floor.md", text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
