"""Segmentation scores of maps against masks: pixel accuracy, mIoU and average precision per image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap, from_draws
from mmhooks.errors import NotFinite, ShapeMismatch


@dataclass(frozen=True)
class SegmentationScores(Result):
    """Scores of one method's maps, with bootstrap intervals over images.

    Negative values speak against the object: they count as 0 before a map is cut at its own mean, as in the public
    code of Gandelsman et al. 2024. Pixel accuracy, ``miou`` and ``pooled_miou`` are of that cut.

    Attributes:
        pixel_accuracies, ious: per image; IoU is the mean of object and background.
        precisions: per image, average precision of the object's pixels, all values ranked.
        public_precisions: per image, as the public code computes it: object and background pooled into one ranking,
            from the map between 0 and its maximum and from 1 minus that.
        areas: per image, pixels of intersection and union, of object and of background.
    """

    name: str
    pixel_accuracies: Float[Tensor, " n"] = field(repr=False)
    ious: Float[Tensor, " n"] = field(repr=False)
    precisions: Float[Tensor, " n"] = field(repr=False)
    public_precisions: Float[Tensor, " n"] = field(repr=False)
    areas: Float[Tensor, "n 2 2"] = field(repr=False)
    seed: int = 0

    @property
    def pixel_accuracy(self) -> Estimate:
        return bootstrap(self.pixel_accuracies, seed=self.seed)

    @property
    def miou(self) -> Estimate:
        """Mean over images, so that each counts the same."""
        return bootstrap(self.ious, seed=self.seed)

    @property
    def pooled_miou(self) -> Estimate:
        """Intersections over unions of all images together, as published tables count: large objects count more."""
        return pooled(self.areas, seed=self.seed)

    @property
    def map(self) -> Estimate:
        return bootstrap(self.precisions, seed=self.seed)

    @property
    def public_map(self) -> Estimate:
        return bootstrap(self.public_precisions, seed=self.seed)

    def beyond(self, other: SegmentationScores) -> Estimate:
        """Paired difference of mIoU to another method on the same images."""
        if len(self.ious) != len(other.ious):
            raise ShapeMismatch(
                f"expected the same images, got {len(self.ious)} of {self.name}, {len(other.ious)} of {other.name}"
            )
        return bootstrap(self.ious - other.ious, seed=self.seed)


def pooled(areas: Float[Tensor, "n 2 2"], *, seed: int = 0, draws: int = 2000) -> Estimate:
    """Computes the mean IoU of object and background over all images together, with a bootstrap over images.

    Args:
        areas: per image, intersection and union, of object and of background.
    """

    def miou(total: Tensor) -> Tensor:
        return (total[..., 0, :] / total[..., 1, :].clamp_min(1)).mean(-1)

    n = len(areas)
    generator = torch.Generator().manual_seed(seed)
    # How often each image was drawn: a sum over draws is then one product.
    picks = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones_like(picks).double()
    )
    drawn = miou((counts @ areas.double().flatten(1)).view(draws, 2, 2))
    return from_draws(float(miou(areas.double().sum(0))), drawn, n)


def segmentation_scores(
    maps: Float[Tensor, "n r s"], masks: Bool[Tensor, "n2 h w"], *, name: str = "", seed: int = 0
) -> SegmentationScores:
    """Scores maps of any size (resized bilinearly) against masks.

    Raises:
        ShapeMismatch: the numbers of maps and masks differ, or a mask is all object or all background.
        NotFinite: a map holds NaN or infinity.

    >>> perfect = torch.eye(4).bool()[None]
    >>> segmentation_scores(perfect.float(), perfect).ious
    tensor([1.])
    """
    if len(maps) != len(masks):
        raise ShapeMismatch(f"expected one map per mask, got {len(maps)} maps for {len(masks)} masks")
    if not bool(torch.isfinite(maps).all()):
        raise NotFinite(f"maps of {name}: {int((~torch.isfinite(maps)).sum())} numbers are NaN or infinite")
    flat = masks.flatten(1)
    uniform = flat.all(1) | ~flat.any(1)
    if bool(uniform.any()):
        raise ShapeMismatch(
            f"masks: expected object and background in each, got mask {int(uniform.nonzero()[0])}, which is all one of them"
        )
    large = interpolate(maps[:, None], masks.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
    for_object = large.clamp_min(0)
    predicted = for_object > for_object.mean(1, keepdim=True)
    both = torch.stack([predicted, ~predicted], 1), torch.stack([flat, ~flat], 1)
    areas = torch.stack([(both[0] & both[1]).sum(2), (both[0] | both[1]).sum(2)], 1).double()
    return SegmentationScores(
        name,
        (predicted == flat).float().mean(1),
        (areas[:, 0] / areas[:, 1].clamp_min(1)).mean(1).float(),
        average_precision(large, flat),
        average_precision(*_both_ranked(for_object, flat)),
        areas,
        seed,
    )


def _both_ranked(
    for_object: Float[Tensor, "n k"], mask: Bool[Tensor, "n k"]
) -> tuple[Float[Tensor, "n k2"], Bool[Tensor, "n k2"]]:
    """Scaled maps and their complements side by side, with what each should find."""
    low, high = for_object.amin(1, keepdim=True), for_object.amax(1, keepdim=True)
    flat_map = high <= low  # the public code's 0/0, which it sets to 0 for object and background
    scaled = torch.where(flat_map, 0.0, (for_object - low) / (high - low).clamp_min(1e-30))
    rest = torch.where(flat_map, 0.0, 1 - scaled)
    return torch.cat([rest, scaled], 1), torch.cat([~mask, mask], 1)


def average_precision(scores: Float[Tensor, "n k"], right: Bool[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Computes per row the mean precision at the ranks of its positive entries; ties share the lowest rank.

    >>> average_precision(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, True]]))
    tensor([0.8333])
    """
    order = scores.argsort(1, descending=True)
    ranked, hits = scores.gather(1, order), right.gather(1, order).double()
    found = hits.cumsum(1)
    last = (
        torch.searchsorted(-ranked.contiguous(), -ranked.contiguous(), right=True) - 1
    )  # of the tied entries
    precision = found.gather(1, last) / (last + 1)
    return ((precision * hits).sum(1) / hits.sum(1)).float()


def scores_table(scores: list[SegmentationScores]) -> Records:
    """Makes a table with one row per method."""
    return Records(
        {
            "method": s.name,
            "pixel accuracy": str(s.pixel_accuracy),
            "mIoU": str(s.miou),
            "pooled mIoU": str(s.pooled_miou),
            "mAP": str(s.map),
            "public mAP": str(s.public_map),
        }
        for s in scores
    )
