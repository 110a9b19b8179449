"""Which features belong to images, to texts, or to both (Section 2 of the paper)."""

from mmhooks.studies.modality.study import Options, run

__all__ = ["Options", "run"]
