"""The settings of Section 3.3 of the paper, as the generation study takes them with ``--paper``."""

from __future__ import annotations

from mmhooks.studies.common.paper_settings import PaperSetting, Preset
from mmhooks.studies.common.papers import MULTI_FACETED

PAPER = Preset(
    MULTI_FACETED,
    (
        PaperSetting("Stable Diffusion v2", "Section 3.3", "pipeline", "stabilityai/stable-diffusion-2"),
        PaperSetting("its feature extractor, CLIP ViT-H-14", "Section 3.3", "model", "ViT-H-14"),
        PaperSetting("laion2B-s32B-b79K", "Section 3.3", "pretrained", "laion2b_s32b_b79k"),
        PaperSetting(
            "MDS over COCO 2017", "Section 3.3", "data", "coco", "5,000 validation images; which part is not stated"
        ),
        PaperSetting("“Please draw an animal”", "Section 3.3", "prompt", "Please draw an animal"),
        PaperSetting(
            "a reference image of a horse", "Section 3.3, Figure 7", "reference",
            lacking="the paper's image is not shipped: --reference horse.png; without it references are the data's",
        ),
        PaperSetting("features by the joint space's MDS", "Section 3.3", "joint", True),
        PaperSetting(
            "R in place of T at these features", "Section 3.3", "mode", ("naive",),
            "how a pooled embedding enters 77 tokens is not said: on every token, at the tokens' norm",
        ),
        PaperSetting(
            "ten interpolation weights from 0 to 0.9", "Section 3.3, Figure 8", "strength",
            (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            "the formula counts α as what is kept of T, the text as the strength of the intervention: strengths 0 to 0.9",
        ),
        PaperSetting("whole groups", "Section 3.3", "whole", True),
        PaperSetting("denoising steps", "Section 3.3", "steps", 50, "50, diffusers' default", stated=False),
        PaperSetting("guidance", "Section 3.3", "guidance", 7.5, "7.5, diffusers' default", stated=False),
        PaperSetting(
            "one image per weight, no random features", "Figure 8",
            lacking="several noises (--pairs), measured, against random sets of features (--random-sets)",
        ),
    ),
)  # fmt: skip
