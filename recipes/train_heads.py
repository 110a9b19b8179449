"""Train the sparse heads that ship with an embedded model: the TopK SAE and the NCL head.

    python recipes/train_heads.py --corpus runs/corpus --name mini

One head for both modalities, on the embeddings of the training drawings and of their names; the numbers in
each head's config.json are of the held-out pairs (unseen pictures and unseen concepts together).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import mini_losses as losses
import torch
import typer
from mini_corpus import Corpus
from train_mini import embed

import mmhooks as mm
from mmhooks.heads import NCL, Head, TopKSAE, fidelity
from mmhooks.models import zoo

KINDS = ("sae", "ncl")


def build(kind: str, d_in: int, n: int, k: int) -> Head:
    return TopKSAE(d_in, n, k, name="sae") if kind == "sae" else NCL(d_in, n, name="ncl")


def measured(head: Head, image: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """FVU per modality (where the head decodes), L0 per modality, features that fire in neither."""
    both, one, two = fidelity(head, image, text), fidelity(head, image), fidelity(head, text)
    row = {"n": len(image), "l0_image": one.l0, "l0_text": two.l0, "dead": both.dead}
    if head.has_decoder:
        row |= {"fvu_image": one.fvu, "fvu_text": two.fvu}
    return row


@torch.no_grad()
def views(
    model: mm.HookedCLIP, drawings: Corpus, rows: list[int], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of every drawing beside its name, and beside two other captions of it.

    Names alone are some thousand distinct vectors, too few to learn a dictionary of the text space from.
    """
    dice = random.Random(seed)
    image, text = embed(model.model, model.tokenizer, drawings, rows)
    texts = [text]
    for _ in range(2):
        captions = [losses.caption(drawings.rows[i], dice) for i in rows]
        parts = [captions[i : i + 512] for i in range(0, len(captions), 512)]
        texts.append(torch.cat([model.encode_text(model.tokenizer(part)) for part in parts]))
    return torch.cat([image] * 3), torch.cat(texts)


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by mini_corpus.py")] = Path("runs/corpus"),
    name: Annotated[str, typer.Option(help="embedded model: mini or mini-declip")] = "mini",
    kinds: Annotated[str, typer.Option(help="sae, ncl or both with a comma")] = ",".join(KINDS),
    features: int = 1024,
    k: Annotated[int, typer.Option(help="active features of the SAE")] = 32,
    sae_epochs: int = 15,
    sae_lr: float = 5e-3,
    ncl_epochs: int = 5,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="where heads go; the package's assets by default")] = None,
) -> None:
    """Train and ship heads: python recipes/train_heads.py --corpus runs/corpus --name mini"""
    torch.manual_seed(seed)
    model, drawings = mm.load(name), Corpus(corpus)
    with torch.autocast("cpu", torch.bfloat16):  # three times as fast; the held-out vectors are exact
        train = views(model, drawings, drawings.where("train"), seed)
    train = (train[0].float(), train[1].float())
    valid = embed(model.model, model.tokenizer, drawings,
                  drawings.where("heldout_pictures") + drawings.where("heldout_concepts"))  # fmt: skip
    for kind in kinds.split(","):
        head = build(kind, train[0].shape[1], features, k)
        epochs, lr = (sae_epochs, sae_lr) if kind == "sae" else (ncl_epochs, None)
        result = mm.train_head(head, *train, epochs=epochs, lr=lr, seed=seed, valid=valid)
        head.info = {
            "model": name,
            "data": "training drawings of the mini corpus (see the model's card)",
            "recipe": {"script": "recipes/train_heads.py", "epochs": epochs, "lr": lr, "steps": result.steps, "seed": seed,
                       "pairs": len(train[0])},
            "held_out": measured(head, *valid),
            "training": measured(head, *train),
        }  # fmt: skip
        target = (out or zoo.ASSETS / name) / kind
        head.save(target, dtype="fp16")
        typer.echo(f"{target.parent.name}/{kind} {head.id}: held out {head.info['held_out']}")


if __name__ == "__main__":
    typer.run(main)
