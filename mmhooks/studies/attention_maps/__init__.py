"""Where in a generated image a word goes."""

from mmhooks.studies.attention_maps.study import Options, run

__all__ = ["Options", "run"]
