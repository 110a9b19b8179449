"""The options of the export, each one field with its annotation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

Run = Annotated[Path, typer.Option(help="Folder of a run of mmhooks study modality.")]
Out = Annotated[
    Path, typer.Option(help="Folder of tasks.html, for participants, and key.json, for you only.")
]
StudyModelName = Annotated[
    Literal["CLIP+SAE", "CLIP+NCL"],
    typer.Option("--study-model", help="The run's model whose features are shown."),
]
Features = Annotated[int, typer.Option(min=2, help="Intruder tasks of each group and side.")]
Names = Annotated[int, typer.Option(min=0, help="Naming tasks of each group and side.")]
Lists = Annotated[int, typer.Option(min=2, help="Lists of random samples of each side: the control.")]
Checks = Annotated[int, typer.Option(min=0, help="Attention checks of each side.")]
Shown = Annotated[int, typer.Option(min=2, max=8, help="Samples of the feature in an intruder task.")]
Seed = Annotated[int, typer.Option(help="Of features, intruders and places.")]
Pixels = Annotated[int, typer.Option(min=32, help="Longest side of the images, in pixels.")]


@dataclass(frozen=True)
class Options:
    """What is exported; ``mmhooks human export --help`` says what each option means."""

    run: Run = Path("runs/modality")
    out: Out = Path("runs/human")
    study_model: StudyModelName = "CLIP+SAE"
    features: Features = 12
    names: Names = 4
    lists: Lists = 8
    checks: Checks = 2
    shown: Shown = 4
    seed: Seed = 0
    pixels: Pixels = 128
