"""Case study 1: gender, zero-masked."""

from mmhooks.studies.gender.study import Options, run

__all__ = ["Options", "run"]
