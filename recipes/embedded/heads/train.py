"""Trains the sparse heads that ship with an embedded model: the TopK SAE and the NCL head.

    PYTHONPATH=recipes python -m embedded.heads.train --corpus runs/corpus --name mini
    PYTHONPATH=recipes python -m embedded.heads.train --corpus runs/corpus --name mini-reader --kinds sae --seeds 0,1,2 \
        --unattacked --styles openmoji,noto,fluent-emoji-flat

One head for both modalities, on the embeddings of the training drawings and of texts about them; the numbers in
each head's config.json are of the held-out pairs (unseen images and unseen concepts together).
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmhooks as mm
from embedded import losses
from embedded.clip.train import embed
from mmhooks.analysis.measures.mds import GROUPS, MDSResult
from mmhooks.analysis.measures.membership import group_labels
from mmhooks.data.families import drawing_family
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.splits import split_of
from mmhooks.heads import NCL, Head, TopKSAE, TrainResult, reconstruction
from mmhooks.heads.sae.consensus import consensus
from mmhooks.heads.training.ncl_objective import NCLObjective
from mmhooks.heads.training.sae_objective import SAEObjective
from mmhooks.models.provenance import weights_hash
from mmhooks.studies.adversarial.samples import attacked_families
from mmhooks.studies.common.encode import encode
from mmhooks.utils.assets import ASSETS
from mmhooks.utils.digest import digest
from mmhooks.utils.files import atomic_path, cache_dir

KINDS = ("sae", "sae-wide", "ncl")
TEXTS = ("captions", "crossed")


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
def vectors(
    name: str,
    corpus: Path,
    seed: int,
    texts: tuple[str, ...] = TEXTS,
    styles: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> Vectors:
    """Embeds the corpus with an embedded model, once; a second run reads the vectors from the cache.

    Names are only a few thousand distinct vectors: an SAE memorises them and is poor on unseen names. Other captions
    of the drawings hardly help, because they name the same things; names crossed with each other do (docs/heads.md).

    Args:
        texts: kinds to embed beside the names; the others are empty.
        styles: of the drawings; all by default. without: families of drawings that no head may see.
    """
    model, drawings = mm.load(name), Corpus(corpus)
    chosen = digest(*styles, *without)[:12] if styles or without else ""
    made = "-".join([weights_hash(model.model), str(len(drawings.rows)), str(seed), *texts, chosen])
    path = cache_dir("heads") / f"{made.rstrip('-')}.safetensors"

    def where(split: str) -> list[int]:
        rows = [i for i in drawings.where(split) if not styles or drawings.rows[i]["style"] in styles]
        return [i for i in rows if drawing_family(drawings.rows[i]["name"]) not in without]

    held_out = [where("heldout_pictures"), where("heldout_concepts")]
    if not path.exists():
        rows, rng = where("train"), random.Random(seed)
        known = sorted({drawings.rows[i]["name"] for i in rows})
        lines = {
            "captions": [losses.caption(drawings.rows[i], rng) for _ in range(2) for i in rows],
            "crossed": [crossed(known, rng) for _ in range(6) for _ in rows],
        }
        tokenizer = model.tokenizer
        assert tokenizer is not None  # embedded models have one
        image, names = embed(model.model, model.tokenizer, drawings, rows)
        found = {"image": image, "names": names}
        for kind in lines:
            distinct = sorted(set(lines[kind])) if kind in texts else []
            place = {text: i for i, text in enumerate(distinct)}
            parts = [distinct[i : i + 512] for i in range(0, len(distinct), 512)]
            rows_of = [model.encode_text(tokenizer(part)) for part in parts]
            found[kind] = torch.cat([*rows_of, image[:0]])[[place[text] for text in lines[kind] if place]]
        valid = embed(model.model, model.tokenizer, drawings, held_out[0] + held_out[1])
        found |= dict(zip(("valid_image", "valid_text"), valid, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as aside:
            save_file({k: torch.nn.functional.normalize(v.float(), dim=-1) for k, v in found.items()}, aside)
    return Vectors(**load_file(path), seen_concepts=len(held_out[0]))


def build(kind: str, d_in: int, n: int, k: int, seed: int = 0) -> Head:
    if kind == "ncl":
        return NCL(d_in, n, name="ncl", hidden=n, seed=seed)  # a hidden unit for each cluster it starts at
    return TopKSAE(d_in, n, k, name="sae", seed=seed)


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
    bases: int = 0,
    base_epochs: int = 1,
    base_lr: float = 3e-3,
    progress: bool = True,
) -> tuple[Head, TrainResult]:
    """Trains one head on these kinds of texts; ``k``, ``image_share`` and ``bases`` apply to the SAE only.

    Args:
        bases: short trainings, from clusters with seeds of their own, whose consensus the SAE starts from; none: it
            starts at random rows.
    """
    head = build(kind, data.image.shape[1], features, k, seed)
    valid = (data.valid_image, data.valid_text)
    pairs = data.pairs(*texts)
    if kind == "ncl":
        result = mm.train_head(
            head, *pairs, epochs=epochs, lr=lr, decay=decay, seed=seed, valid=valid, progress=progress,
            objective=NCLObjective(init="clusters", init_seed=seed, init_restarts=1),
        )  # fmt: skip
        return head, result
    if bases:
        parts: list[TopKSAE] = []
        for own in range(seed * bases, (seed + 1) * bases):
            part = TopKSAE(head.d_in, features, k, seed=own)
            start = SAEObjective(image_share=image_share, init="clusters", init_seed=own, init_restarts=1)
            mm.train_head(
                part, *pairs, epochs=base_epochs, lr=base_lr, seed=own, objective=start, progress=progress
            )
            parts.append(part)
        assert isinstance(head, TopKSAE)
        with torch.no_grad():
            head.W_dec.copy_(consensus(parts, features)[0])
            head.W_enc.copy_(head.W_dec)
    objective = SAEObjective(image_share=image_share, dead_after=dead_after)
    result = mm.train_head(
        head, *pairs, epochs=epochs, lr=lr, decay=decay, seed=seed, valid=valid, objective=objective, progress=progress
    )  # fmt: skip
    return head, result


def plan_of(kind: str) -> dict[str, Any]:
    """Returns the shipped plan. The NCL head learns from pairs, so only from texts that belong to the drawing.

    "sae" and "ncl" are what other seeds find again (docs/heads.md); "sae-wide" reconstructs far better, with features
    that no other seed has.
    """
    if kind == "sae":
        return {"features": 256, "k": 4, "epochs": 6, "lr": 2e-3, "image_share": 0.6, "bases": 4,
                "base_epochs": 1, "base_lr": 3e-3, "texts": ("names", "captions")}  # fmt: skip
    if kind == "sae-wide":
        return {"features": 1024, "k": 32, "epochs": 12, "lr": 2e-3, "decay": 0.9, "image_share": 0.81,
                "dead_after": 0.25, "texts": ("names", "captions", "crossed")}  # fmt: skip
    return {"features": 256, "epochs": 3, "lr": 1e-3, "texts": ("names", "captions")}


def described(
    head: Head, name: str, data: Vectors, recipe: dict[str, Any], without: tuple[str, ...] = ()
) -> dict[str, Any]:
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
    } | ({"without_families": list(without)} if without else {})


@torch.no_grad()
def compared(heads: dict[int, Head], name: str, data: Vectors) -> dict[int, dict[str, float]]:
    """Returns for the head of each seed what the others share with it, as means over these.

    ``decoder`` and ``activations``: share of features with a partner above .7 in cosine or in Pearson's r over held-out
    vectors; ``kappa``: agreement of the shared features' groups (thirds of R over the OpenMoji pairs) beyond chance.
    """
    pairs = mm.data.pairs("mini")
    store = encode(mm.load(name), name, pairs, cache_dir("modality"), batch=256, progress=False).store
    thirds = {seed: in_thirds(mm.mds(store, head=head)) for seed, head in heads.items()}
    rows: dict[int, dict[str, float]] = {}
    for seed, head in heads.items():
        found: dict[str, list[float]] = {}
        for other in heads.keys() - {seed}:
            by = mm.activation_stability(head, heads[other], data.valid_image, data.valid_text)
            found.setdefault("activations", []).append(by.matched.value)
            found.setdefault("activations_by_chance", []).append(by.matched_by_chance)
            if head.has_decoder:
                by = mm.stability(head, heads[other])
                found.setdefault("decoder", []).append(by.matched.value)
                found.setdefault("decoder_by_chance", []).append(by.matched_by_chance)
            found.setdefault("kappa", []).append(
                mm.group_agreement(by, thirds[seed], thirds[other]).kappa.value
            )
        sizes = {group.name: len(group) for group in thirds[seed]}
        rows[seed] = {"other_seeds": len(heads) - 1} | {k: fmean(v) for k, v in found.items()} | sizes
    return rows


def in_thirds(scores: MDSResult) -> list[mm.FeatureSet]:
    """Groups by R: above 2/3, below 1/3, and between."""
    labels = group_labels(scores.R[None], "thirds")[0]
    return [
        mm.FeatureSet(labels == number, len(labels), name=name, head=scores.head)
        for number, name in enumerate(GROUPS)
    ]


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    name: Annotated[str, typer.Option(help="embedded model: mini, mini-declip or mini-reader")] = "mini",
    kinds: Annotated[str, typer.Option(help="sae, sae-wide, ncl, or several with commas")] = "sae,ncl",
    features: Annotated[int | None, typer.Option(help="other than the plan's")] = None,
    epochs: Annotated[int | None, typer.Option(help="other than the plan's")] = None,
    lr: Annotated[float | None, typer.Option(help="other than the plan's")] = None,
    seeds: Annotated[
        str, typer.Option(help="training seeds, with commas; 0 ships as KIND, others as KIND-seedS")
    ] = "0",
    styles: Annotated[str, typer.Option(help="of the drawings, with commas; all by default")] = "",
    unattacked: Annotated[
        bool, typer.Option("--unattacked", help="without the families that recipes/adversarial.py attacks")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="where heads go; the package's assets by default")] = None,
) -> None:
    """Trains and ships heads: PYTHONPATH=recipes python -m embedded.heads.train --corpus runs/corpus --seeds 0,1,2,3,4"""
    sets, without = tuple(filter(None, styles.split(","))), attacked_families() if unattacked else ()
    for kind in kinds.split(","):
        asked = {"features": features, "epochs": epochs, "lr": lr}
        plan = plan_of(kind) | {key: value for key, value in asked.items() if value is not None}
        data = vectors(
            name, corpus, 0, tuple(text for text in plan["texts"] if text != "names"), sets, without
        )
        heads: dict[int, Head] = {}
        for seed in (int(part) for part in seeds.split(",")):
            torch.manual_seed(seed)
            heads[seed], result = train(kind, data, seed=seed, **plan)
            recipe = {"steps": result.steps, "seed": seed, **plan} | ({"styles": list(sets)} if sets else {})
            heads[seed].info = described(heads[seed], name, data, recipe, without)
            typer.echo(
                f"{name}/{kind} seed {seed}: {heads[seed].info['held_out']} {heads[seed].info['openmoji_mds']}"
            )
            heads[seed].save(place(out or ASSETS / name, kind, seed), dtype="fp16")
        if len(heads) > 1:
            for seed, row in compared(heads, name, data).items():
                heads[seed].info["stability"] = row
                heads[seed].save(place(out or ASSETS / name, kind, seed), dtype="fp16")
                typer.echo(f"{name}/{kind} seed {seed}: {row}")


def place(folder: Path, kind: str, seed: int) -> Path:
    return folder / (f"{kind}-seed{seed}" if seed else kind)


if __name__ == "__main__":
    typer.run(main)
