"""The options of the decomposition study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from mmhooks.studies.common.options import (
    Device,
    Dtype,
    ImageBatch,
    Out,
    PairData,
    Quiet,
    SelectBy,
    SkipBad,
)
from mmhooks.studies.common.paper_settings import PaperOptions, Preset
from mmhooks.studies.common.placement import AUTO
from mmhooks.studies.decomposition.preset import PAPER

Model = Annotated[str, typer.Option(help="mini, any open_clip name of a ViT, or hf:NAME of transformers.")]
Pretrained = Annotated[
    str | None, typer.Option(help="open_clip's tag, or a checkpoint file; none or '': random weights.")
]
Pool = Annotated[str, typer.Option(help="Texts: general, imagenet, mini, or a file, one a line.")]
Limit = Annotated[int, typer.Option(min=8, help="Use at most this many pairs.")]
Layers = Annotated[int, typer.Option(min=1, help="Attention heads of this many last layers.")]
Texts = Annotated[int, typer.Option(min=1, help="Texts per attention head.")]
Evaluate = Annotated[int, typer.Option(min=2, help="At most this many held-out images in accuracies.")]
Each = Annotated[int, typer.Option(min=1, help="Attention heads, queries and neurons shown.")]
Seed = Annotated[int, typer.Option(help="Of splits, subsets, and the images shown.")]
Live = Annotated[bool, typer.Option("--live/--direct", help="Also ablate live, not only direct effects.")]


@dataclass(frozen=True)
class Options(PaperOptions):
    """What the decomposition study is run with; ``python recipes/decomposition.py --help`` says what each means."""

    PAPER: ClassVar[Preset] = PAPER

    model: Model = "mini"
    pretrained: Pretrained = None
    device: Device = AUTO
    dtype: Dtype = "float32"
    data: PairData = "mini"
    pool: Pool = "general"
    out: Out = Path("runs/decomposition")
    limit: Limit = 2000
    layers: Layers = 4
    texts: Texts = 20
    selection: SelectBy = "paper"
    evaluate: Evaluate = 400
    each: Each = 5
    batch: ImageBatch = 32
    seed: Seed = 0
    live: Live = True
    skip_bad: SkipBad = False
    quiet: Quiet = False
