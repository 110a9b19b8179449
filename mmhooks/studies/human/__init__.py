"""A study with people: intruder and naming tasks of features as one page, and the analysis of the answers."""

from mmhooks.studies.human.analysis import analyse
from mmhooks.studies.human.export import export
from mmhooks.studies.human.options import Options

__all__ = ["Options", "analyse", "export"]
