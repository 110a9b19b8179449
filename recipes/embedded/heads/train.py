"""Trains the sparse heads that ship with an embedded model: the TopK SAE and the NCL head.

    PYTHONPATH=recipes python -m embedded.heads.train --corpus runs/corpus --name mini

One head for both modalities, on the embeddings of the training drawings and of texts about them; the numbers in
each head's config.json are of the held-out pairs (unseen images and unseen concepts together).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmhooks as mm
from embedded import losses
from embedded.clip.train import embed
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.splits import split_of
from mmhooks.heads import NCL, Head, TopKSAE, TrainResult, reconstruction
from mmhooks.heads.training.sae_objective import SAEObjective
from mmhooks.models.provenance import weights_hash
from mmhooks.studies.common.encode import encode
from mmhooks.utils.assets import ASSETS
from mmhooks.utils.files import atomic_path, cache_dir

KINDS = ("sae", "ncl")


class Vectors(NamedTuple):
    """Unit-norm embeddings of drawings and texts, in the training and the held-out splits of the corpus.

    Attributes:
        image: every training drawing. names, captions, crossed: its texts, one, two and six per drawing.
        valid_image, valid_text: the held-out drawings and their names. seen_concepts: for so many of the first, the
            concept was seen in training.
    """

    image: Float[Tensor, "n d"]
    names: Float[Tensor, "n d"]
    captions: Float[Tensor, "n2 d"]
    crossed: Float[Tensor, "n6 d"]
    valid_image: Float[Tensor, "v d"]
    valid_text: Float[Tensor, "v d"]
    seen_concepts: int

    def pairs(self, *texts: str) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]:
        """Returns all texts of these kinds, each with the drawing that it was made for."""
        chosen = torch.cat([getattr(self, kind) for kind in texts])
        return self.image.repeat(len(chosen) // len(self.image), 1), chosen


def crossed(names: list[str], rng: random.Random) -> str:
    """Joins the beginning of one name and the end of another: "woman farmer", "red panda" -> "woman panda".

    Texts that the rule of the splits would hold out are drawn again.
    """
    while True:
        one, two = rng.choice(names).split(), rng.choice(names).split()
        text = " ".join(one[: rng.randint(1, len(one))] + two[rng.randrange(len(two)) :])
        if split_of("", text) != "heldout_concepts":
            return text


@torch.no_grad()
def vectors(name: str, corpus: Path, seed: int) -> Vectors:
    """Embeds the corpus with an embedded model, once; a second run reads the vectors from the cache.

    Names are only a few thousand distinct vectors: an SAE memorises them and is poor on unseen names. Other captions
    of the drawings hardly help, because they name the same things; names crossed with each other do (docs/heads.md).
    """
    model, drawings = mm.load(name), Corpus(corpus)
    path = cache_dir("heads") / f"{weights_hash(model.model)}-{len(drawings.rows)}-{seed}.safetensors"
    held_out = [drawings.where("heldout_pictures"), drawings.where("heldout_concepts")]
    if not path.exists():
        rows, rng = drawings.where("train"), random.Random(seed)
        known = sorted({drawings.rows[i]["name"] for i in rows})
        texts = {
            "captions": [losses.caption(drawings.rows[i], rng) for _ in range(2) for i in rows],
            "crossed": [crossed(known, rng) for _ in range(6) for _ in rows],
        }
        tokenizer = model.tokenizer
        assert tokenizer is not None  # embedded models have one
        with torch.autocast(
            "cpu", torch.bfloat16
        ):  # three times as fast; the held-out vectors below are exact
            image, names = embed(model.model, model.tokenizer, drawings, rows)
            found = {"image": image, "names": names}
            for kind, lines in texts.items():
                parts = [lines[i : i + 512] for i in range(0, len(lines), 512)]
                found[kind] = torch.cat([model.encode_text(tokenizer(part)) for part in parts])
        valid = embed(model.model, model.tokenizer, drawings, held_out[0] + held_out[1])
        found |= dict(zip(("valid_image", "valid_text"), valid, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as aside:
            save_file({k: torch.nn.functional.normalize(v.float(), dim=-1) for k, v in found.items()}, aside)
    return Vectors(**load_file(path), seen_concepts=len(held_out[0]))


def build(kind: str, d_in: int, n: int, k: int) -> Head:
    return TopKSAE(d_in, n, k, name="sae") if kind == "sae" else NCL(d_in, n, name="ncl")


def measured(head: Head, image: Tensor, text: Tensor) -> dict[str, float]:
    """Returns FVU per modality (if the head decodes), L0 per modality, and features that fire in neither."""
    both, one, two = (
        reconstruction(head, image, text),
        reconstruction(head, image),
        reconstruction(head, text),
    )
    row = {"n": len(image), "l0_image": one.l0, "l0_text": two.l0, "dead": both.dead}
    if head.has_decoder:
        row |= {"fvu_image": one.fvu, "fvu_text": two.fvu}
    return row


@torch.no_grad()
def groups(head: Head, name: str) -> dict[str, float]:
    """Returns MDS of the head over OpenMoji, as recipes/modality.py computes it, and the sizes of its groups."""
    pairs = mm.data.pairs("mini")
    encoded = encode(mm.load(name), name, pairs, cache_dir("modality"), batch=256, progress=False)
    mds = mm.mds(encoded.store, head=head)
    sizes = {group.name: len(group) for group in mds.groups}
    return {"pairs": len(pairs), "mu": mds.mu, "sigma": mds.sigma, "dead": int(mds.dead.sum()), **sizes}


def train(
    kind: str,
    data: Vectors,
    *,
    features: int,
    epochs: int,
    lr: float,
    seed: int,
    texts: tuple[str, ...],
    k: int = 32,
    image_share: float = 0.5,
    dead_after: float = 1.0,
    decay: float = 0.5,
    progress: bool = True,
) -> tuple[Head, TrainResult]:
    """Trains one head on these kinds of texts; ``k`` and ``image_share`` apply to the SAE only."""
    head = build(kind, data.image.shape[1], features, k)
    objective = SAEObjective(image_share=image_share, dead_after=dead_after) if kind == "sae" else None
    valid = (data.valid_image, data.valid_text)
    result = mm.train_head(
        head, *data.pairs(*texts), epochs=epochs, lr=lr, decay=decay, seed=seed, valid=valid, objective=objective,
        progress=progress,
    )  # fmt: skip
    return head, result


def plan_of(kind: str) -> dict[str, Any]:
    """Returns the shipped plan. The NCL head learns from pairs, so only from texts that belong to the drawing."""
    if kind == "sae":
        return {"features": 1024, "k": 32, "epochs": 12, "lr": 2e-3, "decay": 0.9, "image_share": 0.81,
                "dead_after": 0.25, "texts": ("names", "captions", "crossed")}  # fmt: skip
    return {"features": 1024, "epochs": 5, "lr": 1e-3, "texts": ("names", "captions")}


def described(head: Head, name: str, data: Vectors, recipe: dict[str, Any]) -> dict[str, Any]:
    """Describes a head for config.json: data, recipe, and its numbers on held-out pairs and on OpenMoji."""
    image, text, seen = data.valid_image, data.valid_text, data.seen_concepts
    return {
        "model": name,
        "data": "training drawings of the mini corpus (see the model's card), texts about them or made of their names",
        "recipe": {"script": "recipes/embedded/heads/train.py", **recipe},
        "held_out": measured(head, image, text),
        "held_out_pictures": measured(head, image[:seen], text[:seen]),
        "held_out_concepts": measured(head, image[seen:], text[seen:]),
        "training": measured(head, *data.pairs("names", "captions")),
        "openmoji_mds": groups(head, name),
    }


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    name: Annotated[str, typer.Option(help="embedded model: mini or mini-declip")] = "mini",
    kinds: Annotated[str, typer.Option(help="sae, ncl or both with a comma")] = ",".join(KINDS),
    features: Annotated[int | None, typer.Option(help="other than 1,024")] = None,
    epochs: Annotated[int | None, typer.Option(help="other than 12 (SAE) or 5 (NCL)")] = None,
    lr: Annotated[float | None, typer.Option(help="other than 2e-3 (SAE) or 1e-3 (NCL)")] = None,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="where heads go; the package's assets by default")] = None,
) -> None:
    """Trains and ships heads: PYTHONPATH=recipes python -m embedded.heads.train --corpus runs/corpus --name mini"""
    data = vectors(name, corpus, seed)
    for kind in kinds.split(","):
        asked = {"features": features, "epochs": epochs, "lr": lr}
        plan = plan_of(kind) | {key: value for key, value in asked.items() if value is not None}
        torch.manual_seed(seed)
        head, result = train(kind, data, seed=seed, **plan)
        head.info = described(head, name, data, {"steps": result.steps, "seed": seed, **plan})
        target = (out or ASSETS / name) / kind
        head.save(target, dtype="fp16")
        typer.echo(
            f"{target.parent.name}/{kind} {head.id}: {head.info['held_out']} {head.info['openmoji_mds']}"
        )


if __name__ == "__main__":
    typer.run(main)
