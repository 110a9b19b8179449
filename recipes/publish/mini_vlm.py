"""Writes mini-vlm's scores from its card into docs/mini-vlm.md, between its two markers.

PYTHONPATH=recipes python -m publish.mini_vlm
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.report import Cell, Table, percent
from mmhooks.utils.assets import card
from publish.marked_block import fill

PAGE = Path(__file__).parents[2] / "docs" / "mini-vlm.md"


def block(scores: Mapping[str, Any]) -> str:
    """Returns the tables of a card: questions about pictures by set of scenes, and requests."""
    return "\n\n".join([*map(_picture_table, *zip(*scores["pictures"].items(), strict=True)),
                        request_table(scores["requests"]).markdown()])  # fmt: skip


def _picture_table(name: str, kinds: Mapping[str, Any]) -> str:
    rows: list[list[str | Cell]] = [
        [kind, _rate(row["right"]), _rate(row["wrong"]), percent(row["chance"]), f"{row['n']:,}"]
        for kind, row in kinds.items()
    ]
    columns = ["Question", "right picture, %", "wrong picture, %", "chance, %", "n"]
    return Table(columns, rows, f"Scenes: {name}", text_columns=(0,)).markdown()


def request_table(requests: Mapping[str, Any]) -> Table:
    """Tabulates how often requests are answered as taught."""
    rows: list[list[str | Cell]] = []
    for name, row in requests.items():
        seen = [row["right"], row["wrong"]] if "right" in row else [row, None]
        rows.append([name, *(_rate(r) if r else "" for r in seen), f"{row['n']:,}"])
    columns = ["Request", "as taught, %", "wrong picture, %", "n"]
    return Table(columns, rows, "Requests: answered word for word as taught", text_columns=(0,))


def _rate(row: Mapping[str, float]) -> Cell:
    return Cell(percent(row["value"]), f"[{percent(row['low'])}, {percent(row['high'])}]")


def main(page: Annotated[Path, typer.Option(help="Where the two markers are.")] = PAGE) -> None:
    """Fills the page from the card; a second call changes nothing."""
    fill(page, block(card("mini-vlm")["exams"]))


if __name__ == "__main__":
    typer.run(main)
