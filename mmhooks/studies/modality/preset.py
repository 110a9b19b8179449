"""The settings of Section 2 of the paper, as the modality study takes them with ``--paper``."""

from __future__ import annotations

from mmhooks.studies.common.paper_settings import PaperSetting, Preset
from mmhooks.studies.common.papers import CC3M_SHARE, MULTI_FACETED, clip_of_section_2, heads_of_section_2

PAPER = Preset(
    MULTI_FACETED,
    (
        *clip_of_section_2(),
        PaperSetting(
            "DeCLIP ViT-B/32 (Li et al., 2022)", "Section 2", "declip",
            lacking="its weights are the user's own file: --declip FILE; without it the study has three models",
        ),
        PaperSetting("images and texts of CC3M", "Tables 3–5, Section 3.1", "data", "cc3m", CC3M_SHARE),
        *heads_of_section_2(),
        PaperSetting(
            "an NCL head, an MLP of a similar size", "Section 2.1, Equation 4", "ncl", "train",
            "its widths and training are not stated: one hidden layer as in Equation 4, our optimiser and epochs",
        ),
        PaperSetting(
            "the top m samples of a feature", "Section 2.2", "top_m", 20, "20 is ours", stated=False
        ),
        PaperSetting("samples ranked by the feature itself", "Section 2.2", "activation", "raw"),
        PaperSetting("m samples of every feature, whether active or not", "Section 2.2", "zeros", "keep"),
        PaperSetting("every sample counts by itself", "Section 2.2", "family", "none"),
        PaperSetting("ViT-B-16-224-in21k for images", "Section 2.2, footnote 1", "image_embedder", "vit-b16-in21k"),
        PaperSetting("all-MiniLM-L6-v2 for texts", "Section 2.2, footnote 1", "text_embedder", "minilm"),
        PaperSetting("one training of each head", "Section 2", "seeds", 1),
        PaperSetting(
            "EmbedSim as the mean of element-wise ratios", "Section 2.2, Equation 5",
            lacking="printed beside (forms of EmbedSim); tables show the ratio of means, as single ratios divide by nearly 0",
        ),
    ),
)  # fmt: skip
