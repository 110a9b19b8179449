"""Ablation of attention heads that carry a spurious background."""

from mmhooks.studies.spurious.study import Options, run

__all__ = ["Options", "run"]
