"""Writes a run of recipes/gender.py into docs/gender.md, between its two markers.

    PYTHONPATH=recipes python -m publish.gender runs/gender

Prints the sentence of docs/results.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.report import Cell, Table, fixed, percent
from mmhooks.studies.common.cards import format_duration
from mmhooks.studies.common.claims import Claim
from mmhooks.studies.gender.masking import MAIN, SIDES
from mmhooks.studies.gender.tables import live_note, separation_table, table6, table7, tone_table
from publish.marked_block import command, fill

ROOT = Path(__file__).parents[2]
EXPLORATORY = "(exploratory)"


def block(results: Mapping[str, Any]) -> str:
    """Returns the page's results: who is judged, the primary claims, Tables 6 and 7, separation, and the audit."""
    data, groups, env = results["data"], results["groups"]["sae"], results["environment"]
    judged, sizes = data["judged"], ", ".join(f"{g} {groups[g]}" for g in ("ImgD", "TextD", "CrossD"))
    found = [Claim(**c) for c in results["claims"]]
    bases = {side: results["masking"][MAIN][side]["prompt"]["base"]["accuracy"] for side in SIDES}
    right = " and ".join(f"{side}s {rate(base)}" for side, base in bases.items())
    lines = [
        f"`{command(results)}`: {judged['women']} women and {judged['men']} men of {judged['families']} families judged, none of "
        f"them seen in training. Dictionary `{groups['head']}`, {sizes}; rebuilt from it, {right} are classified correctly by "
        f"prompt. {format_duration(env['seconds'])}; {live_note(results)}.",
        "The claims that were named before the run, corrected together (Holm); against random sets a claim must hold over "
        "2,000 sets outside the group *and* over families:",
        "\n".join(
            f"- {c.claim} {c.measured[0].upper()}{c.measured[1:]}"
            for c in found
            if not c.claim.startswith(EXPLORATORY)
        ),
        "Everything else is exploratory:",
    ]
    lines += [made(results).markdown() for made in (table6, table7, separation_table)]
    lines.append("\n".join(f"- {c.sentence()}" for c in found if c.claim.startswith(EXPLORATORY)))
    lines += [tone_audit(results).markdown(), tone_table(results).markdown()]
    return "\n\n".join(lines)


def tone_audit(results: Mapping[str, Any]) -> Table:
    """Returns how many women and men are classified correctly by skin tone, and over all professions."""
    rows: list[list[str | Cell]] = []
    for line in results["audit"]:
        if line["kind"] == "all" or (
            line["kind"] == "profession" and not line["stratum"].startswith("all of")
        ):
            continue
        image, text = line["image"]["before"], line["text"]["before"]
        rows.append([
            line["stratum"], f"{line['women']} / {line['men']} / {line['unsaid']}",
            rate(image["women"]), rate(image["men"]), rate(image["p_woman"]["unsaid"]),
            rate(text["women"]), rate(text["men"]), rate(text["p_woman"]["unsaid"]),
        ])  # fmt: skip
    sides = [f"{side}: {what}" for side in ("images", "texts") for what in
             ("women right %", "men right %", "“woman” of unstated gender %")]  # fmt: skip
    return Table(
        ["Drawings", "women / men / unstated", *sides],
        rows,
        "Audit: all drawings of one person, those in training included",
        f"{results['audit'][0]['seen']} of {sum(results['audit'][0][k] for k in ('women', 'men', 'unsaid')):,} drawings were in "
        "training. By prompt, rebuilt from the dictionary, nothing masked; intervals (95 %) over families.",
        text_columns=(0, 1),
    )


def rate(estimate: Mapping[str, Any]) -> str:
    """Returns a share in per cent with its interval."""
    return Cell(
        percent(estimate["value"], 1), f"[{percent(estimate['low'])}, {percent(estimate['high'])}]"
    ).markdown()


def sentence(results: Mapping[str, Any]) -> str:
    """Returns the sentence for docs/results.md."""
    primaries = [c for c in results["claims"] if not c["claim"].startswith(EXPLORATORY)]
    drift = results["discrimination"]["arms"]["images"]["groups"]["ImgD"]["change"]
    area = drift["auc"]["estimate"]
    return (
        f"Gender, zero-masked (`{command(results)}`): "
        + "; ".join(f"{c['claim'].rstrip('.')}: {c['measured'].rstrip('.')}" for c in primaries)
        + f". Without ImgD images drift towards “woman” by {percent(drift['drift']['estimate']['value'], plus=True)} points, "
        f"their AUC changes by {fixed(area['value'], plus=True)} [{fixed(area['low'], plus=True)}, "
        f"{fixed(area['high'], plus=True)}]."
    )


def main(
    run: Annotated[Path, typer.Argument(help="The folder that recipes/gender.py wrote.")],
    page: Annotated[Path, typer.Option(help="Where the two markers are.")] = ROOT / "docs" / "gender.md",
) -> None:
    """Fills the page's results from a run; a second call with the same run changes nothing."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    fill(page, block(results))
    typer.echo(sentence(results))


if __name__ == "__main__":
    typer.run(main)
