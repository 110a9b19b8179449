"""Trains and ships ``mini/patch-sae``: a sparse autoencoder on patch tokens of mini's image tower.

    PYTHONPATH=recipes python -m embedded.token_heads.patches --acts runs/patch_acts

Trained on the drawings of the training split. Of the others, those whose family (drawing without skin tone, gender and
direction) occurs in training choose the layer; the rest, families of which nothing was seen, give the card's numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

import mmhooks as mm
from embedded.token_heads.candidates import (
    Candidate,
    Plan,
    measured,
    pair_of_rows,
    rows_of,
    train_all,
)
from embedded.token_heads.pointing import game, pictures
from mmhooks.data.families import drawing_family
from mmhooks.data.pair_set import Pairs
from mmhooks.data.synthetic.scenes import openmoji_drawing, render, sample_scene
from mmhooks.heads import TopKSAE, reconstruction
from mmhooks.hooks.edits import Edit
from mmhooks.models.encoder_tokens import encoder_token_mask
from mmhooks.utils.assets import ASSETS
from mmhooks.utils.indexing import number_labels

LAYERS = range(6)
KS = (8, 32)  # beside 16, at block 2


class Drawings(NamedTuple):
    """The drawings: those to train on, those that choose, and those of families that neither training nor choice saw."""

    train: Pairs
    choosing: Pairs
    held_out: Pairs


def drawings(pairs: Pairs) -> Drawings:
    """Divides the drawings by split, and those held out by whether their family occurs in training."""
    splits = pairs.splits
    family = [drawing_family(text) for text in pairs.texts]
    known = {name for name, split in zip(family, splits, strict=True) if split == "train"}

    def where(chosen: Callable[[str, str], bool]) -> Pairs:
        return pairs.select([i for i in range(len(pairs)) if chosen(splits[i], family[i])])

    return Drawings(
        where(lambda split, name: split == "train"),
        where(lambda split, name: split != "train" and name in known),
        where(lambda split, name: split != "train" and name not in known),
    )


def candidates(features: int) -> list[Candidate]:
    """K = 16 at every layer; at block 2 two other K."""
    return [
        *(Candidate(f"image.blocks.{layer}.resid_post", features, 16) for layer in LAYERS),
        *(Candidate("image.blocks.2.resid_post", features, k) for k in KS),
    ]


def rebuilt(
    model: mm.HookedCLIP, site: str, head: TopKSAE
) -> Callable[[Float[Tensor, "b token d"]], Float[Tensor, "b token d"]]:
    """A hook that puts the reconstruction in the place of every patch; the class token stays."""

    def act(x: Tensor, *, hook: Any = None) -> Tensor:
        patches = encoder_token_mask(model, site, "patch", x.shape[1])
        return torch.where(patches[..., None], head(x), x)

    return act


class Read(NamedTuple):
    """Pairs as the model reads them: pixels, and the embeddings of their texts."""

    pixels: Float[Tensor, "n 3 h w"]
    texts: Float[Tensor, "n e"]


@torch.no_grad()
def read(model: mm.HookedCLIP, pairs: Pairs) -> Read:
    assert model.tokenizer is not None and model.preprocess is not None  # embedded models have both
    tokens = model.tokenizer(pairs.texts)
    texts = torch.cat([model.encode_text(part) for part in tokens.split(256)])
    return Read(torch.stack([model.preprocess(image) for image in pairs.images()]), texts)


@torch.no_grad()
def found_again(
    model: mm.HookedCLIP, pairs: Read, *edits: Edit, fwd_hooks: Sequence[Any] = ()
) -> dict[str, Any]:
    """R@1 and R@5 in both directions, with the image tower under these edits and hooks."""
    with model.hooks(*edits, fwd_hooks=fwd_hooks):
        images = torch.cat([model.encode_image(part) for part in pairs.pixels.split(128)])
    scores = mm.retrieval(images, pairs.texts, ks=(1, 5))
    return {
        "image_to_text": {f"R@{k}": e.to_json() for k, e in scores.image_to_text.items()},
        "text_to_image": {f"R@{k}": e.to_json() for k, e in scores.text_to_image.items()},
    }


def saved(kept: dict[str, Any]) -> float:
    """R@5 of the rebuilt model above that of the ablated one, mean of both directions: what the features carry to the output."""
    return (
        sum(
            kept["rebuilt"][way]["R@5"]["value"] - kept["mean"][way]["R@5"]["value"]
            for way in ("image_to_text", "text_to_image")
        )
        / 2
    )


def grids(store: mm.Store, site: str) -> Float[Tensor, "n patches d"]:
    """All pairs' patches of one site."""
    return rows_of(store, site).unflatten(0, (len(store.pairs), -1))


def alpha_masks(pairs: Pairs) -> Bool[Tensor, "n h w"]:
    """Where each drawing is more than half opaque."""
    alphas = [np.asarray(pairs.rgba(i))[..., 3] > 127 for i in range(len(pairs))]
    return torch.from_numpy(np.stack(alphas))


def scene_patches(
    model: mm.HookedCLIP, site: str, count: int, seed: int
) -> tuple[Float[Tensor, "n patches d"], Bool[Tensor, "n h w"]]:
    """Patches of composed pictures, and the pixels that their things change."""
    assert model.preprocess is not None
    rng = random.Random(seed)
    rows, masks = [], []
    for _ in range(count):
        scene = sample_scene(rng)
        drawn = render(scene, openmoji_drawing)
        masks.append(torch.from_numpy((drawn != render(replace(scene, things=()), openmoji_drawing)).any(-1)))
        with torch.no_grad(), model.caching(site, tokens="patch") as cache:
            model.encode_image(model.preprocess(Image.fromarray(drawn))[None])
        rows.append(cache[site])
    return torch.cat(rows), torch.stack(masks)


def families_of(pairs: Pairs) -> Int[Tensor, " n"]:
    return number_labels([drawing_family(text) for text in pairs.texts])


def main(
    acts: Annotated[Path, typer.Option(help="folder for the stores of activations")] = Path(
        "runs/patch_acts"
    ),
    features: Annotated[int, typer.Option(help="of the shipped head")] = 1024,
    epochs: Annotated[int, typer.Option(help="passes over the training patches")] = 4,
    limit: Annotated[int | None, typer.Option(help="drawings of each part, for a trial")] = None,
    scenes: Annotated[
        int, typer.Option(help="composed pictures to choose features on, and as many to test")
    ] = 300,
    best: Annotated[int, typer.Option(help="features of the pointing game")] = 32,
    out: Annotated[Path, typer.Option(help="where the head goes")] = ASSETS / "mini" / "patch-sae",
) -> None:
    """Trains and ships the head: PYTHONPATH=recipes python -m embedded.token_heads.patches --acts runs/patch_acts"""
    model, parts = mm.load("mini"), drawings(mm.data.pairs("mini"))
    if limit is not None:
        parts = Drawings(*(part[:limit] for part in parts))
    sites = [f"image.blocks.{layer}.resid_post" for layer in LAYERS]
    stores = {
        name: mm.extract(model, part, sites, acts / name, tokens="patch", dtype="fp16", batch_size=64)
        for name, part in zip(Drawings._fields, parts, strict=True)
    }
    plan = Plan(epochs=epochs)
    heads = train_all(stores["train"], candidates(features), plan, name="patch-sae")
    means = {site: rows_of(stores["train"], site).mean(0) for site in sites}

    pairs = {name: read(model, getattr(parts, name)) for name in ("choosing", "held_out")}
    untouched = {name: found_again(model, found) for name, found in pairs.items()}
    ablated = {
        (name, site): found_again(model, found, mm.Mean(mean=means[site], at=site, tokens="patch"))
        for name, found in pairs.items()
        for site in sites
    }
    table: list[dict[str, Any]] = []
    for candidate, head in heads.items():
        site = candidate.site
        row: dict[str, Any] = {"site": site, "features": candidate.features, "k": candidate.k}
        for name, found in pairs.items():
            store = stores[name]
            families = families_of(getattr(parts, name))[pair_of_rows(store)]
            row[name] = measured(head, rows_of(store, site), families)
            row[name]["retrieval"] = {
                "model": untouched[name],
                "rebuilt": found_again(model, found, fwd_hooks=[(site, rebuilt(model, site, head))]),
                "mean": ablated[name, site],
            }
        row["saved"] = saved(row["choosing"]["retrieval"])
        row["dead_in_training"] = reconstruction(head, rows_of(stores["train"], site)).dead
        table.append(row)
        typer.echo(f"{candidate.name}: {summary(row)}")

    able = [i for i, c in enumerate(heads) if (c.features, c.k) == (features, 16)]
    number = max(able, key=lambda i: table[i]["saved"])
    (chosen, head), row = list(heads.items())[number], table[number]
    site = chosen.site
    on_drawings = game(
        pictures(head, grids(stores["train"], site), alpha_masks(parts.train)),
        pictures(head, grids(stores["held_out"], site), alpha_masks(parts.held_out)),
        families_of(parts.held_out), count=best,
    )  # fmt: skip
    on_scenes = game(
        pictures(head, *scene_patches(model, site, scenes, seed=1)),
        pictures(head, *scene_patches(model, site, scenes, seed=2)),
        torch.arange(scenes), count=best,
    )  # fmt: skip
    head.info = {
        "model": "mini",
        "site": site,
        "tokens": "patch",
        "data": f"patches of {len(parts.train):,} OpenMoji drawings, the training split of mm.data.pairs('mini')",
        "recipe": {
            "script": "recipes/embedded/token_heads/patches.py",
            "features": features,
            "k": 16,
            **asdict(plan),
        },
        "chosen": "the layer at K = 16 whose reconstruction keeps most R@5 above mean ablation, on held-out drawings of "
        "known families",
        "choosing": row["choosing"],
        "dead_in_training": row["dead_in_training"],
        "held_out": row["held_out"],
        "pointing": {"drawings": on_drawings, "scenes": on_scenes},
        "candidates": [brief(one) for one in table],
    }
    head.save(out, dtype="fp16")
    typer.echo(f"{site} -> {out}: drawings {hits(on_drawings)}; scenes {hits(on_scenes)}")


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A candidate's row of the card: its numbers on held-out families, and what it was chosen by."""
    held = row["held_out"]
    return {
        **{key: row[key] for key in ("site", "features", "k", "saved", "dead_in_training")},
        "fvu": held["fvu"],
        "dead": held["dead"],
        "l0": held["l0"],
        **{
            name: {way: found["R@5"]["value"] for way, found in held["retrieval"][name].items()}
            for name in ("model", "rebuilt", "mean")
        },
    }


def summary(row: dict[str, Any]) -> str:
    held = row["held_out"]
    fives: Sequence[str] = [
        f"{name} {kept['image_to_text']['R@5']['value']:.3f}/{kept['text_to_image']['R@5']['value']:.3f}"
        for name, kept in held["retrieval"].items()
    ]
    return (
        f"FVU {held['fvu']['value']:.3f}, dead {held['dead']:.3f} (in training {row['dead_in_training']:.3f}), "
        f"L0 {held['l0']:.1f}, saved {row['saved']:.3f}, R@5 {', '.join(fives)}"
    )


def hits(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {found[name]['value']:.3f}" for name in ("hits", "matched", "elsewhere", "chance")
    )


if __name__ == "__main__":
    typer.run(main)
