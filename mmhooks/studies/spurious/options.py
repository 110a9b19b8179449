"""The options of the spurious-cue study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from mmhooks.studies.common.options import (
    Device,
    Dtype,
    ImageBatch,
    NoBar,
    Out,
    Pretrained,
    SelectBy,
    VitModel,
)
from mmhooks.studies.common.paper_settings import PaperOptions, Preset
from mmhooks.studies.common.placement import AUTO
from mmhooks.studies.spurious.preset import PAPER

Data = Annotated[
    str,
    typer.Option(help="mini, or what datasets loads: splits validation and test, columns image, y, place."),
]
Classes = Annotated[str, typer.Option(help="Texts of both classes, for --data: 'a landbird,a waterbird'.")]
Label = Annotated[str, typer.Option(help="Column of the class, 0 or 1, for --data.")]
Place = Annotated[str, typer.Option(help="Column of the background, 0 or 1, for --data.")]
Species = Annotated[
    str | None,
    typer.Option(
        help="Column of the species, for --data, or of files in one folder per species; none: every image is its own."
    ),
]
Pool = Annotated[str, typer.Option(help="Texts with kinds: general, or a file, one a line.", hidden=True)]
Kinds = Annotated[str, typer.Option(help="Kinds of the text pool that are backgrounds.")]
Correlation = Annotated[
    float, typer.Option(help="Share of animals on their own background, where heads are chosen.")
]
Scale = Annotated[float, typer.Option(help="Width of an animal in its image.")]
Layers = Annotated[int, typer.Option(min=1, help="Attention heads of this many last layers are considered.")]
Limit = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Images for choosing heads, and for evaluation, in every split; none: 400 drawn, or all of --data.",
    ),
]
Splits = Annotated[
    int,
    typer.Option(
        min=1, help="Splits of the drawn animals into those for choosing and for evaluation, pooled."
    ),
]
Draws = Annotated[int, typer.Option(min=2, help="Random sets ablated live, in every split.")]
DirectDraws = Annotated[int, typer.Option(min=20, help="Random sets of which direct effects are ablated.")]
Seed = Annotated[int, typer.Option(help="Of images, bootstrap and random attention heads.")]


@dataclass(frozen=True)
class Options(PaperOptions):
    """What the spurious-cue study is run with; ``python recipes/spurious.py --help`` says what each option means."""

    PAPER: ClassVar[Preset] = PAPER

    model: VitModel = "mini"
    pretrained: Pretrained = None
    device: Device = AUTO
    dtype: Dtype = "float32"
    data: Data = "mini"
    classes: Classes = "a landbird,a waterbird"
    label: Label = "y"
    place: Place = "place"
    species: Species = None
    pool: Pool = "general"
    kinds: Kinds = "place,weather"
    selection: SelectBy = "paper"
    correlation: Correlation = 0.95
    scale: Scale = 0.5
    layers: Layers = 4
    limit: Limit = None
    splits: Splits = 4
    draws: Draws = 10
    direct_draws: DirectDraws = 1000
    seed: Seed = 0
    batch: ImageBatch = 64
    out: Out = Path("runs/spurious")
    quiet: NoBar = False
