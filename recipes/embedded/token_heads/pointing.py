"""Whether features of patches are hottest on what a picture shows: hits, against matched features and other pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.intervals import from_draws
from mmhooks.analysis.statistics.resampling import bootstrap_ratio, resampled_sums
from mmhooks.errors import MMHooksError
from mmhooks.heads import Head

ACTIVE_IN = 20  # pictures in which a feature must be active to be chosen


@dataclass(frozen=True, eq=False)
class Pictures:
    """Patch activations of pictures, and where their objects are.

    Attributes:
        heat: of every feature at every patch.
        covered: the share of every patch that an object covers; ``middle``: whether its middle pixel lies on one.
    """

    heat: Float[Tensor, "n side side2 f"]
    covered: Float[Tensor, "n side side2"]
    middle: Bool[Tensor, "n side side2"]

    @property
    def active(self) -> Bool[Tensor, "n f"]:
        return self.heat.flatten(1, 2).amax(1) > 0

    def shares(self) -> Float[Tensor, " f"]:
        """Of each feature's activation, the mean share on objects over the pictures where it is active; NaN if nowhere."""
        inside = torch.einsum("nhwf,nhw->nf", self.heat, self.covered) / self.heat.sum((1, 2))
        return inside.nanmean(0)

    def hits(self, *, of: Int[Tensor, " n2"] | None = None) -> Float[Tensor, "n f"]:
        """1 where the middle of a feature's hottest patch lies on an object, of another picture if ``of`` names these; 0 too
        where it is not active."""
        middle = (self.middle if of is None else self.middle[of]).flatten(1)
        peaks = self.heat.flatten(1, 2).argmax(1)
        return (middle.gather(1, peaks) & self.active).float()


@torch.no_grad()
def pictures(
    head: Head, rows: Float[Tensor, "n patches d"], masks: Bool[Tensor, "n height width"]
) -> Pictures:
    """Runs a head over the patches of pictures whose grid covers the masks evenly."""
    side = round(rows.shape[1] ** 0.5)
    size = masks.shape[-1] // side
    if side * side != rows.shape[1] or masks.shape[1:] != (side * size, side * size):
        raise MMHooksError(
            f"expected a square grid of patches and masks of whole patches, got {rows.shape[1]} patches and masks of "
            f"{tuple(masks.shape[1:])}"
        )
    heat = torch.cat([head.encode(part.float()) for part in rows.split(64)]).unflatten(1, (side, side))
    covered = avg_pool2d(masks[:, None].float(), size)[:, 0]
    return Pictures(heat, covered, masks[:, size // 2 :: size, size // 2 :: size])


def best_features(chosen_on: Pictures, count: int) -> Int[Tensor, " count"]:
    """The features with most of their activation on objects, among those active in at least ``ACTIVE_IN`` pictures.

    Raises:
        MMHooksError: fewer than twice as many features are active so often: none would be left to compare with.
    """
    enough = chosen_on.active.sum(0) >= ACTIVE_IN
    if int(enough.sum()) < 2 * count:
        raise MMHooksError(
            f"expected at least {2 * count} features active in {ACTIVE_IN} pictures, got {int(enough.sum())}"
        )
    shares = chosen_on.shares().masked_fill(~enough, -1.0)
    return shares.topk(count).indices


def matched_features(
    chosen_on: Pictures, best: Int[Tensor, " count"], *, near: int = 8, seed: int = 0
) -> Int[Tensor, " count"]:
    """For each feature another one, not among the best and none twice, drawn from the ``near`` that are active in about as
    many pictures."""
    rng = torch.Generator().manual_seed(seed)
    often = chosen_on.active.sum(0)
    free = often > 0
    free[best] = False
    found: list[int] = []
    for feature in best.tolist():
        distance = (often - often[feature]).abs().masked_fill(~free, int(often.max()) + 1)
        close = distance.argsort(stable=True)[: min(near, int(free.sum()))]
        found.append(int(close[torch.randint(len(close), (1,), generator=rng)]))
        free[found[-1]] = False
    return torch.tensor(found)


def game(
    chosen_on: Pictures, tested_on: Pictures, families: Int[Tensor, " n"], *, count: int = 32, seed: int = 0
) -> dict[str, Any]:
    """The pointing game of the best features, chosen on some pictures and tested on others.

    ``hits``: over every picture and best feature that is active in it, how often the middle of the hottest patch lies on an
    object. ``matched``: the same of other features that are active as often. ``elsewhere``: the same heat on the objects of
    a picture of another family. ``chance``: the share of patches whose middle lies on one. Intervals are over families.
    """
    best = best_features(chosen_on, count)
    matched = matched_features(chosen_on, best, seed=seed)
    other = _of_other_families(families, seed)
    active = tested_on.active.float()
    rows = {
        "hits": (tested_on.hits()[:, best].sum(1), active[:, best].sum(1)),
        "matched": (tested_on.hits()[:, matched].sum(1), active[:, matched].sum(1)),
        "elsewhere": (tested_on.hits(of=other)[:, best].sum(1), active[:, best].sum(1)),
    }
    found: dict[str, Any] = {
        name: bootstrap_ratio(*sums, families, seed=seed).to_json() for name, sums in rows.items()
    }
    for name in ("matched", "elsewhere"):
        found[f"hits_minus_{name}"] = _difference(rows["hits"], rows[name], families, seed).to_json()
    weights = active[:, best].sum(1)
    chance = tested_on.middle.float().mean((1, 2)) * weights
    return found | {
        "chance": bootstrap_ratio(chance, weights, families, seed=seed).to_json(),
        "features": best.tolist(),
        "pictures": len(families),
        "families": len(families.unique()),
    }


def _difference(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], families: Int[Tensor, " n"], seed: int
) -> Estimate:
    """Of two ratios of sums, over the same resamples."""
    columns = torch.stack([*one, *other], 1)
    drawn, total = resampled_sums(columns, families, seed=seed), columns.double().sum(0)
    value = float(total[0] / total[1] - total[2] / total[3])
    return from_draws(value, drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3], len(families))


def _of_other_families(families: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """For each picture the number of a random one of another family."""
    rng = torch.Generator().manual_seed(seed)
    if len(families.unique()) < 2:
        raise MMHooksError("expected pictures of at least two families, got one")
    found = torch.randint(len(families), families.shape, generator=rng)
    while bool((same := families[found] == families).any()):
        found[same] = torch.randint(len(families), (int(same.sum()),), generator=rng)
    return found
