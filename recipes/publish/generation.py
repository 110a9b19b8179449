"""Writes a run of recipes/generation.py into docs/generation.md, between its two markers, and copies its figures.

    PYTHONPATH=recipes python -m publish.generation runs/generation

Prints the paragraph of docs/results.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.report import fixed
from mmhooks.studies.common.claims import verdict_of_outcome
from mmhooks.studies.common.write import VERDICTS
from mmhooks.studies.generation.page import table
from publish.marked_block import command, fill

ROOT = Path(__file__).parents[2]


def spaces(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yields mode, space and numbers of every space that was edited."""
    for mode, by_space in results["modes"].items():
        for space, found in by_space.items():
            yield mode, space, found


def block(results: Mapping[str, Any]) -> str:
    """Returns the page's results: for every space its table, the four claims, and what could have been seen."""
    found = list(spaces(results))
    sets = found[0][2]["random_sets"]["n"]
    lines = [
        f"`{command(results)}`: {len(results['cases'])} prompts, {results['seeds']} image of each, {results['steps']} steps; "
        f"{sets} random sets a space. {results['environment']['seconds']:.0f} s. "
        f"The {sum(len(f['verdicts']) for _, _, f in found)} claims "
        "are decided together (Holm); a difference must hold over random sets and over prompts."
    ]
    for mode, space, numbers in found:
        lines += [
            f"### {mode}, {space}",
            f"![curves](figures/{figure(space)})",
            table(numbers, f"{mode}, {space}", results["strengths"][-1]).markdown(),
            "\n".join(
                f"- **{VERDICTS[verdict_of_outcome(v['outcome'])]}**: {v['sentence']}"
                for v in numbers["verdicts"].values()
            ),
            numbers["power"],
        ]
    lines += [f"`{mode}` is not possible here: {why}." for mode, why in results["impossible"].items()]
    return "\n\n".join(lines)


def figure(space: str) -> str:
    return "generation-curves.png" if space == "dimensions" else f"generation-{space.lower()}-curves.png"


def sentence(results: Mapping[str, Any]) -> str:
    """Returns the paragraph for docs/results.md."""
    parts = []
    for mode, space, found in spaces(results):
        said = ", ".join(
            f"“{v['claim']}” {VERDICTS[verdict_of_outcome(v['outcome'])]} ({fixed(v['estimate']['value'], plus=True)} "
            f"[{fixed(v['estimate']['low'], plus=True)}, {fixed(v['estimate']['high'], plus=True)}])"
            for v in found["verdicts"].values()
        )
        parts.append(f"{mode}, {space}: {said}")
    return f"Interpolation (`{command(results)}`, {len(results['cases'])} prompts): {'; '.join(parts)}."


def main(
    run: Annotated[Path, typer.Argument(help="The folder that recipes/generation.py wrote.")],
    page: Annotated[Path, typer.Option(help="Where the two markers are.")] = ROOT / "docs" / "generation.md",
) -> None:
    """Fills the page's results from a run; a second call with the same run changes nothing."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    fill(page, block(results))
    figures = page.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for number, (mode, space, _) in enumerate(spaces(results)):
        name = f"{mode}-{space}".lower()
        shutil.copyfile(run / f"curves-{name}.png", figures / figure(space))
        if number == 0:
            shutil.copyfile(run / f"grid-{name}.png", figures / "generation-grid.png")
    typer.echo(sentence(results))


if __name__ == "__main__":
    typer.run(main)
