"""Case study 3: interpolation of features in the conditioner of a text-to-image model."""

from mmhooks.studies.generation.study import Options, run

__all__ = ["Options", "run"]
