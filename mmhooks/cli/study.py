"""``mmhooks study NAME``: the case studies, each the same command as its script under ``recipes/``."""

from __future__ import annotations

from importlib import import_module

import typer

STUDIES = {
    "modality": "Which features belong to images, to texts, or to both: MDS, EmbedSim, WinRate, masking.",
    "gender": "Case study 1: zero-masking of gender patterns, and a bias audit.",
    "adversarial": "Case study 2: image attacks, and alignment as a defence.",
    "generation": "Case study 3: moving a prompt towards an image, group by group.",
    "attention_maps": "Where in a generated image each word acts.",
    "decomposition": "What attention heads write, described by texts.",
    "segmentation": "Zero-shot segmentation from token contributions.",
    "spurious": "Ablating attention heads that carry the background.",
}
study = typer.Typer(
    name="study",
    help="Run a case study; each lists its options: mmhooks study gender --help",
    no_args_is_help=True,
)


def _add(name: str) -> None:
    def command(context: typer.Context) -> None:
        # Imported on call: importing all studies would slow down every ``--help``.
        app = import_module(f"mmhooks.studies.{name}.study").app
        app(args=context.args, prog_name=f"mmhooks study {name}")

    # ``--help`` is passed on to the study.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    study.command(name.replace("_", "-"), help=STUDIES[name], context_settings=settings)(command)


for name in STUDIES:
    _add(name)
