"""The dictionaries of the adversarial study: sparse heads and the model's own dimensions, with the scores of their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mmhooks as mm
from mmhooks.analysis.measures.groups import groups_of
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.studies.adversarial.options import Options
from mmhooks.studies.adversarial.samples import attacked_families, unattacked_rows
from mmhooks.studies.common.encode import SIDES, encode, unit
from mmhooks.studies.common.heads import load_or_train_head
from mmhooks.studies.common.placement import on_device_of
from mmhooks.utils.digest import digest

RAW, TRAIN = "raw", "train"
SITE = "image.embed"
# The first is the one that the study's primary hypotheses are about.
SHIPPED = {
    "mini": ("mini/sae", "mini/sae-seed1", "mini/sae-wide", RAW),
    "mini-reader": ("mini-reader/sae", "mini-reader/sae-seed1", "mini-reader/sae-seed2", RAW),
}


@dataclass(frozen=True)
class Dictionary:
    """Features that images are aligned on.

    Attributes:
        name: as asked for: a head's, "train", or "raw" for the model's own dimensions.
        mds: scores over pairs of no attacked family.
        unseen: whether its head was trained without any family that is attacked; None: its card does not say.
    """

    name: str
    mds: Any = field(repr=False)
    head: Any = field(default=None, repr=False)
    unseen: bool | None = None

    @property
    def site(self) -> str:
        """Where its features are read: those of a TopK head before TopK, as a latent that was not chosen has no gradient."""
        return SITE if self.head is None else f"{SITE}.sae.pre"

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        if self.head is None:
            yield
            return
        model.attach(on_device_of(model, self.head), at=[SITE], name="sae")
        try:
            yield
        finally:
            model.detach("sae")

    def to_json(self) -> dict[str, Any]:
        groups, rule = groups_of(self.mds)
        return {
            "name": self.name,
            "id": "" if self.head is None else self.head.id,
            "features": len(self.mds.R),
            "smallest": smallest_group_size(self.mds),
            "groups": {g: len(f) for g, f in groups.items()},
            "rule": rule,
            "alive": int(self.mds.alive.sum()),
            "unseen": self.unseen,
        }


def smallest_group_size(mds: Any) -> int:
    """Returns the number of features of the smallest group."""
    return min(len(f) for f in groups_of(mds)[0].values())


def feature_masks(mds: Any, k: int, n: int, *, seed: int, draw: int = 0) -> dict[str, torch.Tensor]:
    """Draws ``k`` features per sample from each group and from all alive features; each ``draw`` gives others."""
    from mmhooks.analysis.attacks.align import samples_of

    groups, _ = groups_of(mds)
    alive = mm.FeatureSet(mds.alive, len(mds.alive), name="alive", head=mds.head)
    own = 1_009 * draw + 2 * seed
    chosen = {g: samples_of(groups[g], k, n, seed=own) for g in GROUPS}
    return {**chosen, "random": samples_of(alive, k, n, seed=own + 1)}


def names_of(options: Options) -> Sequence[str]:
    """Returns the dictionaries asked for; else the embedded model's own, or one trained here, and its dimensions."""
    return options.head or SHIPPED.get(options.model, (TRAIN, RAW))


def load_dictionaries(model: Any, pairs: Any, options: Options, *, cache: Path) -> list[Dictionary]:
    """Loads the dictionaries, or trains them on pairs of families that are not attacked, and scores their features there.

    Raises:
        DataError: no such pairs. MMHooksError: a name twice.
    """
    names = names_of(options)
    if len(set(names)) < len(names):
        raise mm.errors.MMHooksError(
            f"--head: expected every dictionary once, got {', '.join(names)}; leave out the second"
        )
    encoded = encode(model, options.model, pairs, cache, batch=128, progress=not options.quiet)
    rows = unattacked_rows(pairs)
    image, text = (unit(encoded.vectors(side, rows)) for side in SIDES)
    found = []
    for name in names:
        if name == RAW:
            found.append(Dictionary(name, mm.mds(image, text, kind="abs", data=pairs.name)))
            continue
        head, unseen = _head(name, image, text, options, cache)
        with torch.no_grad():
            latents = [head.encode(head.prepare(side)) for side in (image, text)]
        found.append(Dictionary(name, mm.mds(*latents, head=head, data=pairs.name), head, unseen))
    return found


def _head(
    name: str, image: torch.Tensor, text: torch.Tensor, options: Options, cache: Path
) -> tuple[Any, bool | None]:
    """Returns a head, and whether it was trained without the families that are attacked."""
    if name != TRAIN:
        head = mm.load_head(name)
        without = head.info.get("without_families")
        return head, None if without is None else set(without) >= set(attacked_families())
    n, epochs, seed = options.features, options.epochs, options.seed
    torch.manual_seed(seed)
    untrained = mm.TopKSAE(image.shape[1], n, min(32, n // 4))
    folder = cache / f"attack-sae-{digest(epochs, n, seed, image, text)[:20]}"
    return load_or_train_head(folder, untrained, image, text, epochs=epochs, seed=seed), True
