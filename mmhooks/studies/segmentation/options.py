"""The options of the segmentation study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from mmhooks.studies.common.options import Device, Dtype, ImageBatch, NoBar, Out, Pretrained, VitModel
from mmhooks.studies.common.paper_settings import PaperOptions, Preset
from mmhooks.studies.common.placement import AUTO
from mmhooks.studies.segmentation.preset import PAPER

Data = Annotated[
    str,
    typer.Option(
        help="mini; ImageNet-Segmentation's file gtsegs_ijcv.mat; or a folder with images/NAME.jpg, "
        "masks/NAME.png and classes.csv (file,class)."
    ),
]
Limit = Annotated[int, typer.Option(min=2, help="At most this many images.")]
Classes = Annotated[
    str,
    typer.Option(
        help="Class whose text is sought: true, the image's own; predicted, the one predicted among the data's; imagenet, "
        "the one predicted among ImageNet's 1,000 classes in 80 prompts, as in the public code."
    ),
]
CheferStart = Annotated[
    int, typer.Option(help="First block of gradient attention: 0 as in the paper, -1 as in its notebook.")
]
LegradLayers = Annotated[
    int | None, typer.Option(min=1, help="Last blocks of LeGrad: all as in the paper, 2 as in its code.")
]
Seed = Annotated[int, typer.Option(help="Of the sampled images, the backgrounds and the bootstrap.")]


@dataclass(frozen=True)
class Options(PaperOptions):
    """What the segmentation study is run with; ``python recipes/segmentation.py --help`` says what each means."""

    PAPER: ClassVar[Preset] = PAPER

    model: VitModel = "mini"
    pretrained: Pretrained = None
    device: Device = AUTO
    dtype: Dtype = "float32"
    data: Data = "mini"
    classes: Classes = "true"
    chefer_start: CheferStart = 0
    legrad_layers: LegradLayers = None
    limit: Limit = 400
    seed: Seed = 0
    batch: ImageBatch = 16
    out: Out = Path("runs/segmentation")
    quiet: NoBar = False
