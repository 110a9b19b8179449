"""The options of the attention-map study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mmhooks.studies.common.options import Device, DiffusionBatch, Dtype, Pipeline, Steps
from mmhooks.studies.common.placement import AUTO

TEMPLATE = "a drawing of a {}"

Prompts = Annotated[list[str] | None, typer.Option(help="repeatable")]
Words = Annotated[list[str] | None, typer.Option(help="repeatable; default: every word of the prompt")]
ImageCount = Annotated[int, typer.Option(help="number of drawings, of those that the pipeline knows")]
Template = Annotated[str, typer.Option(help="prompt of a known drawing; {} is its name")]
Guidance = Annotated[float, typer.Option(help="guidance scale; up to 1: none")]
Resize = Annotated[
    str, typer.Option(help="how layers are resized: bilinear; or bicubic, as in DAAM's public code")
]
Threshold = Annotated[
    float, typer.Option(help="heat above this share of its range counts as the object, for the IoU")
]
Seed = Annotated[int, typer.Option(help="of the first image's noise; the next ones follow")]
Out = Annotated[Path, typer.Option(help="results.json, results.md, heat.png, overlays/")]


@dataclass(frozen=True)
class Options:
    """What the attention-map study is run with; ``python recipes/attention_maps.py --help`` says what each means."""

    pipeline: Pipeline = "mini"
    prompt: Prompts = None
    word: Words = None
    pictures: ImageCount = 200
    template: Template = TEMPLATE
    steps: Steps = 25
    guidance: Guidance = 4.0
    resize: Resize = "bilinear"
    threshold: Threshold = 0.4
    batch: DiffusionBatch = 16
    seed: Seed = 0
    device: Device = AUTO
    dtype: Dtype = "float32"
    out: Out = Path("runs/attention_maps")
