"""Case study 1: features that carry a gender, zero-masked."""

from mmhooks.studies.gender.study import Options, run

__all__ = ["Options", "run"]
