"""``mmhooks estimate NAME``: what a study would need on a GPU, with the study's own options."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer

from mmhooks.cli.study import STUDIES
from mmhooks.utils.clear_errors import clear_errors
from mmhooks.utils.say import say_lines

ESTIMATED = ("modality", "adversarial", "generation", "gender", "decomposition", "segmentation", "spurious")
estimate = typer.Typer(
    name="estimate",
    help="Count what a study needs on a GPU: hours and GB a stage. Its own options follow its name: mmhooks estimate "
    "modality --model ViT-B-32 --data cc3m",
    no_args_is_help=True,
)


@dataclass(frozen=True)
class _Asked:
    machine: Any
    assumed: Any
    pairs: int | None


@estimate.callback()
def assumptions(
    context: typer.Context,
    machine: Annotated[str, typer.Option(help="a100-80gb or a100-40gb.")] = "a100-80gb",
    utilisation: Annotated[float, typer.Option(help="Share of the machine's peaks that is reached.")] = 0.35,
    low: Annotated[float, typer.Option(help="The range's lowest share.")] = 0.2,
    high: Annotated[float, typer.Option(help="The range's highest share.")] = 0.5,
    launch: Annotated[float, typer.Option(help="Microseconds that the host needs for one operator.")] = 8.0,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Pairs of --data, where they are not known by its name.")
    ] = None,
) -> None:
    from mmhooks.errors import MMHooksError
    from mmhooks.studies.estimate.stages import MACHINES, Assumption

    with clear_errors("estimate"):
        if machine not in MACHINES:
            raise MMHooksError(f"--machine: expected one of {', '.join(MACHINES)}, got {machine!r}")
        assumed = Assumption(utilisation, low, high, launch * 1e-6)
        context.obj = _Asked(MACHINES[machine], assumed, pairs)


def _add(name: str) -> None:
    def command(context: typer.Context) -> None:
        from mmhooks.studies.common.options import study_app
        from mmhooks.studies.estimate.plans import stages_of
        from mmhooks.studies.estimate.table import estimate_table

        asked: _Asked = context.obj

        def show(options: Any) -> None:
            stages = stages_of(name, options, asked.pairs)
            say_lines(estimate_table(name, stages, asked.machine, asked.assumed).markdown())

        options = import_module(f"mmhooks.studies.{name}.options").Options
        app = study_app(name, options, show, help=f"Count what the study needs. {STUDIES[name]}")
        app(args=context.args, prog_name=f"mmhooks estimate {name}")

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    estimate.command(name.replace("_", "-"), help=STUDIES[name], context_settings=settings)(command)


for _name in ESTIMATED:
    _add(_name)
