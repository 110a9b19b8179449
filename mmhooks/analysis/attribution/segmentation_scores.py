"""Segmentation scores of maps against masks: pixel accuracy, mIoU and average precision per image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.errors import NotFinite, ShapeMismatch


@dataclass(frozen=True)
class SegmentationScores(Result):
    """Scores per image; the properties are their means with bootstrap intervals over images.

    For pixel accuracy and the mean IoU of object and background the map is thresholded at its own mean (as in Chefer
    et al. 2021); average precision ranks the pixels. IoU is averaged over images, so that each counts the same.
    """

    name: str
    pixel_accuracies: Float[Tensor, " n"] = field(repr=False)
    ious: Float[Tensor, " n"] = field(repr=False)
    precisions: Float[Tensor, " n"] = field(repr=False)
    seed: int = 0

    @property
    def pixel_accuracy(self) -> Estimate:
        return bootstrap(self.pixel_accuracies, seed=self.seed)

    @property
    def miou(self) -> Estimate:
        return bootstrap(self.ious, seed=self.seed)

    @property
    def map(self) -> Estimate:
        return bootstrap(self.precisions, seed=self.seed)

    def beyond(self, other: SegmentationScores) -> Estimate:
        """Paired difference of mIoU to another method on the same images."""
        if len(self.ious) != len(other.ious):
            raise ShapeMismatch(
                f"expected the same images, got {len(self.ious)} of {self.name}, {len(other.ious)} of {other.name}"
            )
        return bootstrap(self.ious - other.ious, seed=self.seed)


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
    predicted = large > large.mean(1, keepdim=True)
    right = (predicted == flat).float().mean(1)
    return SegmentationScores(
        name,
        right,
        (_iou(predicted, flat) + _iou(~predicted, ~flat)) / 2,
        average_precision(large, flat),
        seed,
    )


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
            "mAP": str(s.map),
        }
        for s in scores
    )


def _iou(one: Bool[Tensor, "n k"], other: Bool[Tensor, "n k"]) -> Float[Tensor, " n"]:
    return (one & other).sum(1) / (one | other).sum(1).clamp_min(1)
