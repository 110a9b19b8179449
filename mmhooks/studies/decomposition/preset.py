"""The settings of the decomposition paper, as the decomposition study takes them with ``--paper``."""

from __future__ import annotations

from mmhooks.studies.common.paper_settings import PaperSetting, Preset
from mmhooks.studies.common.papers import DECOMPOSITION, clip_of_decomposition

PAPER = Preset(
    DECOMPOSITION,
    (
        *clip_of_decomposition(),
        PaperSetting(
            "ImageNet's validation images", "Sections 3 and 4", "data",
            lacking="they need an account: --data FOLDER/ with metadata.csv (file_name, and the class name as text)",
        ),
        PaperSetting("all 50,000 of them", "Section 3", "limit", 50_000),
        PaperSetting(
            "3,498 sentences by ChatGPT", "Section 4", "pool", "general",
            "these are not shipped: our own pool of general texts; their file is read by --pool FILE",
        ),
        PaperSetting("20 texts per attention head", "public code", "texts", 20),
        PaperSetting("attention heads of the last four layers", "Sections 3 and 4", "layers", 4),
        PaperSetting("TextSpan by inner products", "Section 4, Algorithm 1", "selection", "paper"),
        PaperSetting("mean-ablation of direct effects", "Section 3", "live", False),
        PaperSetting(
            "accuracy among 1,000 classes in 80 prompts", "Section 3",
            lacking="accuracy is among the distinct texts of the evaluated images, each text as it is",
        ),
        PaperSetting(
            "means and accuracies over the same images", "Section 3", "evaluate", 50_000,
            "accuracies over a held-out fifth, means over the others, so that an ablation does not see its test",
        ),
    ),
)  # fmt: skip
