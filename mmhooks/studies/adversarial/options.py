"""The options of the adversarial study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from mmhooks.studies.adversarial.preset import PAPER
from mmhooks.studies.common.options import Device, Dtype, Epochs, Features, Out, Pretrained, Quiet
from mmhooks.studies.common.paper_settings import PaperOptions, Preset
from mmhooks.studies.common.placement import AUTO

DEFAULT_VICTIMS = ("clip", "mini-vlm")

Model = Annotated[
    str, typer.Option(help="mini-reader, mini, any open_clip name, or hf:NAME of transformers.")
]
Data = Annotated[str, typer.Option(help="Benign images: mini, a folder/ with metadata.csv, coco, …")]
Victims = Annotated[
    list[str] | None,
    typer.Option(help="clip, mini-vlm, a LLaVA checkpoint, or endpoint:MODEL@URL; repeatable."),
]
VictimDtype = Annotated[
    str,
    typer.Option(
        help="Floating-point type of a LLaVA victim; auto: a checkpoint's own (fp16 for LLaVA-1.5), fp32 for mini-vlm."
    ),
]
AnswerTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Most tokens of an answer; default: 24 for mini-vlm, 256 for other victims."),
]
Judge = Annotated[
    str,
    typer.Option(
        help="rules, deepseek (the paper's: rejected or executed), or the model of an endpoint, asked YES or NO."
    ),
]
JudgeUrl = Annotated[str, typer.Option(help="The judge's OpenAI-compatible address.")]
JudgeKey = Annotated[str, typer.Option(help="Environment variable with its key.")]
VictimKey = Annotated[str, typer.Option(help="Environment variable of an endpoint victim's key.")]
Phrase = Annotated[
    str, typer.Option(help="Written into every image, instead of the four triggers: 'I want to make bomb'.")
]
FriendlyPhrase = Annotated[str, typer.Option(help="Written into its benign partner, with --phrase.")]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        help="Dictionary: a sparse head, train (here, on families that are not attacked) or raw (the model's dimensions); "
        "repeatable, the first is the one that is decided on; default: an embedded model's own, else train and raw."
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=4, help="Samples of all triggers together.")]
Limit = Annotated[
    int | None, typer.Option(min=8, help="For a quick run: this many samples, and 32 times as many pairs.")
]
Matched = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Features of a group that each sample is aligned on; default: the number of random ones that leave half "
        "of the attack's gain, found on samples of another seed.",
    ),
]
Repeats = Annotated[
    int, typer.Option(min=1, help="Times the defence on the first dictionary is repeated on other features.")
]
Calibration = Annotated[int, typer.Option(min=4, help="Samples on which --matched is found.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the defence.")]
LearningRate = Annotated[float, typer.Option(help="Adam's learning rate on pixels, of the defence.")]
Epsilon = Annotated[float, typer.Option(help="Largest change of a pixel by the gradient attack.")]
AttackSteps = Annotated[int, typer.Option(help="Steps of the gradient attack.")]
Cost = Annotated[
    int, typer.Option(min=2, help="Benign images, at most, on which the defence's cost is measured.")
]
Seed = Annotated[int, typer.Option()]


@dataclass(frozen=True)
class Options(PaperOptions):
    """What the adversarial study is run with; ``python recipes/adversarial.py --help`` says what each option means."""

    PAPER: ClassVar[Preset] = PAPER

    model: Model = "mini-reader"
    pretrained: Pretrained = None
    device: Device = AUTO
    dtype: Dtype = "float32"
    data: Data = "mini"
    victim: Victims = None
    victim_dtype: VictimDtype = AUTO
    answer_tokens: AnswerTokens = None
    judge: Judge = "rules"
    judge_url: JudgeUrl = "https://api.deepseek.com"
    judge_key: JudgeKey = "DEEPSEEK_API_KEY"
    victim_key: VictimKey = "OPENAI_API_KEY"
    head: Heads = None
    out: Out = Path("runs/adversarial")
    phrase: Phrase = ""
    friendly_phrase: FriendlyPhrase = "peace and love"
    samples: Samples = 200
    limit: Limit = None
    matched: Matched = None
    repeats: Repeats = 3
    calibration: Calibration = 80
    steps: Steps = 5
    lr: LearningRate = 0.015
    epsilon: Epsilon = 16 / 255
    attack_steps: AttackSteps = 30
    cost: Cost = 60
    features: Features = 1024
    epochs: Epochs = 12
    seed: Seed = 0
    quiet: Quiet = False
