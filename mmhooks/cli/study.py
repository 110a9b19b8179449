"""``mmhooks study NAME``: the case studies, each the same command as its script under ``recipes/``."""

from __future__ import annotations

from importlib import import_module

import typer

STUDIES = {
    "modality": "Which features belong to images, to texts, to both: MDS, EmbedSim, WinRate, masking.",
    "gender": "Case study 1: gender patterns, zero-masked, and a bias audit.",
    "adversarial": "Case study 2: attacks through the image, and the defence by alignment.",
    "generation": "Case study 3: a prompt moved towards an image, group by group.",
    "attention_maps": "Where in a generated image a word goes.",
    "decomposition": "What attention heads write, named by texts.",
    "segmentation": "Zero-shot segmentation by token contributions.",
    "spurious": "Attention heads that carry the background, ablated.",
}
study = typer.Typer(
    name="study",
    help="Run a case study; each lists its options: mmhooks study gender --help",
    no_args_is_help=True,
)


def _add(name: str) -> None:
    def command(context: typer.Context) -> None:
        # A study is imported when it is called: together they would make every ``--help`` wait.
        app = import_module(f"mmhooks.studies.{name}.study").app
        app(args=context.args, prog_name=f"mmhooks study {name}")

    # ``--help`` too goes to the study.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    study.command(name.replace("_", "-"), help=STUDIES[name], context_settings=settings)(command)


for name in STUDIES:
    _add(name)
