"""What attention heads write, named by texts."""

from mmhooks.studies.decomposition.study import Options, run

__all__ = ["Options", "run"]
