"""What studies write: results.json, tables.md, PNGs and one page."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmhooks.report import Block, Listing, Page, Plot, Prose, Section, Table, TableBlock
from mmhooks.utils.escape import markdown, rich_text
from mmhooks.utils.files import write_text

Verdict = Literal["same", "differs", "open"]


VERDICTS: dict[Verdict, str] = {"same": "holds", "differs": "does not hold", "open": "undecided"}


@dataclass(frozen=True)
class Results:
    """What a study found, and where it wrote it.

    Attributes:
        found: what ``results.json`` holds; ``results["data"]`` reads it too.
        paths: every file that was written, ``results.json`` first.
    """

    found: dict[str, Any]
    paths: tuple[Path, ...]

    def __getitem__(self, name: str) -> Any:
        return self.found[name]


def write_results(out: Path, results: Mapping[str, Any], paths: Sequence[Path] = ()) -> Results:
    """Writes ``results.json`` under ``out``, what is not a number as null; ``paths`` are the other files."""
    from mmhooks.analysis.results import plain

    found: dict[str, Any] = plain(dict(results))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return Results(found, (out / "results.json", *paths))


def write_study(
    out: Path,
    results: Mapping[str, Any],
    *,
    title: str,
    lead: str,
    claims: Sequence[tuple[Verdict, str, str]],
    tables: Sequence[Table],
    plots: Mapping[str, Plot],
    notes: Sequence[str],
    attribution: str,
) -> Results:
    """Writes everything under ``out``. ``claims``: verdict, claim, what was measured."""
    written = write_results(out, results)  # first: hours of work do not hang on a figure
    paths = save_plots(plots, out)
    lines = "\n".join(
        f"- **{VERDICTS[verdict]}**: {markdown(claim, code=True)}; {markdown(measured, code=True)}"
        for verdict, claim, measured in claims
    )

    def said(text: str) -> str:
        return markdown(text, code=True)

    body = "\n\n".join(
        [
            f"# {markdown(title)}",
            said(lead),
            lines,
            *(t.markdown() for t in tables),
            *map(said, notes),
            said(attribution),
        ]
    )
    write_text(out / "tables.md", body + "\n")
    shown: list[Block] = [Prose(note) for note in notes]
    sections = [
        Section("What was found", [Listing(list(claims)), *plots.values()]),
        Section("Numbers", [TableBlock(table) for table in tables]),
        Section("How it was made", [*shown, TableBlock(_settings(results))]),
    ]
    page = Page(title, sections, lead, "mmhooks · study", [attribution])
    others = [*paths, out / "tables.md", page.save(out / "index.html")]
    return Results(written.found, (*written.paths, *others))


def save_plots(plots: Mapping[str, Plot], out: Path) -> list[Path]:
    """A PNG each, as they look on a light page."""
    paths = []
    for name, plot in plots.items():
        paths.append(out / f"{name}.png")
        paths[-1].write_bytes(plot.light.data)
    return paths


def show(
    results: Mapping[str, Any],
    tables: Sequence[Table],
    claims: Sequence[tuple[Verdict, str, str]],
    paths: Sequence[Path],
) -> None:
    """The same on the screen: tables, what holds and what does not, where everything lies."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    for table in tables:
        console.print(rich_text(table.markdown(), lines=True))
        console.print()
    for verdict, claim, measured in claims:
        console.print(rich_text(f"{VERDICTS[verdict]}: {claim}: {measured}"))
    env = results["environment"]
    console.print(
        rich_text(f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB; results in {paths[0].parent}")
    )


def _settings(results: Mapping[str, Any]) -> Table:
    env = results["environment"]
    rows = [
        [name, "–" if value is None else str(value)]
        for name, value in results["settings"].items()
        if name not in ("out", "quiet")  # which decide nothing
    ]
    rows.append(
        [
            "time and memory",
            f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB, {env['threads']} threads",
        ]
    )
    rows.append(["versions", ", ".join(f"{k} {env[k]}" for k in ("python", "mmhooks", "torch", "open_clip"))])
    return Table(["", ""], rows, "Settings", text_columns=(0, 1))
