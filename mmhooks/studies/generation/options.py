"""The options of the generation study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from mmhooks.studies.common.options import Device, DiffusionBatch, Dtype, Pipeline, Steps
from mmhooks.studies.common.paper_settings import PaperOptions, Preset
from mmhooks.studies.common.placement import AUTO
from mmhooks.studies.generation.preset import PAPER

Model = Annotated[str, typer.Option(help="CLIP of the conditioner: mini, or an open_clip name")]
Pretrained = Annotated[
    str | None, typer.Option(help="open_clip's tag, or a checkpoint; '' for random weights")
]
Data = Annotated[str, typer.Option(help="mini, a folder with metadata.csv, coco, …")]
Limit = Annotated[int | None, typer.Option(help="at most this many pairs", min=8)]
Modes = Annotated[
    list[str] | None,
    typer.Option(
        help="projected, naive, unclip; repeatable; default: unclip for Stable unCLIP, else the others"
    ),
]
Prompts = Annotated[int, typer.Option(help="prompts, each with a reference", min=2)]
Prompt = Annotated[
    str | None, typer.Option(help="one prompt for all cases, as it is; default: texts of the data")
]
Reference = Annotated[
    Path | None,
    typer.Option(
        help="image file that all prompts are moved toward; its name says what it shows: horse.png; default: images of the data"
    ),
]
Projection = Annotated[
    Literal["last", "fitted"],
    typer.Option(
        help="mode projected: CLIP's own text projection, made for the last layer; or one fitted to the layer that the "
        "pipeline conditions on (Stable Diffusion 2: the one before)"
    ),
]
Joint = Annotated[
    bool, typer.Option("--joint", help="also edit at the indices of CLIP's joint space, as in the paper")
]
CurvePrompts = Annotated[
    int,
    typer.Option(
        min=1, help="prompts that are drawn at the strengths below the largest too, for curves and grid"
    ),
]
RandomSets = Annotated[
    int, typer.Option(help="random sets that groups are compared with, at the largest strength", min=8)
]
Seeds = Annotated[int, typer.Option(help="images of each prompt", min=1)]
Strengths = Annotated[list[float] | None, typer.Option(help="repeatable; 0 is always included")]
Whole = Annotated[bool, typer.Option(help="whole groups instead of groups cut to one size")]
Template = Annotated[str, typer.Option(help="prompt of a text; {} is the text")]
Features = Annotated[int, typer.Option(help="of the SAE; 0: four times the width")]
Active = Annotated[int, typer.Option(help="active features of the SAE")]
Epochs = Annotated[int, typer.Option(help="of the SAE")]
Guidance = Annotated[float, typer.Option(help="guidance scale")]
FeatureExample = Annotated[
    int | None,
    typer.Option(help="which prompt the grid shows, from 0; default: the one that moved most"),
]
ImageEmbedder = Annotated[str, typer.Option(help="judge of images")]
Seed = Annotated[int, typer.Option(help="of cases, groups and the SAE")]
Quiet = Annotated[bool, typer.Option("--quiet")]
Out = Annotated[Path, typer.Option(help="results.json, tables.md, PNG, index.html")]


@dataclass(frozen=True)
class Options(PaperOptions):
    """What the generation study is run with; ``python recipes/generation.py --help`` says what each option means."""

    PAPER: ClassVar[Preset] = PAPER

    pipeline: Pipeline = "mini"
    model: Model = "mini"
    pretrained: Pretrained = None
    data: Data = "mini"
    limit: Limit = None
    mode: Modes = None
    pairs: Prompts = 100
    curve_pairs: CurvePrompts = 10
    prompt: Prompt = None
    reference: Reference = None
    projection: Projection = "last"
    joint: Joint = False
    random_sets: RandomSets = 20
    seeds: Seeds = 1
    strength: Strengths = None
    whole: Whole = False
    template: Template = "{}"
    features: Features = 0
    k: Active = 16
    epochs: Epochs = 40
    steps: Steps = 6
    guidance: Guidance = 3.0
    batch: DiffusionBatch = 20
    shown: FeatureExample = None
    image_embedder: ImageEmbedder = "efficientnet-lite0"
    seed: Seed = 0
    device: Device = AUTO
    dtype: Dtype = "float32"
    quiet: Quiet = False
    out: Out = Path("runs/generation")
