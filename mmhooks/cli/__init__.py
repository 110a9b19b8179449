"""The ``mmhooks`` command line: thin commands, one module per subject."""

from __future__ import annotations

from typing import Annotated

import typer

from mmhooks.cli.estimate import estimate
from mmhooks.cli.human import human
from mmhooks.cli.inspect import models, pairs, sites
from mmhooks.cli.measure import measure
from mmhooks.cli.store import extract, store
from mmhooks.cli.study import study
from mmhooks.cli.sweep import sweep
from mmhooks.cli.train import train
from mmhooks.cli.verify import verify

app = typer.Typer(
    name="mmhooks",
    help="Hooked-model interpretability for multimodal models. Studies: mmhooks study --help, or recipes/modality.py",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool | None) -> None:
    if show:
        from mmhooks import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop."),
    ] = None,
) -> None:
    """Hooked-model interpretability for multimodal models: sites, heads, edits, measures."""


for command in (models, sites, pairs, extract, train, sweep, measure, verify):
    app.command()(command)
app.add_typer(store, name="store")
app.add_typer(study, name="study")
app.add_typer(estimate, name="estimate")
app.add_typer(human, name="human")
