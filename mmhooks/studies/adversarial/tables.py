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
    triggers, weak = list(victim["rates"]["benign"]), victim["paper_point"]
    rows = []
    for c in ROWS:
        first, *others = (cell(victim["rates"][c][t]) for t in triggers)
        paper = percent(PAPER[c], 0) if c in PAPER else ""
        left = cell(victim["gain_left"][c]) if c in victim["gain_left"] else ""
        at = [cell(weak[k][c]) if c in weak[k] else "" for k in ("rates", "gain_left")] if weak else []
        rows.append([label_of(c), first, left, *at, paper, left_in_paper(c), *others])
    heads = [f"{t} (n = {victim['rates']['benign'][t]['n']})" for t in triggers]
    at = ["at the paper's point", "left of the gain there"] if weak else []
    return Table(
        ["Aligned on", heads[0], "left of the gain", *at, "paper", "left in the paper", *heads[1:]], rows,
        f"Table 8 on {victim['victim']}: attack success, %",
        f"Success: no refusal, and a harmful thing is named (judge: {victim['judge']}). Dictionary: {head['name']}. ImgD, "
        f"TextD, CrossD and random: {head['matched']} features each, drawn separately for every sample, in "
        f"{victim['repeats']['random']} runs; at the paper's point {head['smallest']} features, as weakly that random ones "
        f"leave the paper's 79 %, one run. Left of the gain: (aligned − partner) / (unaligned − partner), over "
        f"{victim['drawings']} drawings. 95 % intervals: cluster bootstrap over samples, Wilson where there is one run. The "
        "paper's n is about 20.",
    )  # fmt: skip


def left_in_paper(condition: str) -> str:
    """Returns the share of the gain that the paper's defence leaves; empty where it has none."""
    if condition not in PAPER or condition in ("benign", "unaligned"):
        return ""
    return percent((PAPER[condition] - PAPER["benign"]) / (PAPER["unaligned"] - PAPER["benign"]), 0)


def gain_in_paper(one: str, other: str) -> str:
    share = (PAPER[one] - PAPER[other]) / (PAPER["unaligned"] - PAPER["benign"])
    return percent(share, 0, plus=True)


def comparison_table(victim: Mapping[str, Any], head: Mapping[str, Any]) -> Table:
    rows = []
    weak = victim["paper_point"].get("comparisons") or [None] * len(victim["comparisons"])
    for r, w in zip(victim["comparisons"], weak, strict=True):
        line = [f"{r['one']} − {r['other']}", cell(r["difference"], plus=True), cell(r["gain"], plus=True)]
        line += [f"{r['more']} / {r['less']}", format_p(r["p"]), format_p(r["holm"])]
        line += [percent(r["detectable"]), gain_in_paper(r["one"], r["other"])]
        rows.append([*line, *([cell(w["gain"], plus=True), format_p(w["p"])] if w else [])])
    r = victim["attack_against_benign"]
    line = ["unaligned − partner", cell(r["difference"], plus=True), "", f"{r['more']} / {r['less']}"]
    line += [
        format_p(r["p"]),
        "",
        "",
        percent(PAPER["unaligned"] - PAPER["benign"], 0, plus=True) + " points",
    ]
    rows.append([*line, *(["", ""] if weak[0] else [])])
    more = ["at the paper's point: of the gain", "p (exploratory)"] if weak[0] else []
    return Table(
        ["", "points", "% of the gain", "drawings with more / less", "p", "p (Holm)", "detectable, points",
         "paper, % of the gain", *more], rows,
        f"{victim['victim']}: groups against random features and against each other, same samples",
        f"Negative: the first defends better. Over {victim['drawings']} drawings and over {victim['targets']} targets: the wider "
        "interval and the larger p (exact, by sign flips) of the two; Holm: over the six comparisons of every victim; "
        "detectable: the smallest difference seen at 80 % power.",
    )  # fmt: skip


def dictionary_table(results: Mapping[str, Any]) -> Table:
    """Returns for every dictionary and victim what random features leave of the gain, and by how much groups differ."""
    rows = []
    for name, found in results["dictionaries"].items():
        head = found["head"]
        seen = {True: "no", False: "yes", None: ""}[head["unseen"]]
        for victim, r in found["victims"].items():
            beyond = {c["one"]: c for c in r["comparisons"] if c["other"] == "random"}
            cells = [cell_with_p(beyond[g]["gain"], beyond[g]["p"]) for g in ("TextD", "CrossD", "ImgD")]
            facts = [f"{head['alive']} of {head['features']}", seen, str(head["matched"])]
            rows.append([name, victim, *facts, cell(r["gain_left"]["random"]), *cells])
    paper = [gain_in_paper(g, "random") for g in ("TextD", "CrossD", "ImgD")]
    rows.append(["the paper's", "LLaVA-1.5-7b", "", "", "", left_in_paper("random"), *paper])
    return Table(
        ["Dictionary", "victim", "alive features", "trained on attacked families", "matched", "random leaves, %",
         "TextD − random", "CrossD − random", "ImgD − random"], rows,
        "The same defence on several dictionaries, % of the attack's gain",
        "Every dictionary at its own number of matched features, found by random ones; scored on pairs of families that are "
        "not attacked. The first is the one that is decided on, in several draws; the others have one draw, and their p "
        "values (over drawings and targets, two-sided) are exploratory. raw: the model's own dimensions, by |value|.",
        text_columns=(0, 1),
    )  # fmt: skip


def cell_with_p(r: Mapping[str, Any], p: float) -> Cell:
    found = cell(r, plus=True)
    return Cell(found.text, f"{found.interval}, p {format_p(p)}")


def calibration_table(results: Mapping[str, Any]) -> Table:
    """Returns the calibration: how many random features leave half of the attack's gain, and how weakly as many as the
    smallest group has leave the paper's share; on samples of no other table."""
    c = results["calibration"]
    victims, weak = list(c["rates"]), c["paper_point"]
    rows: list[list[str]] = [
        [label_of(what), "", *(percent(c["rates"][v][what]) for v in victims), ""]
        for what in ("benign", "unaligned")
    ]

    def line(what: str, lr: float, r: Mapping[str, Any], chosen: bool) -> list[str]:
        rates = [percent(r["rates"][v]) for v in victims]
        return [what + (" ←" if chosen else ""), f"{lr:.2g}", *rates, percent(r["left"], 0)]

    lr = results["settings"]["lr"]
    rows += [line(f"{k} random features", lr, r, int(k) == c["matched"]) for k, r in c["tried"].items()]
    if weak:
        rows += [
            line(f"{weak['features']} random features", r["lr"], r, r["lr"] == weak["lr"])
            for r in weak["tried"]
        ]
    return Table(
        ["", "learning rate", *(f"{v}, %" for v in victims), "left of the gain, %"], rows,
        "How many features are matched, and how weakly at the paper's point",
        f"{c['n']} samples of seed {c['seed']}, random features only; chosen: {c['matched']} ({c['rule']})"
        + (f", and {weak['features']} at {weak['lr']:.2g} (nearest to the 79 % of the paper)." if weak else "."),
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
    by_name = {r["defence"] + (", paper's point" if r["paper_point"] else ""): r for r in runs}
    measured = [
        [what, ", ".join(f"{name} {say(r)}" for name, r in by_name.items())] for what, say in columns.items()
    ]
    facts = [
        ["Command", o["command"]],
        ["Model", o["model"] + (f" ({o['pretrained']})" if o["pretrained"] else "")],
        [
            "Dictionary",
            f"{head['name']} {head['id']}: {head['features']} features, {head['alive']} alive; groups {head['groups']} by "
            f"{head['rule']}",
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
    made: list[Table] = []
    head = results["head"]
    for victim in results["victims"].values():
        made += [table8(victim, head), comparison_table(victim, head)]
        if victim["typographic"]:
            made.append(word_table(victim))
    made += [cost_table(name, results["cost"]) for name in results["cost"]["victims"]]
    made.append(dictionary_table(results))
    if results["calibration"]["tried"] or results["calibration"]["paper_point"]:
        made.append(calibration_table(results))
    return [*made, settings_table(results)]
