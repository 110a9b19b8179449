"""The options of the segmentation study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mmhooks.studies.common.options import ImageBatch, NoBar, Out, Pretrained, VitModel

Data = Annotated[
    str,
    typer.Option(
        help="mini; ImageNet-Segmentation's file gtsegs_ijcv.mat; or a folder with images/NAME.jpg, "
        "masks/NAME.png and classes.csv (file,class)."
    ),
]
Limit = Annotated[int, typer.Option(min=2, help="At most this many images.")]
Seed = Annotated[int, typer.Option(help="Of the sampled images, the backgrounds and the bootstrap.")]


@dataclass(frozen=True)
class Options:
    """What the segmentation study is run with; ``python recipes/segmentation.py --help`` says what each means."""

    model: VitModel = "mini"
    pretrained: Pretrained = None
    data: Data = "mini"
    limit: Limit = 400
    seed: Seed = 0
    batch: ImageBatch = 16
    out: Out = Path("runs/segmentation")
    quiet: NoBar = False
