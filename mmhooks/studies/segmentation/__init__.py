"""Zero-shot segmentation by the contributions of image tokens."""

from mmhooks.studies.segmentation.study import Options, run

__all__ = ["Options", "run"]
