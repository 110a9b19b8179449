"""Attention heads that carry the background, ablated."""

from mmhooks.studies.spurious.study import Options, run

__all__ = ["Options", "run"]
