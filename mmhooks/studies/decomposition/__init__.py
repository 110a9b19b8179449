"""Contributions of CLIP's attention heads, described by texts."""

from mmhooks.studies.decomposition.study import Options, run

__all__ = ["Options", "run"]
