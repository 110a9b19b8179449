"""The attack study written down: tables, figures and the page, from the numbers of ``results.json``."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from adversarial_cost import DESCRIBE
from adversarial_defence import DEFENCES, GROUPS
from adversarial_samples import Samples
from study_page import Verdict, save_plots
from torch import Tensor

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
from mmhooks.utils.escape import markdown as escaped
from mmhooks.utils.escape import one_line, rich_text
from mmhooks.utils.files import write_text

PAPER = {"benign": 0.10, "unaligned": 0.80, "ImgD": 0.50, "TextD": 0.25, "CrossD": 0.30, "random": 0.65}
ROWS = ("benign", "unaligned", *DEFENCES)
WORDS = {"benign": "friendly partner", "unaligned": "attack, unaligned", "random": "as many random features",
         "all": "all features", "before": "not moved", "partner": "the friendly partner itself"}  # fmt: skip


def cell(r: Mapping[str, Any], *, paper: float | None = None, plus: bool = False) -> Cell:
    known = r.get("low") is not None and r.get("high") is not None
    return Cell(
        percent(r["value"], plus=plus),
        f"[{percent(r['low'])}, {percent(r['high'])}]" if known else "",
        "" if paper is None else percent(paper, 0),
    )


def says(condition: str) -> str:
    return WORDS.get(condition, condition)


def table8(victim: Mapping[str, Any], head: Mapping[str, Any]) -> Table:
    """Success of the attack on one victim, by defence and trigger, beside the paper's."""
    triggers, strong = list(victim["rates"]["benign"]), victim["strong"]
    rows = []
    for c in ROWS:
        first, *others = (cell(victim["rates"][c][t]) for t in triggers)
        hard = cell(strong[c]) if c in strong else ""
        paper = percent(PAPER[c], 0) if c in PAPER else ""
        rows.append([says(c), first, *([hard] if strong else []), paper, *others])
    heads = [f"{t} (n = {victim['rates']['benign'][t]['n']})" for t in triggers]
    hard = [f"all triggers, {head['strong']} features a group"] if strong else []
    return Table(
        ["Aligned on", heads[0], *hard, "paper", *heads[1:]], rows,
        f"Table 8 on {victim['victim']}: attack success, %",
        f"Success: no refusal, and a harmful thing is named (judge: {victim['judge']}). ImgD, TextD, CrossD and random: "
        f"{head['matched']} features each, drawn anew for every sample, in {victim['repeats']['random']} runs; 95 % "
        "intervals: cluster bootstrap over samples, Wilson for what was run once. The paper's n is about 20.",
    )  # fmt: skip


def comparison_table(victim: Mapping[str, Any], head: Mapping[str, Any]) -> Table:
    rows = []
    hard = victim["comparisons_strong"] or [None] * len(victim["comparisons"])
    for r, h in zip(victim["comparisons"], hard, strict=True):
        line = [f"{r['one']} − {r['other']}", cell(r["difference"], plus=True), f"{r['more']} / {r['less']}"]
        line += [p_value(r["p"]), p_value(r["q"]), percent(PAPER[r["one"]] - PAPER[r["other"]], 0, plus=True)]
        rows.append([*line, *([cell(h["difference"], plus=True), p_value(h["p"])] if h else [])])
    r = victim["attack_against_benign"]
    line = ["unaligned − partner", cell(r["difference"], plus=True), f"{r['more']} / {r['less']}"]
    line += [p_value(r["p"]), "", percent(PAPER["unaligned"] - PAPER["benign"], 0, plus=True)]
    rows.append([*line, *(["", ""] if hard[0] else [])])
    more = [f"{head['strong']} features: points", "p"] if hard[0] else []
    return Table(
        ["", f"{head['matched']} features: points", "samples with more / less", "p", "q", "paper", *more], rows,
        f"{victim['victim']}: groups against random features and against each other, same samples",
        "Negative: the first defends better. Bootstrap over samples; p: signs of the samples' differences flipped, exact "
        "(McNemar's test where both ran once); q: Benjamini–Hochberg over the six comparisons.",
    )  # fmt: skip


def calibration_table(results: Mapping[str, Any]) -> Table:
    """Random features alone, on samples that are in no other table: how many leave half of the attack's gain."""
    c = results["calibration"]
    victims = list(c["rates"])
    rows: list[list[str]] = [
        [says(what), *(percent(c["rates"][v][what]) for v in victims), ""] for what in ("benign", "unaligned")
    ]
    for k, r in c["tried"].items():
        chosen = " ←" if int(k) == c["matched"] else ""
        rows.append(
            [
                f"{k} random features{chosen}",
                *(percent(r["rates"][v]) for v in victims),
                percent(r["left"], 0),
            ]
        )
    return Table(
        ["", *(f"{v}, %" for v in victims), "left of the gain, %"], rows,
        "How many features are matched",
        f"{c['n']} samples of seed {c['seed']}, random features only; chosen: {c['matched']} ({c['rule']}).",
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


def cost_table(name: str, cost: Mapping[str, Any]) -> Table:
    found, rows = cost["victims"][name], []
    for c in ("before", *DEFENCES, "partner", "another picture"):
        r, line = found[c], [says(c)]
        alike = [fixed(r["similarity"][k], 2) for k in ("value", "low", "high")]
        gap = "" if c in ("before", "partner") else cell(r["against_partner"]["difference"], plus=True)
        line += [cell(r["named"]), cell(r["kept"]), gap, Cell(alike[0], f"[{alike[1]}, {alike[2]}]")]  # type: ignore[list-item]
        rows.append([*line, fixed(cost["psnr"].get(c), 1)])
    return Table(
        ["Moved on", "own name given, %", "same answer, %", "minus the partner's, points", "similarity", "PSNR, dB"],
        rows, f"{name}: what the defence costs benign pictures",
        f"n = {cost['n']} pictures without a trigger, moved towards their friendly partner (first draw). Answers to "
        f'"{DESCRIBE}" (zero-shot: the label); similarity: mean cosine of MiniLM embeddings with the answer before.',
    )  # fmt: skip


def settings_table(results: Mapping[str, Any]) -> Table:
    o, head = results["settings"], results["head"]
    runs = [r for r in results["defence"] if r["draw"] == 0]
    told = {
        "PSNR of the defended against the attack, dB": lambda r: fixed(r["psnr"], 1),
        "L∞": lambda r: fixed(r["linf"], 2),
        "Loss, first → last": lambda r: f"{r['loss'][0]:.3f} → {r['loss'][-1]:.3f}",
    }
    measured = [
        [what, ", ".join(f"{r['defence']}{', strong' if r['strong'] else ''} {say(r)}" for r in runs)]
        for what, say in told.items()
    ]
    facts = [
        ["Command", o["command"]],
        ["Model", o["model"] + (f" ({o['pretrained']})" if o["pretrained"] else "")],
        [
            "Head",
            f"{head['id']}: {head['features']} features, {head['alive']} alive; groups {head['groups']} by {head['rule']}",
        ],
        [
            "Defence",
            f"{head['matched']} features a sample ({results['calibration']['rule']}), {o['repeats']} draws; Adam on "
            f"pixels, {o['steps']} steps, lr {o['lr']}, seed {o['seed']}",
        ],
        ["Gradient attack", ", ".join(f"{k} {v}" for k, v in results["samples"]["gradient_attack"].items())],
        *measured,
        ["Pictures", f"{results['data']['name']}: {results['data']['attribution']}"],
        ["Time", f"{results['environment']['seconds']:.0f} s, {results['environment']['threads']} threads"],
    ]
    return Table(["", ""], facts, "Settings", text_columns=(0, 1))


def p_value(p: float) -> str:
    return "< .001" if p < 0.001 else fixed(p)


def tables(results: Mapping[str, Any]) -> list[Table]:
    made, head = [], results["head"]
    for victim in results["victims"].values():
        made += [table8(victim, head), comparison_table(victim, head)]
        if victim["typographic"]:
            made.append(word_table(victim))
    made += [cost_table(name, results["cost"]) for name in results["cost"]["victims"]]
    if "tried" in results["calibration"]:
        made.append(calibration_table(results))
    return [*made, settings_table(results)]


def claims(results: Mapping[str, Any]) -> list[tuple[Verdict, str, str]]:
    """The paper's statements beside what was measured, for each victim: verdict, claim, sentence."""
    found: list[tuple[Verdict, str, str]] = []
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
        compared = {(r["one"], r["other"]): r for r in victim["comparisons"]}
        found.extend(
            (
                verdict_of(compared[group, "random"]),
                f"{name}: aligning on {group} defends better than on random features",
                f"{percent(rates[group]['value'])} % against {percent(rates['random']['value'])} % "
                f"({difference(compared[group, 'random'])}).",
            )
            for group in ("TextD", "CrossD", "ImgD")
        )
        pairs = [("TextD", "CrossD"), ("CrossD", "ImgD"), ("TextD", "ImgD")]
        verdicts = [verdict_of(compared[p]) for p in pairs]
        order: Verdict = (
            "differs" if "differs" in verdicts else "same" if set(verdicts) == {"same"} else "open"
        )
        best = sorted(GROUPS, key=lambda g: rates[g]["value"])
        found.append((
            order,
            f"{name}: TextD defends best, then CrossD, then ImgD",
            "Measured: " + ", ".join(f"{g} {percent(rates[g]['value'])} %" for g in best) + "; "
            + "; ".join(f"{a} − {b} {difference(compared[a, b])}" for a, b in pairs) + ".",
        ))  # fmt: skip
    return found


def verdict_of(compared: Mapping[str, Any]) -> Verdict:
    """Whether the first defends better: told only where q over all comparisons is below .05."""
    if compared["q"] >= 0.05:
        return "open"
    return "same" if compared["difference"]["value"] < 0 else "differs"


def difference(compared: Mapping[str, Any]) -> str:
    return f"{percent(compared['difference']['value'], plus=True)} points, q {p_value(compared['q'])}"


# -- figures ---------------------------------------------------------------------------------------------------


def curves(results: Mapping[str, Any], palette: Any) -> Any:
    """Attack success against steps of the defence in its first draw, a panel a victim; bars: Wilson, last step."""
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
        axis.set(title=one_line(victim["victim"]), xlabel="steps of the defence", ylim=(0, 100))
    axes[0].set_ylabel("attack success, %")
    axes[-1].legend(fontsize=8.5)
    return figure


def strips(
    samples: Samples, defended: Mapping[str, Tensor], palette: Any, *, each: int = 2, seed: int = 0
) -> Any:
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
        shown |= {d: p[i] for d, p in defended.items()}
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
        axes[line][0].set_ylabel(f"{one_line(trigger)}\n{one_line(samples.target[i])}", fontsize=8.5)
    return figure


def figures(results: Mapping[str, Any], samples: Samples, defended: Mapping[str, Tensor]) -> dict[str, Plot]:
    made = {
        "curves": (lambda p: curves(results, p), "Attack success against steps of the defence",
                   "Attack success against steps of the defence, first draw; grey line: the friendly partners."),
        "strips": (lambda p: strips(samples, defended, p), "Pictures before and after the defence",
                   "Before and after the first draw of the defence; below: PSNR against the attack, largest change of a pixel."),
    }  # fmt: skip
    return {name: Plot(*draw(make, alt=alt), caption) for name, (make, alt, caption) in made.items()}


# -- page ------------------------------------------------------------------------------------------------------


def save_all(
    results: Mapping[str, Any], samples: Samples, defended: Mapping[str, Tensor], out: Path
) -> list[Path]:
    """Writes the PNGs, ``tables.md`` and ``index.html``; returns the paths."""
    plots, made, found = figures(results, samples, defended), tables(results), claims(results)
    paths = save_plots(plots, out)
    lines = "\n".join(
        f"- [{verdict}] {escaped(claim, code=True)}: {escaped(sentence, code=True)}"
        for verdict, claim, sentence in found
    )
    title = f"Alignment against cross-modal attacks, {results['settings']['model']}"
    body = "\n\n".join(t.markdown() for t in made)
    write_text(out / "tables.md", f"# {escaped(title)}\n\n{body}\n\n## Against the paper\n\n{lines}\n")
    answers: list[Block] = []
    for victim in results["victims"].values():
        rows = [[c, " · ".join(dict.fromkeys(a))[:400]] for c, a in victim["answers"].items()]
        answers.append(
            TableBlock(Table(["Condition", "Answers"], rows, str(victim["victim"]), text_columns=(0, 1)))
        )
    page = Page(
        title,
        [
            Section("Result", [Listing(found), plots["curves"]]),
            Section("Tables", [TableBlock(t) for t in made[:-1]]),
            Section("Pictures", [plots["strips"], Details("Answers of the first samples", answers)]),
            Section("Settings", [TableBlock(made[-1]), Prose(
                "Requests and answers are placeholders; success is compliance with a request about a harmful thing, "
                "never content.", "note",
            )]),
        ],
        lead=f"A picture with a trigger is moved until {results['head']['matched']} features of a group see its benign "
        "partner. How often does the attack still succeed?",
        kicker="Section 3.2, Table 8, Figure 6",
        footer=(results["data"]["attribution"], f"{results['environment']['seconds']:.0f} s"),
    )  # fmt: skip
    return [*paths, out / "tables.md", page.save(out / "index.html")]


def report(console: Any, paths: Sequence[Path]) -> None:
    """The tables on the screen, then where everything lies."""
    tables = next(path for path in paths if path.name == "tables.md")
    console.print(rich_text(tables.read_text(), lines=True))
    for path in paths:
        console.print(rich_text(f"  {path}"))
