"""Writes a run of recipes/adversarial.py into docs/adversarial.md, between its two markers, and copies its figures.

    PYTHONPATH=recipes python -m publish.adversarial runs/adversarial

Prints the sentence of docs/results.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.report import Table, fixed, percent
from mmhooks.report.tables import Cell
from mmhooks.studies.adversarial.defence import DEFENCES
from mmhooks.studies.adversarial.paper import claims
from mmhooks.studies.adversarial.tables import (
    PAPER,
    ROWS,
    calibration_table,
    cell,
    dictionary_table,
    format_p,
    gain_in_paper,
    label_of,
    left_in_paper,
)
from mmhooks.studies.common.write import VERDICTS
from publish.marked_block import command, fill

ROOT = Path(__file__).parents[2]


def block(results: Mapping[str, Any]) -> str:
    """Returns the page's results: settings, success, comparisons, triggers and words, cost, the paper's statements."""
    head, env, victims = results["head"], results["environment"], list(results["victims"].values())
    groups = ", ".join(f"{g} {n}" for g, n in head["groups"].items())
    o = results["settings"]
    lines = [
        f"`{command(results)}`: {results['samples']['n']} samples of seed {o['seed']} on {victims[0]['drawings']} drawings, "
        f"{o['steps']} steps at {o['lr']}. Dictionary: `{head['name']}`, {head['matched']} features per sample, "
        f"{o['repeats']} draws; groups by {head['rule']}: {groups} of {head['alive']} alive. {env['seconds']:.0f} s with "
        f"{env['threads']} thread(s)."
    ]
    if results["calibration"]["tried"]:
        lines.append(calibration_table(results).markdown())
    lines.append(success(results).markdown())
    lines.append(compared(results).markdown())
    lines.append(dictionary_table(results).markdown())
    lines += [by_trigger(v) for v in victims]
    lines.append(costs(results).markdown())
    lines.append("Against the paper (a verdict needs p < .05 after Holm):")
    lines.append(
        "\n".join(f"- **{VERDICTS[v]}**: {claim}. {measured}" for v, claim, measured in claims(results))
    )
    return "\n\n".join(lines)


def success(results: Mapping[str, Any]) -> Table:
    victims, head = list(results["victims"].values()), results["head"]
    weak = all(v["paper_point"] for v in victims)
    rows: list[list[str | Cell]] = []
    for c in ROWS:
        line: list[str | Cell] = [label_of(c)]
        for v in victims:
            line.append(cell(v["rates"][c]["all triggers"]))
            line.append(cell(v["gain_left"][c]) if c in v["gain_left"] else "")
            if weak:
                line.append(
                    cell(v["paper_point"]["gain_left"][c]) if c in v["paper_point"]["gain_left"] else ""
                )
        rows.append([*line, percent(PAPER.get(c), 0), left_in_paper(c)])
    columns = ["Aligned on"]
    for v in victims:
        columns += [f"{v['victim']}, {head['matched']} features", "left of the gain"]
        columns += [f"left at the paper's point ({head['smallest']} features)"] if weak else []
    return Table([*columns, "paper", "left"], rows, "Attack success and what is left of the attack's gain, %")


def compared(results: Mapping[str, Any]) -> Table:
    victims = list(results["victims"].values())
    rows: list[list[str | Cell]] = []
    for i, first in enumerate(victims[0]["comparisons"]):
        line: list[str | Cell] = [f"{first['one']} − {first['other']}"]
        for v in victims:
            r = v["comparisons"][i]
            line += [cell(r["difference"], plus=True), cell(r["gain"], plus=True), format_p(r["holm"])]
            line.append(percent(r["detectable"]))
        rows.append([*line, gain_in_paper(first["one"], first["other"])])
    columns = [
        part
        for v in victims
        for part in (f"{v['victim']}, points", "% of the gain", "p (Holm)", "detectable, points")
    ]
    return Table(
        ["", *columns, "paper, % of the gain"],
        rows,
        "Groups against random features and against each other, same samples, all draws",
    )


def by_trigger(victim: Mapping[str, Any]) -> str:
    """Returns a paragraph: success of the unaligned attack by trigger, and the effect of the word beyond covering."""
    rates = {t: r for t, r in victim["rates"]["unaligned"].items() if t != "all triggers"}
    text = (
        f"{victim['victim']}, unaligned, by trigger: "
        + ", ".join(f"{t} {with_interval(r)}" for t, r in rates.items())
        + "."
    )
    for trigger, r in victim["typographic"].items():
        noise, blank = (percent(r[c]["value"]) for c in ("noise", "blank"))
        text += (
            f" B(word) − B(nonsense) for {trigger}: {with_interval(r['unaligned']['difference'], plus=True)} points "
            f"(noise patch {noise}, blank plate {blank}); aligned on as many random features "
            f"{with_interval(r['random']['difference'], plus=True)}."
        )
    return text


def costs(results: Mapping[str, Any]) -> Table:
    cost = results["cost"]
    rows: list[list[str | Cell]] = []
    for c in ("before", *DEFENCES, "partner", "another picture"):
        line: list[str | Cell] = [label_of(c)]
        for found in cost["victims"].values():
            r = found[c]
            line += [cell(r["named"]), cell(r["kept"]), similarity_cell(r["similarity"])]
        rows.append([*line, fixed(cost["psnr"].get(c), 1)])
    columns = [
        f"{v}: {what}" for v in cost["victims"] for what in ("own name, %", "same answer, %", "similarity")
    ]
    return Table(
        ["Moved on", *columns, "PSNR, dB"], rows,
        f"Cost on {cost['n']} benign images, moved towards their friendly partner",
    )  # fmt: skip


def similarity_cell(r: Mapping[str, Any]) -> Cell:
    return Cell(fixed(r["value"], 2), f"[{fixed(r['low'], 2)}, {fixed(r['high'], 2)}]")


def with_interval(r: Mapping[str, Any], *, plus: bool = False) -> str:
    return cell(r, plus=plus).markdown()


def sentence(results: Mapping[str, Any]) -> str:
    """Returns the sentence for docs/results.md."""
    head, o = results["head"], results["settings"]
    parts = []
    for v in results["victims"].values():
        rates = {c: r["all triggers"] for c, r in v["rates"].items()}
        groups = ", ".join(f"{g} {with_interval(rates[g])}" for g in GROUPS)
        best = min((r for r in v["comparisons"] if r["other"] == "random"), key=lambda r: r["p"])
        parts.append(
            f"{v['victim']}: benign {with_interval(rates['benign'])}, unaligned {with_interval(rates['unaligned'])}, "
            f"aligned on {groups}, random features {with_interval(rates['random'])} (clearest: {best['one']} − random "
            f"{with_interval(best['difference'], plus=True)} points, p {format_p(best['holm'])} after Holm)"
        )
    return (
        f"Attacks (`{command(results)}`, n = {results['samples']['n']}, {head['matched']} features per sample, {o['repeats']} "
        f"draws; attack success in %, paper: benign 10, unaligned 80, 50 / 25 / 30, random 65). {'; '.join(parts)}."
    )


def main(
    run: Annotated[Path, typer.Argument(help="The folder that recipes/adversarial.py wrote.")],
    page: Annotated[Path, typer.Option(help="Where the two markers are.")] = ROOT / "docs" / "adversarial.md",
) -> None:
    """Fills the page's results from a run; a second call with the same run changes nothing."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    fill(page, block(results))
    for name in ("curves", "strips"):
        shutil.copyfile(run / f"{name}.png", page.parent / "figures" / f"adversarial-{name}.png")
    typer.echo(sentence(results))


if __name__ == "__main__":
    typer.run(main)
