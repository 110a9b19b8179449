"""Case study 2: attacks through the image, and the alignment defence."""

from mmhooks.studies.adversarial.study import Options, run

__all__ = ["Options", "run"]
