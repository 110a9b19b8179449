"""Writes the papers' settings, as the studies take them with ``--paper``, into docs/paper-settings.md between its markers.

PYTHONPATH=recipes python -m publish.paper_settings
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.report import Table
from mmhooks.studies.common.options import typed_options
from publish.marked_block import fill

ROOT = Path(__file__).parents[2]
STUDIES = ("modality", "gender", "adversarial", "generation", "decomposition", "segmentation", "spurious")


def block() -> str:
    """Returns one table per study: the paper's setting, where it says so, the option and its value, what is lacking."""
    return "\n\n".join(f"## {study.capitalize()}\n\n{table(study).markdown()}" for study in STUDIES)


def table(study: str) -> Table:
    """Returns the settings of one study's preset."""
    options: Any = import_module(f"mmhooks.studies.{study}.options").Options
    typed = typed_options(options.of_paper())
    rows = []
    for s in options.PAPER.settings:
        here = "–" if s.option is None else " ".join(typed[s.option])
        if s.option is not None and s.value is None:
            here = f"{(typed[s.option] or [f'--{s.option}'])[0]} …"
        rows.append([s.paper, s.source, here, f"not stated; {s.lacking}" if not s.stated else s.lacking])
    columns = ["In the paper", "Source", "With --paper", "What is lacking"]
    return Table(
        columns, rows, f"`recipes/{study}.py --paper`: {options.PAPER.paper}", text_columns=(0, 1, 2, 3)
    )


def main(
    page: Annotated[Path, typer.Option(help="The page with the two markers.")] = ROOT
    / "docs/paper-settings.md",
) -> None:
    """Fills the page."""
    fill(page, block())


if __name__ == "__main__":
    typer.run(main)
