"""The options of the modality study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from mmhooks.studies.common.options import (
    Active,
    Device,
    Dtype,
    Epochs,
    Features,
    Model,
    Out,
    PairBatch,
    PairData,
    Pretrained,
    Quiet,
    Sae,
    SkipBad,
)
from mmhooks.studies.common.paper_settings import PaperOptions, Preset
from mmhooks.studies.common.placement import AUTO
from mmhooks.studies.modality.preset import PAPER

Declip = Annotated[
    str,
    typer.Option(
        help="DeCLIP: mini-declip, the official file, or a checkpoint of --model's class; '' leaves it out."
    ),
]
Ncl = Annotated[
    str | None, typer.Option(help="NCL head: name, directory, Hub id, or train; mini has its own.")
]
Limit = Annotated[int | None, typer.Option(min=8, help="Use at most this many pairs.")]
Seed = Annotated[int, typer.Option(help="Of baselines, bootstrap, random controls and the features shown.")]
TopM = Annotated[int, typer.Option("--top-m", "--m", min=2, help="m: top samples per feature.")]
Activation = Annotated[
    Literal["abs", "relu", "raw"],
    typer.Option(help="Activation of raw CLIP's signed coordinates; raw ranks by z itself (the paper's)."),
]
Zeros = Annotated[
    Literal["drop", "keep"],
    typer.Option(
        help="Leave samples with activation 0 out of top lists, or fill lists up with them (the paper's)."
    ),
]
MinSamples = Annotated[
    int,
    typer.Option(
        min=2, help="A feature that fewer samples activate has no EmbedSim; m: only full lists count."
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        min=1, help="Training seeds of the heads; 5 is what mini ships. Verdicts are counted over them."
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        help="Column of pairs that are not independent; none: all are; default: drawings by name, else near-duplicates."
    ),
]
ImageEmbedder = Annotated[
    str, typer.Option(help="efficientnet-lite0 (offline) or vit-b16-in21k (the paper's).")
]
TextEmbedder = Annotated[
    str, typer.Option(help="minilm (offline, the paper's) or a sentence-transformers name.")
]
Draws = Annotated[int, typer.Option(help="Random masks and groups of each control.")]
Evaluate = Annotated[int, typer.Option(min=2, help="At most this many held-out pairs under masks.")]
Each = Annotated[int, typer.Option(help="Features shown of each group.")]


@dataclass(frozen=True)
class Options(PaperOptions):
    """What the modality study is run with; ``python recipes/modality.py --help`` says what each option means."""

    PAPER: ClassVar[Preset] = PAPER

    model: Model = "mini"
    pretrained: Pretrained = None
    device: Device = AUTO
    dtype: Dtype = "float32"
    data: PairData = "mini"
    declip: Declip = "auto"
    sae: Sae = None
    ncl: Ncl = None
    out: Out = Path("runs/modality")
    limit: Limit = None
    seed: Seed = 0
    top_m: TopM = 20
    activation: Activation = "abs"
    zeros: Zeros = "drop"
    min_samples: MinSamples = 2
    family: Family = None
    seeds: Seeds = 1
    image_embedder: ImageEmbedder = "efficientnet-lite0"
    text_embedder: TextEmbedder = "minilm"
    features: Features = 1024
    k: Active = 32
    epochs: Epochs = 200
    draws: Draws = 60
    evaluate: Evaluate = 600
    each: Each = 4
    batch: PairBatch = 256
    skip_bad: SkipBad = False
    quiet: Quiet = False
