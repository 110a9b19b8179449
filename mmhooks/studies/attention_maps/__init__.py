"""Where in a generated image the words of its prompt act."""

from mmhooks.studies.attention_maps.study import Options, run

__all__ = ["Options", "run"]
