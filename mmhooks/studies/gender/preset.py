"""The settings of Section 3.1 of the paper, as the gender study takes them with ``--paper``."""

from __future__ import annotations

from mmhooks.studies.common.paper_settings import PaperSetting, Preset
from mmhooks.studies.common.papers import CC3M_SHARE, MULTI_FACETED, clip_of_section_2, heads_of_section_2
from mmhooks.studies.gender.samples import CLASSIFIER

PAPER = Preset(
    MULTI_FACETED,
    (
        *clip_of_section_2(),
        PaperSetting("the CC3M validation set", "Section 3.1", "data", "cc3m", CC3M_SHARE),
        PaperSetting("women and men by a gender classifier", "Section 3.1", "labels", "classifier"),
        PaperSetting("the fashion classifier of touchtech", "Section 3.1, footnote 2", "classifier", CLASSIFIER),
        PaperSetting(
            "the classifier's confidence", "Section 3.1", "confidence", 0.9, "0.9 is ours", stated=False,
        ),
        PaperSetting(
            "how images without people are left out", "Section 3.1", "person", 0.5,
            "a zero-shot probability of 0.5 is ours", stated=False,
        ),
        *heads_of_section_2(),
        PaperSetting("CLIP+SAE alone", "Section 3.1", "ncl", "none"),
        PaperSetting(
            "label embeddings of “female” and “male” inputs", "Section 3.1", "words", "female/male",
            "which inputs is not said: these words in our template; class centroids are printed beside them",
        ),
        PaperSetting(
            "probabilities of the label after masking", "Tables 6 and 7",
            lacking="points and relative changes are both printed, as the two tables do not fit together otherwise",
        ),
        PaperSetting(
            "one random set of features", "Table 6",
            lacking="many random sets of each group's size, as one set decides nothing: --draws",
        ),
    ),
)  # fmt: skip
