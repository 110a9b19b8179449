"""Zero-shot segmentation by token contributions."""

from mmhooks.studies.segmentation.study import Options, run

__all__ = ["Options", "run"]
