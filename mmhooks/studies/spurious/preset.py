"""The settings of the decomposition paper on Waterbirds, as the spurious-cue study takes them with ``--paper``."""

from __future__ import annotations

from mmhooks.studies.common.paper_settings import PaperSetting, Preset
from mmhooks.studies.common.papers import DECOMPOSITION, clip_of_decomposition

PAPER = Preset(
    DECOMPOSITION,
    (
        *clip_of_decomposition(),
        PaperSetting(
            "Waterbirds (Sagawa et al., 2020)", "Section 4", "data",
            lacking="the user's own copy: --data, with splits validation and test and columns image, y, place",
        ),
        PaperSetting("land birds and water birds", "Section 4", "classes", "a landbird,a waterbird"),
        PaperSetting(
            "3,498 sentences by ChatGPT", "Section 4", "pool", "general",
            "these are not shipped: our own pool of general texts, whose kinds are known",
        ),
        PaperSetting(
            "attention heads that people read as geographic locations", "Section 4", "kinds", "place",
            "no reading by hand: heads whose texts are of the pool's kind “place” span much variance",
        ),
        PaperSetting("attention heads of the last four layers", "Section 4", "layers", 4),
        PaperSetting("TextSpan by inner products", "Section 4, Algorithm 1", "selection", "paper"),
        PaperSetting("one evaluation on the test images", "Section 4", "splits", 1),
        PaperSetting(
            "heads chosen with the evaluated images in view", "Section 4",
            lacking="heads are chosen on the validation split and evaluated on the test split",
        ),
    ),
)  # fmt: skip
