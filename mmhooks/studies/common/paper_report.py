"""The account of ``--paper``: each setting of the paper, and what a run used, as JSON, Markdown and a page's section."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from mmhooks.report import Prose, Section, Table, TableBlock
from mmhooks.studies.common.options import typed_options
from mmhooks.studies.common.paper_settings import PaperOptions, PaperSetting
from mmhooks.utils.escape import markdown, rich_text

Status = Literal["the paper's", "the paper's in part", "not stated", "given", "overridden", "not had"]
_NO_RESULT = ("out", "quiet")  # options that decide no result
_PAPERS: Status = "the paper's"
_OTHERS: tuple[Status, ...] = ("the paper's in part", "not stated", "given", "overridden", "not had")


def paper_account(options: PaperOptions) -> dict[str, Any] | None:
    """Returns, for ``results.json``, every setting of the paper and what this run used; None without ``--paper``."""
    if not options.paper:
        return None
    ours = {f.name: f.default for f in fields(options)}
    typed = typed_options(options)
    settings = [
        {
            "option": s.option,
            "paper": s.paper,
            "source": s.source,
            "used": "" if s.option is None else shlex.join(typed[s.option]),
            "status": _status(s, options, ours),
            "lacking": s.lacking,
        }
        for s in options.PAPER.settings
    ]
    own = {s.option for s in options.PAPER.settings} | {"paper", *_NO_RESULT}
    changed = [typed[name] for name in ours if name not in own and getattr(options, name) != ours[name]]
    also = shlex.join(word for words in changed for word in words)
    return {"paper": options.PAPER.paper, "settings": settings, "also": also}


def paper_table(account: Mapping[str, Any]) -> Table:
    """Returns the account as a table, one row a setting."""
    rows = [
        [s["paper"], s["source"], s["used"] or "–", s["status"], _remark(s)] for s in account["settings"]
    ]  # fmt: skip
    headings = ["In the paper", "Source", "Here", "", "Lacking"]
    return Table(headings, rows, f"Settings of {account['paper']}", text_columns=(0, 1, 2, 3, 4))


def paper_sections(results: Mapping[str, Any]) -> list[Section]:
    """Returns the section of a study's page that accounts for ``--paper``; none without it."""
    account = results.get("paper")
    if account is None:
        return []
    return [
        Section("The paper's settings", [Prose(paper_sentence(account)), TableBlock(paper_table(account))])
    ]


def paper_markdown(results: Mapping[str, Any]) -> str:
    """Returns the same for ``tables.md``; empty without ``--paper``."""
    account = results.get("paper")
    return (
        ""
        if account is None
        else f"\n\n{markdown(paper_sentence(account), code=True)}\n\n{paper_table(account).markdown()}\n"
    )


def print_paper(console: Any, results: Mapping[str, Any]) -> None:
    """Prints in one paragraph which settings are the paper's; nothing without ``--paper``."""
    if results.get("paper") is not None:
        console.print(rich_text(f"{results['paper']['paper']}: {paper_sentence(results['paper'])}"))


def paper_sentence(account: Mapping[str, Any]) -> str:
    """Returns how many settings are the paper's, which are overridden, partial or not had, and what was given beside."""
    by: dict[str, list[str]] = {}
    for s in account["settings"]:
        by.setdefault(s["status"], []).append(s["option"] or s["paper"])
    parts = [f"{len(by.get(_PAPERS, []))} of {len(account['settings'])} settings are the paper's"]
    parts += [f"{status}: {', '.join(by[status])}" for status in _OTHERS if status in by]
    parts += [f"also given: {account['also']}"] if account["also"] else []
    return "; ".join(parts) + "."


def _status(s: PaperSetting, options: PaperOptions, ours: Mapping[str, Any]) -> Status:
    if s.option is None:
        return "not had"
    used = getattr(options, s.option)
    if s.value is None:
        return "not had" if used == ours[s.option] else "given"
    if used != (list(s.value) if isinstance(s.value, tuple) else s.value):
        return "overridden"
    if not s.stated:
        return "not stated"
    return "the paper's in part" if s.lacking else "the paper's"


def _remark(s: Mapping[str, Any]) -> str:
    return s["lacking"] if s["status"] in ("not had", "not stated", "the paper's in part") else ""
