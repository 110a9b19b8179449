"""What a study with people compares, fixed in code before anybody answers."""

from __future__ import annotations

from collections.abc import Mapping

from mmhooks.analysis.statistics.primaries import Primary
from mmhooks.studies.human.tasks import CHECK, RANDOM

GROUPS = ("ImgD", "TextD", "CrossD", RANDOM, CHECK)
# What Table 2 of the paper says, with people as the judges, and that people see more in the lists of a group on its own
# side than in random ones: the side that is shown, the group with the higher share of right answers, the other one.
COMPARED = {
    "ImgD against TextD, images": ("image", "ImgD", "TextD"),
    "TextD against ImgD, texts": ("text", "TextD", "ImgD"),
    "ImgD against random lists, images": ("image", "ImgD", RANDOM),
    "TextD against random lists, texts": ("text", "TextD", RANDOM),
}
PRIMARIES = tuple(Primary(name, "greater") for name in COMPARED)


def undecidable(tasks: Mapping[tuple[str, str], int]) -> list[str]:
    """The comparisons that no number of participants can decide: a group with fewer than two intruder tasks.

    Args:
        tasks: intruder tasks by side and group.
    """
    return [
        name
        for name, (side, *groups) in COMPARED.items()
        if min(tasks.get((side, group), 0) for group in groups) < 2
    ]
