"""Writes the results of a modality run into docs/results.md, between its two markers, and its figures into docs/img.

PYTHONPATH=recipes python -m publish.readme runs/modality
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.report import Cell, Table, percent
from mmhooks.studies.common.cards import format_duration
from mmhooks.studies.common.claims import Claim
from mmhooks.studies.modality.cross_modal import cross_modal_table
from mmhooks.studies.modality.definitions import verdict_table
from mmhooks.studies.modality.seeds import seed_numbers_table, seed_table
from mmhooks.studies.modality.tables import control_table, mask_table, measured_models, table1, table2
from publish.marked_block import command, fill

ROOT = Path(__file__).parents[2]


def block(results: dict[str, Any], cards: dict[str, Any]) -> str:
    """Returns the page's section: retrieval with chance, the tables, and each statement that differs from the paper."""
    data, env = results["data"], results["environment"]
    base = results["models"]["CLIP"]["masking"]
    found = [Claim(**c) for c in results["claims"]]
    same = sum(c.verdict == "same" for c in found)
    differs = [c for c in found if c.verdict == "differs"]
    lines = [
        f"`{command(results)}`: {data['n']:,} pairs of {data['name']}, {data['heldout']:,} of them held out from every training. "
        f"This run took {format_duration(env['seconds'])} and {env['peak_memory_gb']:.1f} GB at most ({env['threads']} threads)."
    ]
    retrieval = _retrieval(cards)
    if retrieval is not None:
        lines.append(retrieval.markdown())
    ranks = ", ".join(
        f"R@{k} {percent(base['base'][f'R@{k}']['value'])} % (chance {percent(base['chance'][f'R@{k}'], 2)} %)"
        for k in (1, 5, 10)
    )
    lines.append(
        f"In this study, image→text over {base['n']:,} held-out pairs of both kinds together: {ranks}."
    )
    lines += [made(results).markdown() for made in (table1, table2, control_table, mask_table)]
    lines.append(cross_modal_table(results, measured_models(results)).markdown())
    lines.append(verdict_table(results).markdown())
    if len(results["seeds"]["verdicts"]) > 1:
        lines += [seed_table(results).markdown(), seed_numbers_table(results).markdown()]
    lines.append(
        f"Of {len(found)} statements of the paper that these models can test, {same} hold here, {len(differs)} "
        f"differ in direction, {len(found) - same - len(differs)} are undecided:"
    )
    lines.append("\n".join(f"- {c.sentence()}" for c in differs) or "- none differs")
    return "\n\n".join(lines)


def _retrieval(cards: dict[str, Any]) -> Table | None:
    """Returns the held-out retrieval of the embedded models from their cards, with chance."""
    rows: list[list[str | Cell]] = []
    for model, card in cards.items():
        for row in card.get("retrieval", {}).values():
            recalls = [_cell(row["image_to_text"][f"R@{k}"]) for k in (1, 5, 10)]
            rows.append([model, row["what"], f"{row['n']:,}", *recalls, percent(row["chance"]["R@10"], 2)])
    if not rows:
        return None
    columns = ["Model", "Held out", "n", "R@1 %", "R@5 %", "R@10 %", "chance of R@10 %"]
    caption = "The embedded models: image→text retrieval on held-out data (95 % Wilson intervals)"
    return Table(columns, rows, caption, text_columns=(0, 1))


def _cell(rate: dict[str, float]) -> Cell:
    return Cell(percent(rate["value"]), f"[{percent(rate['low'])}, {percent(rate['high'])}]")


def main(
    run: Annotated[Path, typer.Argument(help="The folder that recipes/modality.py wrote.")],
    page: Annotated[Path, typer.Option(help="Where the two markers are.")] = ROOT / "docs" / "results.md",
) -> None:
    """Fills the page's results from a run; a second call with the same run changes nothing."""
    results = json.loads((run / "results.json").read_text())
    cards = {
        p.parent.name: json.loads(p.read_text())
        for p in sorted((ROOT / "mmhooks/assets").glob("*/card.json"))
    }
    fill(page, block(results, cards))
    image = page.parent / "img"
    image.mkdir(parents=True, exist_ok=True)
    for name in ("summary", "fig1_mds"):
        shutil.copy(run / f"{name}.png", image / f"{name}.png")


if __name__ == "__main__":
    typer.run(main)
