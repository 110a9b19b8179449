"""How many participants and features a study with people needs: before the export, and from answers that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmhooks.analysis.statistics.crossed import Spread, detectable_difference, items_needed
from mmhooks.report import Cell, Table

PLANNED_RATERS = (5, 10, 20, 40)
PLANNED_DIFFERENCES = (0.1, 0.15, 0.2, 0.3)


def plan(spread: Spread | None = None) -> list[dict[str, Any]]:
    """For numbers of participants, how many features of each group a difference needs at 80 % power (None: too many).

    >>> [row["raters"] for row in plan()]
    [5, 10, 20, 40]
    """
    return [
        {"raters": n} | {f"{d:g}": items_needed(d, n, spread) for d in PLANNED_DIFFERENCES}
        for n in PLANNED_RATERS
    ]


def power_table(rows: Sequence[Mapping[str, Any]], note: str) -> Table:
    """The features that each group needs, by participants and by the difference to be detected."""
    columns = [f"{100 * d:g} points" for d in PLANNED_DIFFERENCES]
    body: list[Sequence[str | Cell]] = [
        [str(row["raters"]), *("–" if (n := row[f"{d:g}"]) is None else str(n) for d in PLANNED_DIFFERENCES)]
        for row in rows
    ]
    return Table(["participants", *columns], body, "Features of each group for 80 % power", note)


def export_power(features: int, raters: Sequence[int] = PLANNED_RATERS) -> list[tuple[int, float]]:
    """What an export detects: by participants, the smallest difference of two groups at 80 % power, before any answer."""
    return [(n, detectable_difference(n, features)) for n in raters] if features >= 2 else []
