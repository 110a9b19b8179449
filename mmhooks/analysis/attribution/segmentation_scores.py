"""How well maps find a mask: pixel accuracy, mIoU and average precision of every picture."""

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
    """Of every picture, and their means with bootstrap intervals over pictures.

    Pixel accuracy and the mean IoU of object and ground are of the map cut at its own mean (as in Chefer et al.
    2021); average precision ranks the pixels. IoU is averaged over pictures, so that each counts the same.
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
        """mIoU above another method's on the same pictures; paired."""
        if len(self.ious) != len(other.ious):
            raise ShapeMismatch(f"{self.name} has {len(self.ious)} pictures, {other.name} {len(other.ious)}")
        return bootstrap(self.ious - other.ious, seed=self.seed)


def segmentation_scores(
    maps: Float[Tensor, "n r s"], masks: Bool[Tensor, "n2 h w"], *, name: str = "", seed: int = 0
) -> SegmentationScores:
    """Maps of any size (stretched bilinearly) against masks.

    Raises:
        ShapeMismatch: other numbers of maps and masks, or a mask that is all object or all ground.
        NotFinite: NaN or infinity in a map.

    >>> perfect = torch.eye(4).bool()[None]
    >>> segmentation_scores(perfect.float(), perfect).ious
    tensor([1.])
    """
    if len(maps) != len(masks):
        raise ShapeMismatch(f"{len(maps)} maps for {len(masks)} masks")
    if not bool(torch.isfinite(maps).all()):
        raise NotFinite(f"maps of {name}: {int((~torch.isfinite(maps)).sum())} numbers are NaN or infinite")
    flat = masks.flatten(1)
    plain = flat.all(1) | ~flat.any(1)
    if bool(plain.any()):
        raise ShapeMismatch(
            f"mask {int(plain.nonzero()[0])} is all object or all ground: nothing is to be told apart there"
        )
    large = interpolate(maps[:, None], masks.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
    cut = large > large.mean(1, keepdim=True)
    right = (cut == flat).float().mean(1)
    return SegmentationScores(
        name, right, (_iou(cut, flat) + _iou(~cut, ~flat)) / 2, average_precision(large, flat), seed
    )


def average_precision(scores: Float[Tensor, "n k"], right: Bool[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Of every row, the mean over its right entries of the precision at their rank; equal scores share the lowest.

    >>> average_precision(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, True]]))
    tensor([0.8333])
    """
    order = scores.argsort(1, descending=True)
    ranked, hits = scores.gather(1, order), right.gather(1, order).double()
    found = hits.cumsum(1)
    last = torch.searchsorted(-ranked.contiguous(), -ranked.contiguous(), right=True) - 1  # of those that tie
    precision = found.gather(1, last) / (last + 1)
    return ((precision * hits).sum(1) / hits.sum(1)).float()


def scores_table(scores: list[SegmentationScores]) -> Records:
    """One row a method."""
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
