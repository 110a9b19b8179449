"""The options of the gender study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

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
    Pretrained,
    Quiet,
    Sae,
    SkipBad,
)
from mmhooks.studies.common.paper_settings import PaperOptions, Preset
from mmhooks.studies.common.placement import AUTO
from mmhooks.studies.gender.preset import PAPER
from mmhooks.studies.gender.samples import CLASSIFIER

Data = Annotated[
    str,
    typer.Option(
        help="mini, a folder/ with metadata.csv, cc3m, a data set's name, a corpus/ of embedded.corpus."
    ),
]
Labels = Annotated[
    str, typer.Option(help="auto, codepoints (mini), column, or classifier (an image-classification model).")
]
LabelColumn = Annotated[str, typer.Option(help="Column of the label, with --labels column.")]
Strata = Annotated[str, typer.Option(help="Columns that the audit groups by, e.g. age,race.")]
Family = Annotated[str, typer.Option(help="Column of samples that belong together (one person, one film).")]
Classifier = Annotated[str, typer.Option(help="transformers name or path; default: the paper's.")]
Confidence = Annotated[
    float, typer.Option(min=0, max=1, help="Least confidence of the classifier: other samples are left out.")
]
Person = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Least zero-shot probability that an image shows a person; 0 leaves none out."
    ),
]
Words = Annotated[
    str,
    typer.Option(help="Words of label prompts, women's/men's: 'woman,girl/man,boy'; default: six of each."),
]
Template = Annotated[str, typer.Option(help="Of label prompts; auto: a drawing (mini) or photo of a {}.")]
Ncl = Annotated[
    str | None, typer.Option(help="NCL head: name, directory, Hub id, or train; none leaves it out.")
]
Limit = Annotated[
    int | None, typer.Option(min=8, help="Use at most this many labelled samples, and no others.")
]
Seed = Annotated[int, typer.Option(help="Of splits, random masks and resampling.")]
Draws = Annotated[
    int,
    typer.Option(min=2, help="Random masks of each control; the primary hypotheses get ten times as many."),
]


@dataclass(frozen=True)
class Options(PaperOptions):
    """What the gender study is run with; ``python recipes/gender.py --help`` says what each option means."""

    PAPER: ClassVar[Preset] = PAPER

    model: Model = "mini"
    pretrained: Pretrained = None
    device: Device = AUTO
    dtype: Dtype = "float32"
    data: Data = "mini"
    labels: Labels = "auto"
    label_column: LabelColumn = "gender"
    strata: Strata = ""
    family: Family = ""
    classifier: Classifier = CLASSIFIER
    confidence: Confidence = 0.0
    person: Person = 0.0
    template: Template = "auto"
    words: Words = ""
    sae: Sae = None
    ncl: Ncl = None
    out: Out = Path("runs/gender")
    limit: Limit = None
    seed: Seed = 0
    draws: Draws = 200
    features: Features = 1024
    k: Active = 32
    epochs: Epochs = 200
    batch: PairBatch = 256
    skip_bad: SkipBad = False
    quiet: Quiet = False
