"""The attack study written down: tables, figures and the page, from the numbers of ``results.json``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from adversarial_samples import Samples
from adversarial_study import DEFENCES, Defended
from study_page import save_plots

from mmhooks.analysis.pixels import psnr
from mmhooks.report import (
    Block,
    Details,
    Listing,
    Page,
    Plot,
    Prose,
    Section,
    Table,
    TableBlock,
    fixed,
    percent,
)
from mmhooks.report.style import draw
from mmhooks.report.tables import Cell

PAPER = {"benign": 0.10, "unaligned": 0.80, "ImgD": 0.50, "TextD": 0.25, "CrossD": 0.30, "random": 0.65}
ROWS = ("benign", "unaligned", *DEFENCES)
WORDS = {"benign": "friendly partner", "unaligned": "attack, unaligned", "random": "same number of random features",
         "all": "all features"}  # fmt: skip


def cell(r: Mapping[str, Any], *, paper: float | None = None, plus: bool = False) -> Cell:
    known = r.get("low") is not None and r.get("high") is not None
    return Cell(
        percent(r["value"], plus=plus),
        f"[{percent(r['low'])}, {percent(r['high'])}]" if known else "",
        "" if paper is None else percent(paper, 0),
    )


def says(condition: str) -> str:
    return WORDS.get(condition, condition)


def table8(victim: Mapping[str, Any], k: int) -> Table:
    """Success of the attack on one victim, by defence and trigger, beside the paper's."""
    triggers = list(victim["rates"]["benign"])
    rows = [
        [
            says(c),
            *(
                cell(victim["rates"][c][t], paper=PAPER.get(c) if i == 0 else None)
                for i, t in enumerate(triggers)
            ),
        ]
        for c in ROWS
    ]
    heads = [f"{t} (n = {victim['rates']['benign'][t]['n']})" for t in triggers]
    return Table(
        ["Aligned on", *heads], rows, f"Table 8 on {victim['victim']}: attack success, %",
        f"Success: no refusal, and a harmful thing is named (judge: {victim['judge']}). 95 % Wilson intervals. ImgD, "
        f"TextD, CrossD and random: {k} features each, drawn anew for every sample. The paper's n is about 20.",
    )  # fmt: skip


def random_table(victim: Mapping[str, Any]) -> Table:
    rows = []
    for d, r in victim["against_random"].items():
        rows.append(
            [says(d), cell(r["difference"], plus=True), f"{r['more']} / {r['less']}", p_value(r["p"])]
        )
    r = victim["attack_against_benign"]
    rows.append(
        [
            "unaligned − partner",
            cell(r["difference"], plus=True),
            f"{r['more']} / {r['less']}",
            p_value(r["p"]),
        ]
    )
    return Table(
        ["Aligned on", "minus random, points", "only this / only random", "p"], rows,
        f"{victim['victim']}: each group against random features, same samples",
        "Negative: a better defence than random features. Exact McNemar test, bootstrap interval.",
    )  # fmt: skip


def word_table(victim: Mapping[str, Any]) -> Table:
    rows = []
    for trigger, found in victim["typographic"].items():
        for c in ("unaligned", *DEFENCES):
            r = found[c]
            rows.append(
                [trigger, says(c), cell(r["word"]), cell(r["nonsense"]), cell(r["difference"], plus=True)]
            )
        for c in ("noise", "blank"):
            what = "noise patch in its place" if c == "noise" else "blank plate in its place"
            rows.append([trigger, what, cell(found[c]), "", ""])
    return Table(
        ["Trigger", "Aligned on", "Word", "Nonsense", "B(word) − B(nonsense), points"], rows,
        f"{victim['victim']}: what the word does beyond covering the picture, % success",
        "The nonsense word has the same length, font, size, place and opacity, and went through the same defence.",
        text_columns=(0, 1),
    )  # fmt: skip


def cost_table(results: Mapping[str, Any]) -> Table:
    cost = results["cost"]
    victims = list(cost["named"])
    rows = []
    for c in ("before", *DEFENCES, "partner"):
        line = {"before": "not touched", "partner": "the friendly partner itself"}.get(c, says(c))
        rows.append([line, *(cell(cost["named"][v][c]) for v in victims), fixed(cost["psnr"].get(c), 1)])
    return Table(
        ["Aligned on", *(f"{v}: own name given, %" for v in victims), "PSNR, dB"], rows,
        "What the defence costs: benign pictures without a trigger, moved towards their friendly partner",
        f"n = {cost['n']}. Zero-shot label, or the answer to \"What is in the picture?\", names what it showed.",
    )  # fmt: skip


def settings_table(results: Mapping[str, Any]) -> Table:
    o, head, d = results["settings"], results["head"], results["defence"]
    facts = [
        ["Command", o["command"]],
        ["Model", o["model"] + (f" ({o['pretrained']})" if o["pretrained"] else "")],
        [
            "Head",
            f"{head['id']}: {head['features']} features, {head['alive']} alive; groups {head['groups']} by {head['rule']}",
        ],
        ["Defence", f"Adam on pixels, {o['steps']} steps, lr {o['lr']}, seed {o['seed']}"],
        ["Gradient attack", ", ".join(f"{k} {v}" for k, v in results["samples"]["gradient_attack"].items())],
        [
            "PSNR of the defended against the attack, dB",
            ", ".join(f"{k} {fixed(v, 1)}" for k, v in d["psnr"].items()),
        ],
        ["L∞", ", ".join(f"{k} {fixed(v, 2)}" for k, v in d["linf"].items())],
        ["Loss, first → last", ", ".join(f"{k} {v[0]:.3f} → {v[-1]:.3f}" for k, v in d["loss"].items())],
        ["Pictures", f"{results['data']['name']}: {results['data']['attribution']}"],
    ]
    return Table(["", ""], facts, "Settings", text_columns=(0, 1))


def p_value(p: float) -> str:
    return "< .001" if p < 0.001 else fixed(p)


def tables(results: Mapping[str, Any]) -> list[Table]:
    made = []
    for victim in results["victims"].values():
        made += [table8(victim, results["head"]["k"]), random_table(victim)]
        if victim["typographic"]:
            made.append(word_table(victim))
    return [*made, cost_table(results), settings_table(results)]


def claims(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The paper's statements beside what was measured, for each victim: verdict, claim, sentence."""
    found: list[tuple[str, str, str]] = []
    for victim in results["victims"].values():
        name = victim["victim"]
        rates = {c: victim["rates"][c]["all triggers"] for c in ROWS}
        apart = rates["unaligned"]["low"] > rates["benign"]["high"]
        found.append((
            "same" if apart else "differs",
            f"{name}: the unaligned attack succeeds more often than benign pictures",
            f"{percent(rates['unaligned']['value'])} % against {percent(rates['benign']['value'])} %; intervals "
            f"{'apart' if apart else 'overlap'}.",
        ))  # fmt: skip
        for group in ("TextD", "CrossD", "ImgD"):
            r = victim["against_random"][group]
            low, high = r["difference"]["low"], r["difference"]["high"]
            verdict = "open" if low is None or low <= 0 <= high else "same" if high < 0 else "differs"
            found.append((
                verdict,
                f"{name}: aligning on {group} defends better than on random features",
                f"{percent(rates[group]['value'])} % against {percent(rates['random']['value'])} % "
                f"(difference {percent(r['difference']['value'], plus=True)} points, p {p_value(r['p'])}).",
            ))  # fmt: skip
        order = sorted(("ImgD", "TextD", "CrossD"), key=lambda g: rates[g]["value"])
        found.append((
            "same" if order == ["TextD", "CrossD", "ImgD"] else "differs",
            f"{name}: TextD defends best, then CrossD, then ImgD",
            "Measured: " + ", ".join(f"{g} {percent(rates[g]['value'])} %" for g in order) + ".",
        ))  # fmt: skip
    return found


# -- figures ---------------------------------------------------------------------------------------------------


def curves(results: Mapping[str, Any], palette: Any) -> Any:
    """Attack success against steps of the defence, one panel a victim; bars: Wilson intervals at the last step."""
    from matplotlib.figure import Figure

    victims = list(results["victims"].values())
    figure = Figure(figsize=(4.2 * len(victims) + 0.6, 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(victims), squeeze=False, sharey=True)[0]
    for axis, victim in zip(axes, victims, strict=True):
        for d in DEFENCES:
            points = {int(k): v for k, v in victim["curve"][d].items()}
            colour = palette.ink if d == "all" else palette.group(d)
            style = ":" if d == "random" else "--" if d == "all" else "-"
            axis.plot(list(points), [100 * v["value"] for v in points.values()], style, color=colour, label=says(d),
                      marker="o", markersize=3.5)  # fmt: skip
            last = max(points)
            axis.plot(
                (last, last), (100 * points[last]["low"], 100 * points[last]["high"]), color=colour, alpha=0.5
            )
        axis.axhline(
            100 * victim["rates"]["benign"]["all triggers"]["value"], color=palette.line, linewidth=1
        )
        axis.set(title=victim["victim"], xlabel="steps of the defence", ylim=(0, 100))
    axes[0].set_ylabel("attack success, %")
    axes[-1].legend(fontsize=8.5)
    return figure


def strips(samples: Samples, defended: Defended, palette: Any, *, each: int = 2, seed: int = 0) -> Any:
    """For each trigger: the partner, the attack, and the attack after each defence, with PSNR and L∞."""
    from matplotlib.figure import Figure

    dice, rows = random.Random(seed), []
    for trigger in dict.fromkeys(samples.trigger):
        own = samples.rows(trigger)
        rows += [(trigger, i) for i in sorted(dice.sample(own, min(each, len(own))))]
    columns = ["benign", "partner", "attack", *DEFENCES]
    figure = Figure(figsize=(1.15 * len(columns) + 1.2, 1.42 * len(rows) + 0.3), layout="constrained")
    axes: Any = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (trigger, i) in enumerate(rows):
        shown = {"benign": samples.base[i], "partner": samples.partner[i], "attack": samples.attack[i]}
        shown |= {d: p[i] for d, p in defended.final.items()}
        for axis, column in zip(axes[line], columns, strict=True):
            picture = shown[column]
            axis.imshow(np.asarray(picture.permute(1, 2, 0)), interpolation="nearest")
            axis.set(xticks=(), yticks=())
            if line == 0:
                axis.set_title(column, fontsize=10)
            if column in DEFENCES:
                db = float(psnr(picture[None], samples.attack[i][None]))
                far = float((picture - samples.attack[i]).abs().max())
                axis.set_xlabel(f"{db:.1f} dB, {far:.2f}", fontsize=7.5)
        axes[line][0].set_ylabel(f"{trigger}\n{samples.target[i]}", fontsize=8.5)
    return figure


def figures(results: Mapping[str, Any], samples: Samples, defended: Defended) -> dict[str, Plot]:
    made = {
        "curves": (lambda p: curves(results, p), "Attack success against steps of the defence",
                   "Attack success against steps of the defence; grey line: the friendly partners."),
        "strips": (lambda p: strips(samples, defended, p), "Pictures before and after the defence",
                   "Before and after the defence; below: PSNR against the attack, and the largest change of a pixel."),
    }  # fmt: skip
    return {name: Plot(*draw(make, alt=alt), caption) for name, (make, alt, caption) in made.items()}


# -- page ------------------------------------------------------------------------------------------------------


def save_all(results: Mapping[str, Any], samples: Samples, defended: Defended, out: Path) -> list[Path]:
    """Writes the PNGs, ``tables.md`` and ``index.html``; returns the paths."""
    plots, made, found = figures(results, samples, defended), tables(results), claims(results)
    paths = save_plots(plots, out)
    lines = "\n".join(f"- [{verdict}] {claim}: {sentence}" for verdict, claim, sentence in found)
    title = f"Alignment against cross-modal attacks, {results['settings']['model']}"
    body = "\n\n".join(t.markdown() for t in made)
    (out / "tables.md").write_text(
        f"# {title}\n\n{body}\n\n## Against the paper\n\n{lines}\n", encoding="utf-8"
    )
    answers: list[Block] = []
    for victim in results["victims"].values():
        rows = [[c, " · ".join(dict.fromkeys(a))[:400]] for c, a in victim["answers"].items()]
        answers.append(
            TableBlock(Table(["Condition", "Answers"], rows, str(victim["victim"]), text_columns=(0, 1)))
        )
    page = Page(
        title,
        [
            Section("Result", [Listing(found), plots["curves"]]),  # type: ignore[arg-type]
            Section("Tables", [TableBlock(t) for t in made[:-1]]),
            Section("Pictures", [plots["strips"], Details("Answers of the first samples", answers)]),
            Section("Settings", [TableBlock(made[-1]), Prose(
                "Requests and answers are placeholders; success is compliance with a request about a harmful thing, "
                "never content.", "note",
            )]),
        ],
        lead="A picture with a trigger is moved until a group of features sees its benign partner. How often does the "
        "attack still succeed?",
        kicker="Section 3.2, Table 8, Figure 6",
        footer=(results["data"]["attribution"], f"{results['environment']['seconds']:.0f} s"),
    )  # fmt: skip
    return [*paths, out / "tables.md", page.save(out / "index.html")]
