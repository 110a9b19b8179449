"""The options of every study: as they always were, the same for Python and for the command line."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from mmhooks.errors import DataError
from mmhooks.studies.common.options import as_command, as_settings, study_app
from mmhooks.studies.common.write import write_results

STUDIES = (
    "gender",
    "modality",
    "decomposition",
    "segmentation",
    "spurious",
    "generation",
    "attention_maps",
    "adversarial",
)
# Names and defaults that scripts of users rely on: a change here breaks them.
KNOWN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "study_options.json").read_text())

pytestmark = pytest.mark.parametrize("study", STUDIES)


@pytest.fixture
def options(study: str) -> Any:
    return importlib.import_module(f"mmhooks.studies.{study}.study").Options


def received(study: str, options: Any, *words: str) -> Any:
    """What ``run`` is handed when these words are typed."""
    got: list[Any] = []
    result = CliRunner().invoke(study_app(study, options, got.append, help=""), list(words))
    assert result.exit_code == 0, result.output
    return got[0]


def test_names_and_defaults_of_the_command_are_as_they_were(study: str) -> None:
    command = typer.main.get_command(importlib.import_module(f"mmhooks.studies.{study}.study").app)
    found = {
        "/".join([*p.opts, *p.secondary_opts]): p for p in command.params if not getattr(p, "hidden", False)
    }
    defaults = {
        name: str(p.default) if isinstance(p.default, Path) else p.default for name, p in found.items()
    }
    assert defaults == KNOWN[study]


def test_options_have_the_defaults_of_the_command(study: str, options: Any) -> None:
    assert received(study, options) == options()
    with pytest.raises(FrozenInstanceError):
        options().out = Path("elsewhere")


def test_help_names_every_option(study: str) -> None:
    app = importlib.import_module(f"mmhooks.studies.{study}.study").app
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    shown = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    missing = [name for names in KNOWN[study] for name in names.split("/") if name not in shown]
    assert missing == [] and result.exit_code == 0


def other(value: Any) -> Any:
    """A value that an option's default is not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return type(value)(value * 2 or 1)
    return Path("a b/c") if isinstance(value, Path) else 'a "b" $c'


def test_the_command_gives_the_same_options_again(study: str, options: Any) -> None:
    """Every option at once, at another value than its default."""
    hints = get_type_hints(options)
    choices = {name: get_args(hint) if get_origin(hint) is Literal else () for name, hint in hints.items()}
    known = {
        f.name: next((c for c in choices[f.name] if c != f.default), None) or other(f.default)
        for f in fields(options)
        if f.default is not None
    }
    # None cannot be typed, so options that are None by default keep the value of a preset that has one.
    start = options.of_paper() if "paper" in known else options()
    changed = replace(start, **known)
    words = shlex.split(as_command(study, changed))
    assert words[:2] == ["python", f"recipes/{study}.py"]
    assert received(study, options, *words[2:]) == changed
    assert as_command(study, options()) == f"python recipes/{study}.py"


def test_settings_are_json_and_complete(study: str, options: Any) -> None:
    settings = as_settings(options())
    assert list(settings) == [f.name for f in fields(options)]
    assert json.loads(json.dumps(settings)) == settings and isinstance(settings["out"], str)


@dataclass(frozen=True)
class Small:
    """Every kind of option that studies have."""

    word: Annotated[list[str] | None, typer.Option(help="again and again")] = None
    rate: Annotated[float | None, typer.Option()] = None
    live: Annotated[bool, typer.Option("--live/--direct")] = True
    top_m: Annotated[int, typer.Option("--top-m", min=2)] = 20


def test_every_kind_of_option_is_spelled_as_it_is_read(study: str) -> None:
    for chosen in (Small(["a", "--b"], 0.5, False, 3), Small(rate=1e-9), Small([])):
        words = shlex.split(as_command(study, chosen))[2:]
        assert received(study, Small, *words) in (chosen, replace(chosen, word=chosen.word or None))
    assert as_command(study, Small(["a b"], live=False)) == f"python recipes/{study}.py --word 'a b' --direct"


def test_an_error_of_the_toolkit_is_one_line(study: str) -> None:
    def run(_: Small) -> None:
        raise DataError("no pair")

    result = CliRunner().invoke(study_app(study, Small, run, help=""), [])
    assert result.exit_code == 1 and result.output == f"{study}: no pair\n"


def test_results_are_what_was_written(study: str, tmp_path: Path) -> None:
    found = write_results(tmp_path / study, {"a": (1, float("nan")), "é": {"b": 0.5}}, [tmp_path / "x.png"])
    assert found.paths == (tmp_path / study / "results.json", tmp_path / "x.png")
    assert found.found == {"a": [1, None], "é": {"b": 0.5}} == json.loads(found.paths[0].read_text())
    assert found["a"] == [1, None]
