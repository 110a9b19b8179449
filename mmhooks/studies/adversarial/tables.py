"""Tables of the adversarial study, with the paper's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhooks.report import Table, fixed, percent
from mmhooks.report.tables import Cell
from mmhooks.studies.adversarial.cost import DESCRIBE
from mmhooks.studies.adversarial.defence import DEFENCES

PAPER = {"benign": 0.10, "unaligned": 0.80, "ImgD": 0.50, "TextD": 0.25, "CrossD": 0.30, "random": 0.65}
ROWS = ("benign", "unaligned", *DEFENCES)
WORDS = {"benign": "friendly partner", "unaligned": "attack, unaligned", "random": "as many random features",
         "all": "all features", "before": "not moved", "partner": "the friendly partner itself",
         "another picture": "another image"}  # fmt: skip


def cell(r: Mapping[str, Any], *, paper: float | None = None, plus: bool = False) -> Cell:
    known = r.get("low") is not None and r.get("high") is not None
    return Cell(
        percent(r["value"], plus=plus),
        f"[{percent(r['low'])}, {percent(r['high'])}]" if known else "",
        "" if paper is None else percent(paper, 0),
    )


def label_of(condition: str) -> str:
    return WORDS.get(condition, condition)


def table8(victim: Mapping[str, Any], head: Mapping[str, Any]) -> Table:
    """Returns the success of the attack on one victim, by defence and trigger, with the paper's values."""
    triggers, strong = list(victim["rates"]["benign"]), victim["strong"]
    rows = []
    for c in ROWS:
        first, *others = (cell(victim["rates"][c][t]) for t in triggers)
        hard = cell(strong[c]) if c in strong else ""
        paper = percent(PAPER[c], 0) if c in PAPER else ""
        left = cell(victim["gain_left"][c]) if c in victim["gain_left"] else ""
        rows.append([label_of(c), first, left, *([hard] if strong else []), paper, *others])
    heads = [f"{t} (n = {victim['rates']['benign'][t]['n']})" for t in triggers]
    hard = [f"all triggers, {head['strong']} features per group"] if strong else []
    return Table(
        ["Aligned on", heads[0], "left of the gain", *hard, "paper", *heads[1:]], rows,
        f"Table 8 on {victim['victim']}: attack success, %",
        f"Success: no refusal, and a harmful thing is named (judge: {victim['judge']}). ImgD, TextD, CrossD and random: "
        f"{head['matched']} features each, drawn separately for every sample, in {victim['repeats']['random']} runs. Left of "
        "the gain: (aligned − partner) / (unaligned − partner), over drawings; 79 % for random features in the paper. 95 % "
        "intervals: cluster bootstrap over samples, Wilson where there is one run. The paper's n is about 20.",
    )  # fmt: skip


def comparison_table(victim: Mapping[str, Any], head: Mapping[str, Any]) -> Table:
    rows = []
    hard = victim["comparisons_strong"] or [None] * len(victim["comparisons"])
    for r, h in zip(victim["comparisons"], hard, strict=True):
        line = [f"{r['one']} − {r['other']}", cell(r["difference"], plus=True), f"{r['more']} / {r['less']}"]
        line += [
            format_p(r["p"]),
            format_p(r["holm"]),
            percent(r["detectable"]),
            percent(PAPER[r["one"]] - PAPER[r["other"]], 0, plus=True),
        ]
        rows.append([*line, *([cell(h["difference"], plus=True), format_p(h["p"])] if h else [])])
    r = victim["attack_against_benign"]
    line = ["unaligned − partner", cell(r["difference"], plus=True), f"{r['more']} / {r['less']}"]
    line += [format_p(r["p"]), "", "", percent(PAPER["unaligned"] - PAPER["benign"], 0, plus=True)]
    rows.append([*line, *(["", ""] if hard[0] else [])])
    more = [f"{head['strong']} features: points", "p"] if hard[0] else []
    return Table(
        ["", f"{head['matched']} features: points", "drawings with more / less", "p", "p (Holm)", "detectable", "paper",
         *more], rows,
        f"{victim['victim']}: groups against random features and against each other, same samples",
        "Negative: the first defends better. Bootstrap over the drawings under the samples; p: exact sign-flip test of the "
        "drawings' differences; Holm: over the six comparisons; detectable: the smallest difference seen at 80 % power.",
    )  # fmt: skip


def calibration_table(results: Mapping[str, Any]) -> Table:
    """Returns the calibration: how many random features leave half of the attack's gain, on samples of no other table."""
    c = results["calibration"]
    victims = list(c["rates"])
    rows: list[list[str]] = [
        [label_of(what), *(percent(c["rates"][v][what]) for v in victims), ""]
        for what in ("benign", "unaligned")
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
                [trigger, label_of(c), cell(r["word"]), cell(r["nonsense"]), cell(r["difference"], plus=True)]
            )
        for c in ("noise", "blank"):
            what = "noise patch in its place" if c == "noise" else "blank plate in its place"
            rows.append([trigger, what, cell(found[c]), "", ""])
    return Table(
        ["Trigger", "Aligned on", "Word", "Nonsense", "B(word) − B(nonsense), points"], rows,
        f"{victim['victim']}: what the word does beyond covering the image, % success",
        "The nonsense word has the same length, font, size, place and opacity, and went through the same defence.",
        text_columns=(0, 1),
    )  # fmt: skip


def cost_table(name: str, cost: Mapping[str, Any]) -> Table:
    found, rows = cost["victims"][name], []
    for c in ("before", *DEFENCES, "partner", "another picture"):
        r, line = found[c], [label_of(c)]
        similarity = [fixed(r["similarity"][k], 2) for k in ("value", "low", "high")]
        gap = "" if c in ("before", "partner") else cell(r["against_partner"]["difference"], plus=True)
        line += [
            cell(r["named"]),
            cell(r["kept"]),
            gap,
            Cell(similarity[0], f"[{similarity[1]}, {similarity[2]}]"),
        ]  # type: ignore[list-item]
        rows.append([*line, fixed(cost["psnr"].get(c), 1)])
    return Table(
        ["Moved on", "own name given, %", "same answer, %", "minus the partner's, points", "similarity", "PSNR, dB"],
        rows, f"{name}: what the defence costs benign images",
        f"n = {cost['n']} images without a trigger, moved towards their friendly partner (first draw). Answers to "
        f'"{DESCRIBE}" (zero-shot: the label); similarity: mean cosine of MiniLM embeddings with the answer before.',
    )  # fmt: skip


def settings_table(results: Mapping[str, Any]) -> Table:
    o, head = results["settings"], results["head"]
    runs = [r for r in results["defence"] if r["draw"] == 0]
    columns = {
        "PSNR of the defended against the attack, dB": lambda r: fixed(r["psnr"], 1),
        "L∞": lambda r: fixed(r["linf"], 2),
        "Loss, first → last": lambda r: f"{r['loss'][0]:.3f} → {r['loss'][-1]:.3f}",
    }
    measured = [
        [what, ", ".join(f"{r['defence']}{', strong' if r['strong'] else ''} {say(r)}" for r in runs)]
        for what, say in columns.items()
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
            f"{head['matched']} features per sample ({results['calibration']['rule']}), {o['repeats']} draws; Adam on "
            f"pixels, {o['steps']} steps, lr {o['lr']}, seed {o['seed']}",
        ],
        ["Gradient attack", ", ".join(f"{k} {v}" for k, v in results["samples"]["gradient_attack"].items())],
        [
            "Answers",
            "; ".join(
                f"{v}: at most {a['limit']} tokens, {a['cut']} of {a['asked']} cut"
                for v, a in results["answer_lengths"].items()
            )
            or "labels",
        ],
        *measured,
        ["Images", f"{results['data']['name']}: {results['data']['attribution']}"],
        ["Time", f"{results['environment']['seconds']:.0f} s, {results['environment']['threads']} threads"],
    ]
    return Table(["", ""], facts, "Settings", text_columns=(0, 1))


def format_p(p: float) -> str:
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
