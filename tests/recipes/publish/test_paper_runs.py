"""The commands of the full-size runs with random weights: each study takes its options."""

from importlib import import_module
from pathlib import Path

import pytest
import typer
from publish.paper_runs import RUNS, PaperRun


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.study)
def test_every_option_is_one_that_the_study_takes(run: PaperRun):
    command = typer.main.get_command(import_module(f"mmhooks.studies.{run.study}.study").app)
    context = command.make_context(run.study, run.words(Path("runs/paper"))[1:])
    assert context.params["paper"] is True


def test_an_option_out_of_its_range_is_seen():
    command = typer.main.get_command(import_module("mmhooks.studies.adversarial.study").app)
    with pytest.raises(Exception, match="greater than or equal to 8"):
        command.make_context("adversarial", ["--paper", "--limit", "4"])
