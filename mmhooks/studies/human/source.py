"""What a run of the modality study was about: its pairs, model, head, groups and families, opened again and checked."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.inputs.store_rows import Side
from mmhooks.analysis.measures.groups import groups_of
from mmhooks.errors import DataError
from mmhooks.studies.common.encode import SITES, encode
from mmhooks.studies.common.heads import head_sources, load_heads
from mmhooks.studies.common.held_out import held_out_rows
from mmhooks.studies.human.tasks import Material
from mmhooks.studies.modality.definitions import sample_families
from mmhooks.studies.modality.measures import StudyModel
from mmhooks.studies.modality.models import load_clip, similarity_embeddings
from mmhooks.studies.modality.options import Options as ModalityOptions
from mmhooks.utils.files import cache_dir
from mmhooks.utils.json_files import check_fields, read_json

HEADS = {"CLIP+SAE": "sae", "CLIP+NCL": "ncl"}
REMEDY = "give the folder of a run of mmhooks study modality"
ROWS = 4096  # pairs whose latents are computed at a time


@dataclass(frozen=True)
class Source:
    """A run of the modality study, opened again.

    Attributes:
        command: that repeats the run. groups: the features of each group. scores: MDS of every feature.
    """

    command: str
    pairs: Any
    study_model: StudyModel
    families: Int[Tensor, " n"]
    groups: Mapping[str, Sequence[int]]
    rule: str
    scores: Float[Tensor, " k"]

    def material(self, m: int) -> dict[str, Material]:
        """The strongest ``m`` samples of every feature on each side, at most one of a family."""
        store, head = self.study_model.encoded.store, self.study_model.head

        @cache
        def image(row: int) -> bytes:
            return blake2b(self.pairs.image(row).tobytes()).digest()

        def text(row: int) -> str:
            return self.pairs.texts[row].strip().casefold()

        def of(side: Side, label: Callable[[int], Hashable]) -> Material:
            top = mm.top_activating(store, m, head=head, side=side, families=self.families)
            return Material(side, top, self.families, label)

        return {"image": of("image", image), "text": of("text", text)}

    def activations(self, side: str, features: Sequence[int]) -> Float[Tensor, "n f"]:
        """The activation of all samples of one side, of these features."""
        n = len(self.pairs)
        parts = [
            self.study_model.latents(side, list(range(begin, min(begin + ROWS, n))))[:, list(features)]
            for begin in range(0, n, ROWS)
        ]
        return torch.cat(parts)


def open_run(folder: Path, name: str, *, quiet: bool = True) -> Source:
    """Opens the pairs, the model and the head of a modality run, and checks that they still are what the run measured.

    Args:
        folder: with the run's ``results.json``. name: "CLIP+SAE" or "CLIP+NCL".

    Raises:
        DataError: no such run, a model without a head, or pairs, head or scores that differ from the run's.
    """
    path = folder / "results.json"
    results = read_json(
        path,
        "a result of the modality study",
        {"settings": dict, "data": dict, "models": dict},
        remedy=REMEDY,
    )
    if name not in HEADS or name not in results["models"]:
        known = [model for model in HEADS if model in results["models"]]
        raise DataError(
            f"{path}: expected a model with a head ({', '.join(known) or 'the run has none'}), got {name!r}; "
            "coordinates without a head are active for every sample, so that nothing is an intruder"
        )
    options = _options(path, results["settings"])
    measured = results["models"][name]
    check_fields(measured, {"head": str, "mds": dict, "groups": dict}, f"{path}, {name}", remedy=REMEDY)
    pairs = mm.data.pairs(
        options.data,
        limit=options.limit,
        seed=options.seed,
        on_error="skip" if options.skip_bad else "raise",
    )
    _same(path, "pairs", results["data"].get("fingerprint"), str(pairs.fingerprint))
    vectors = similarity_embeddings(pairs, options)["image"]
    families = sample_families(pairs, options.family, vectors)
    place = cache_dir("modality")
    clip = encode(load_clip(options), options.model, pairs, place, batch=options.batch, progress=not quiet)
    held = set(held_out_rows(pairs, options.data, options.seed))
    seen = [row for row in range(len(pairs)) if row not in held]
    heads = load_heads(
        clip,
        seen,
        head_sources(options.sae, options.ncl, options.model),
        n=options.features,
        k=options.k,
        epochs=options.epochs,
        seed=options.seed,
        cache=place,
    )
    study_model = StudyModel(name, clip, heads[HEADS[name]])
    _same(path, "head", measured["head"], study_model.head.id)
    mds = mm.mds(clip.store, head=study_model.head, image=SITES[0], text=SITES[1], kind="relu")
    _same_scores(path, measured["mds"].get("scores"), mds.R)
    groups, rule = groups_of(mds)
    command = str(results["settings"].get("command", ""))
    return Source(command, pairs, study_model, families, {k: list(v) for k, v in groups.items()}, rule, mds.R)


def _options(path: Path, settings: Mapping[str, Any]) -> ModalityOptions:
    known = {field.name for field in fields(ModalityOptions)}
    given = {name: value for name, value in settings.items() if name in known}
    lacking = [name for name in ("model", "data", "seed") if name not in given]
    if lacking:
        raise DataError(
            f"{path}: expected settings of a modality run, got none for {', '.join(lacking)}; {REMEDY}"
        )
    return ModalityOptions(**(given | {"out": path.parent, "quiet": True}))


def _same(path: Path, what: str, expected: object, got: object) -> None:
    if expected != got:
        raise DataError(
            f"{path}: expected the run's {what} ({expected}), got others now ({got}); run the modality study again"
        )


def _same_scores(path: Path, expected: Any, got: Float[Tensor, " k"]) -> None:
    now = [None if x != x else x for x in got.tolist()]
    fits = (
        isinstance(expected, list)
        and len(expected) == len(now)
        and all(
            (a is None) == (b is None) and (a is None or abs(a - b) < 1e-4)  # rounded to six digits there
            for a, b in zip(expected, now, strict=True)
        )
    )
    if not fits:
        raise DataError(
            f"{path}: expected the MDS scores of the run, got others from the same pairs and head; run the modality "
            "study again"
        )
