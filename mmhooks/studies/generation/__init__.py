"""Case study 3: interpolating the conditioner of a text-to-image model."""

from mmhooks.studies.generation.study import Options, run

__all__ = ["Options", "run"]
