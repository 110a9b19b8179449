"""Waterbirds-like data: land and water animals on land and water, drawn from a seed or read through ``datasets``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmhooks.studies.spurious.options import Options
from mmhooks.utils.indexing import number_labels

GROUPS = ("land animal, land", "land animal, water", "water animal, land", "water animal, water")

DRAWN = 400  # images of every split of drawings, if no limit is given
# OpenMoji drawings by codepoint.
LAND = [
    "1f404",
    "1f405",
    "1f407",
    "1f408",
    "1f40e",
    "1f410",
    "1f412",
    "1f415",
    "1f416",
    "1f418",
    "1f42a",
    "1f428",
    "1f43b",
    "1f981",
    "1f994",
    "1f406",
    "1f402",
    "1f411",
    "1f40f",
    "1f413",
    "1f999",
    "1f992",
    "1f993",
    "1f998",
    "1f9a5",
    "1f98d",
    "1f98f",
    "1f9a1",
    "1f98c",
    "1f43a",
]
WATER = [
    "1f40b",
    "1f433",
    "1f42c",
    "1f41f",
    "1f420",
    "1f421",
    "1f988",
    "1f419",
    "1f991",
    "1f980",
    "1f99e",
    "1f990",
    "1f9ad",
    "1f427",
    "1f986",
    "1f9a2",
    "1f422",
    "1f40a",
    "1f9a6",
    "1fabc",
    "1f438",
    "1fabf",
    "1f9ab",
    "1f41a",
]


@dataclass(frozen=True)
class Scenes:
    """Images, the kind of their animal (1: water animal), their background (1: water), and which animal it is.

    Images of one species are not independent: intervals and tests resample species. In data without species every
    image is its own.
    """

    pixels: Float[Tensor, "n 3 h w"]
    animals: Int[Tensor, " n"]
    places: Int[Tensor, " n"]
    species: Int[Tensor, " n"]

    @property
    def groups(self) -> Int[Tensor, " n"]:
        """Number in ``GROUPS``."""
        return 2 * self.animals + self.places


@dataclass(frozen=True)
class Split:
    """Scenes for choosing attention heads, scenes of other animals for evaluation, and the names of both classes."""

    choose: Scenes
    judge: Scenes
    names: tuple[list[str], list[str]]
    shares: Float[Tensor, " 4"]  # of the groups where heads are chosen: the correlation
    attribution: str


def load_splits(preprocess: Any, options: Options) -> list[Split]:
    """Returns several splits of the drawn animals, or the one split of a data set.

    Raises:
        DataError: a data set without the required splits or columns.
    """
    if options.data == "mini":
        seeds = range(options.seed, options.seed + options.splits)
        return [
            drawn_split(
                preprocess,
                n=options.limit or DRAWN,
                correlation=options.correlation,
                scale=options.scale,
                seed=seed,
            )
            for seed in seeds
        ]
    one, other = (text.strip() for text in options.classes.split(",", 1))
    return [
        dataset_split(
            preprocess, options.data, label=options.label, place=options.place, species=options.species,
            names=(one, other), limit=options.limit, seed=options.seed,
        )
    ]  # fmt: skip


def _species_name(value: object) -> str:
    folder, slash, file = str(value).rpartition("/")
    return folder if slash else file


def drawn_split(preprocess: Any, *, n: int, correlation: float, scale: float, seed: int) -> Split:
    """Draws one split: half of the species for choosing heads, the other half for evaluation.

    Where heads are chosen, a share of ``correlation`` is on its own background; in evaluation all four groups have
    equal size.
    """
    import mmhooks as mm

    pairs = mm.data.pairs("mini")
    at = {str(meta.get("codepoints")): i for i, meta in enumerate(pairs.meta)}
    draw = np.random.default_rng(seed)
    species = [[at[code] for code in draw.permutation(codes)] for codes in (LAND, WATER)]
    halves = [(own[: len(own) // 2], own[len(own) // 2 :]) for own in species]
    lives = draw.random(n) < correlation
    animals = draw.integers(2, size=n)
    places = np.where(lives, animals, 1 - animals)
    choose = _scenes(pairs, preprocess, [h[0] for h in halves], animals, places, scale, draw)
    groups = np.arange(n) % 4
    judge = _scenes(pairs, preprocess, [h[1] for h in halves], groups // 2, groups % 2, scale, draw)
    names = ([pairs.texts[i] for i in species[0]], [pairs.texts[i] for i in species[1]])
    shares = torch.bincount(choose.groups, minlength=4).float() / n
    return Split(
        choose, judge, names, shares, f"{pairs.attribution} Licence of the drawings: {pairs.licence}."
    )


def _scenes(
    pairs: Any,
    preprocess: Any,
    species: list[list[int]],
    animals: np.ndarray,
    places: np.ndarray,
    scale: float,
    draw: np.random.Generator,
) -> Scenes:
    from mmhooks.data.synthetic.backgrounds import draw_background, paste_on

    pixels, drawn = [], []
    for animal, place in zip(animals.tolist(), places.tolist(), strict=True):
        background = draw_background("water" if place else "land", 96, int(draw.integers(2**31)))
        which = species[animal][int(draw.integers(len(species[animal])))]
        drawn.append(which)
        size, where = (
            float(draw.uniform(scale - 0.1, scale + 0.1)),
            (float(draw.random()), float(draw.uniform(0.4, 0.9))),
        )
        pixels.append(preprocess(paste_on(pairs.rgba(which), background, scale=size, at=where)[0]))
    return Scenes(torch.stack(pixels), torch.tensor(animals), torch.tensor(places), torch.tensor(drawn))


def dataset_split(
    preprocess: Any,
    source: str,
    *,
    label: str,
    place: str,
    species: str | None,
    names: tuple[str, str],
    limit: int | None,
    seed: int,
) -> Split:
    """Reads a data set with columns ``image``, ``label`` and ``place`` (0 or 1 each), and ``species`` if it is given.

    Of a species that is written as a path, as in Waterbirds' ``img_filename``, only the folder counts.

    Heads are chosen on its validation split and evaluated on its test split, which must differ; on all images of both
    if ``limit`` is None.

    Raises:
        DataError: no such splits or columns, labels that are not 0 and 1, or a group without an image.
    """
    from pathlib import Path

    import datasets

    from mmhooks.errors import DataError

    found = datasets.load_from_disk(source) if Path(source).is_dir() and (
        Path(source) / "dataset_dict.json"
    ).is_file() else datasets.load_dataset(source)  # fmt: skip
    scenes = {}
    for split in ("validation", "test"):
        if split not in found:
            raise DataError(f"{source} has no split {split!r}; it has {', '.join(map(str, found))}")
        rows: Any = found[split]  # type: ignore[index]
        missing = {"image", label, place, *([species] if species else [])} - set(rows.column_names)
        if missing:
            raise DataError(
                f"{source} has no column {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}"
            )
        order = sorted(np.random.default_rng(seed).permutation(len(rows))[:limit].tolist())
        rows = rows.select(order)
        y, p = torch.tensor(rows[label]), torch.tensor(rows[place])
        counts = (
            torch.bincount(2 * y + p, minlength=4)
            if int(max(y.max(), p.max())) < 2 <= 2 + int(min(y.min(), p.min()))
            else None
        )
        if counts is None or (counts == 0).any():
            raise DataError(
                f"{source}, {split}: expected {label} and {place} of 0 or 1 and images in all four groups, got "
                f"{'other values' if counts is None else f'groups of {counts.tolist()} images'}; give another split"
            )
        pixels = torch.stack([preprocess(r["image"].convert("RGB")) for r in rows])
        own = (
            torch.arange(len(y))
            if species is None
            else number_labels([_species_name(v) for v in rows[species]])
        )
        scenes[split] = Scenes(pixels, y, p, own)
    shares = torch.bincount(scenes["validation"].groups, minlength=4).float() / len(
        scenes["validation"].places
    )
    return Split(
        scenes["validation"],
        scenes["test"],
        ([names[0]], [names[1]]),
        shares,
        f"Images: {Path(source).name}.",
    )
