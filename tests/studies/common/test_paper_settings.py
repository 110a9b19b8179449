"""``--paper``: the paper's settings are defaults, explicit options win, and what a run used is accounted for."""

from __future__ import annotations

import importlib
import shlex
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar

import pytest
import typer
from publish import paper_settings as paper_docs
from typer.testing import CliRunner

from mmhooks.errors import MMHooksError
from mmhooks.studies.common.options import as_command, study_app
from mmhooks.studies.common.paper_report import paper_account, paper_markdown, paper_sections, paper_sentence
from mmhooks.studies.common.paper_settings import PaperOptions, PaperSetting, Preset

STUDIES = ("modality", "gender", "adversarial", "generation", "decomposition", "segmentation", "spurious")
SMALL = Preset(
    "“A Paper” (2025)",
    (
        PaperSetting("forty", "Section 1", "size", 40),
        PaperSetting("two words", "Section 2", "word", ("a", "b c")),
        PaperSetting("m samples", "Section 3", "m", 5, "5 is ours", stated=False),
        PaperSetting("all data", "Section 4", "data", "all", "half can be fetched"),
        PaperSetting("a photograph", "Figure 1", "file", lacking="give --file"),
        PaperSetting("a judge", "Section 5", lacking="rules decide"),
    ),
)


@dataclass(frozen=True)
class Small(PaperOptions):
    PAPER: ClassVar[Preset] = SMALL
    size: Annotated[int, typer.Option()] = 3
    word: Annotated[list[str] | None, typer.Option()] = None
    m: Annotated[int, typer.Option()] = 5
    data: Annotated[str, typer.Option()] = "mini"
    file: Annotated[str, typer.Option()] = ""
    live: Annotated[bool, typer.Option("--live/--direct")] = True


def received(options: Any, *words: str) -> Any:
    got: list[Any] = []
    result = CliRunner().invoke(study_app("small", options, got.append, help=""), list(words))
    assert result.exit_code == 0, result.output
    return got[0]


def test_explicit_options_win_even_at_our_default() -> None:
    assert received(Small) == Small()
    assert received(Small, "--paper") == Small.of_paper() == Small(True, 40, ["a", "b c"], 5, "all")
    assert received(Small, "--size", "3", "--paper", "--word", "x") == Small(True, 3, ["x"], 5, "all")
    assert Small.of_paper(size=3).size == 3


def test_lists_of_the_preset_are_never_shared() -> None:
    words = Small.of_paper().word
    assert words is not None
    words.append("more")
    assert Small.of_paper().word == ["a", "b c"]


def test_the_command_gives_the_same_options_again() -> None:
    for chosen in (
        Small.of_paper(),
        Small.of_paper(size=3, live=False),
        Small.of_paper(word=["x y"], file="horse.png"),
        Small(size=9),
    ):
        assert received(Small, *shlex.split(as_command("small", chosen))[2:]) == chosen
    assert as_command("small", Small.of_paper(size=3)) == "python recipes/small.py --paper --size 3"
    # None cannot be typed: the same values without --paper
    bare = Small.of_paper(word=None)
    assert received(Small, *shlex.split(as_command("small", bare))[2:]) == replace(bare, paper=False)


def test_our_defaults_under_the_papers_name_are_refused() -> None:
    with pytest.raises(MMHooksError, match=r"Small\.of_paper"):
        Small(paper=True)


def test_a_setting_without_value_says_what_is_lacking() -> None:
    with pytest.raises(MMHooksError, match="lacking="):
        PaperSetting("a judge", "Section 5")


def test_every_setting_is_accounted_for() -> None:
    assert paper_account(Small()) is None and paper_sections({"paper": None}) == [] == paper_sections({})
    account = paper_account(Small.of_paper(size=3, live=False))
    assert account is not None
    assert [(s["option"], s["used"], s["status"]) for s in account["settings"]] == [
        ("size", "--size 3", "overridden"),
        ("word", "--word a --word 'b c'", "the paper's"),
        ("m", "--m 5", "not stated"),
        ("data", "--data all", "the paper's in part"),
        ("file", "--file ''", "not had"),
        (None, "", "not had"),
    ]
    assert account["also"] == "--direct"
    assert paper_sentence(account) == (
        "1 of 6 settings are the paper's; the paper's in part: data; not stated: m; overridden: size; not had: file, a judge; "
        "also given: --direct."
    )
    given = paper_account(Small.of_paper(file="horse.png"))
    assert given is not None and given["settings"][4]["status"] == "given"
    written = paper_markdown({"paper": account})
    for words in ("Section 1", "give --file", "half can be fetched", "rules decide", "5 is ours"):
        assert words in written, words
    (section,) = paper_sections({"paper": account})
    assert section.title == "The paper's settings"


@pytest.mark.parametrize("study", STUDIES)
def test_presets_fit_their_options(study: str) -> None:
    """Every setting names an option, every value is one that the command takes, and ``--paper`` is all of them."""
    options = importlib.import_module(f"mmhooks.studies.{study}.study").Options
    names = {f.name for f in fields(options)}
    of_preset = [s.option for s in options.PAPER.settings if s.option is not None]
    assert set(of_preset) <= names and len(of_preset) == len(set(of_preset))
    assert all(s.source and s.paper for s in options.PAPER.settings)
    made = received(options, "--paper")
    assert made == options.of_paper() != replace(options.of_paper(), paper=False)
    typed = shlex.split(as_command(study, replace(made, paper=False)))[2:]
    assert received(options, *typed) == replace(made, paper=False)
    assert as_command(study, made) == f"python recipes/{study}.py --paper"


def test_the_docs_are_written_from_the_presets() -> None:
    page = (paper_docs.ROOT / "docs/paper-settings.md").read_text(encoding="utf-8")
    assert paper_docs.block() in page, "run: PYTHONPATH=recipes python -m publish.paper_settings"
    assert set(paper_docs.STUDIES) == set(STUDIES)
