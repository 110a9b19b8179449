"""Output of studies: ``results.json``, ``tables.md``, PNGs, one page, and tables in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmhooks.report import Block, Listing, Page, Plot, Prose, Section, Table, TableBlock
from mmhooks.studies.common.claims import Verdict
from mmhooks.studies.common.paper_report import paper_markdown, paper_sections, print_paper
from mmhooks.utils.escape import markdown, rich_text
from mmhooks.utils.files import write_bytes, write_text

VERDICTS: dict[Verdict, str] = {"same": "holds", "differs": "does not hold", "open": "undecided"}


@dataclass(frozen=True)
class Results:
    """Results of a study, and the files it wrote.

    Attributes:
        found: the content of ``results.json``; ``results["data"]`` reads it too.
        paths: every file that was written, ``results.json`` first.
    """

    found: dict[str, Any]
    paths: tuple[Path, ...]

    def __getitem__(self, name: str) -> Any:
        return self.found[name]


def write_results(out: Path, results: Mapping[str, Any], paths: Sequence[Path] = ()) -> Results:
    """Writes ``results.json`` under ``out``, NaN as null; ``paths`` are the other files of the study."""
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
    """Writes results, tables, PNGs and the page under ``out``.

    Args:
        claims: verdict, claim, what was measured.
    """
    written = write_results(out, results)  # first, so that a failing figure does not lose hours of work
    paths = save_plots(plots, out)
    lines = "\n".join(
        f"- **{VERDICTS[verdict]}**: {markdown(claim, code=True)}; {markdown(measured, code=True)}"
        for verdict, claim, measured in claims
    )

    def escaped(text: str) -> str:
        return markdown(text, code=True)

    body = "\n\n".join(
        [
            f"# {markdown(title)}",
            escaped(lead),
            lines,
            *(t.markdown() for t in tables),
            *map(escaped, notes),
            escaped(attribution),
        ]
    )
    write_text(out / "tables.md", f"{body}\n{paper_markdown(results)}")
    shown: list[Block] = [Prose(note) for note in notes]
    sections = [
        Section("What was found", [Listing(list(claims)), *plots.values()]),
        Section("Numbers", [TableBlock(table) for table in tables]),
        *paper_sections(results),
        Section("How it was made", [*shown, TableBlock(_settings(results))]),
    ]
    page = Page(title, sections, lead, "mmhooks · study", [attribution])
    others = [*paths, out / "tables.md", page.save(out / "index.html")]
    return Results(written.found, (*written.paths, *others))


def save_plots(plots: Mapping[str, Plot], out: Path) -> list[Path]:
    """Writes one PNG per plot, in light colours; returns the paths."""
    return [write_bytes(out / f"{name}.png", plot.light.data) for name, plot in plots.items()]


def print_study(
    results: Mapping[str, Any],
    tables: Sequence[Table],
    claims: Sequence[tuple[Verdict, str, str]],
    paths: Sequence[Path],
) -> None:
    """Prints the tables, the verdict on each claim, and where the results are."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    for table in tables:
        console.print(rich_text(table.markdown(), lines=True))
        console.print()
    for verdict, claim, measured in claims:
        console.print(rich_text(f"{VERDICTS[verdict]}: {claim}: {measured}"))
    print_paper(console, results)
    env = results["environment"]
    console.print(
        rich_text(f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB; results in {paths[0].parent}")
    )


def _settings(results: Mapping[str, Any]) -> Table:
    env = results["environment"]
    rows = [
        [name, "–" if value is None else str(value)]
        for name, value in results["settings"].items()
        if name not in ("out", "quiet")  # these decide no result
    ]
    rows.append(
        [
            "time and memory",
            f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB, {env['threads']} threads",
        ]
    )
    rows.append(["versions", ", ".join(f"{k} {env[k]}" for k in ("python", "mmhooks", "torch", "open_clip"))])
    return Table(["", ""], rows, "Settings", text_columns=(0, 1))
