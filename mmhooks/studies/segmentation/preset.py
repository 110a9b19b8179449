"""The settings of the decomposition paper's segmentation, as the segmentation study takes them with ``--paper``."""

from __future__ import annotations

from mmhooks.studies.common.paper_settings import PaperSetting, Preset
from mmhooks.studies.common.papers import DECOMPOSITION, clip_of_decomposition

PAPER = Preset(
    DECOMPOSITION,
    (
        *clip_of_decomposition(),
        PaperSetting(
            "ImageNet-Segmentation (Guillaumin et al., 2014)", "Section 5", "data",
            lacking="the user's own file: --data gtsegs_ijcv.mat",
        ),
        PaperSetting("all 4,276 images", "Section 5", "limit", 4276),
        PaperSetting("the class predicted among ImageNet's 1,000", "public code", "classes", "imagenet"),
        PaperSetting("gradient attention from the first block", "Chefer et al., 2021", "chefer_start", 0),
        PaperSetting(
            "GradCAM, LRP and partial LRP as baselines", "Section 5",
            lacking="raw attention, rollout, gradient attention (Chefer et al.) and LeGrad instead",
        ),
    ),
)  # fmt: skip
