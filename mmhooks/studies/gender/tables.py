"""The tables of the gender study, from the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.report import Cell, Estimate, Table, fixed, percent
from mmhooks.studies.gender.masking import LABELS, MAIN, SIDES
from mmhooks.studies.gender.paper import OWN, TABLE6, TABLE7

WORD = {"image": "images", "text": "texts"}
GENDERS = {"woman": "women", "man": "men"}


def table6(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for side in SIDES:
        found = results["masking"][MAIN][side]["prompt"]
        own = found["groups"][OWN[side]]
        p0, a0 = found["base"]["probability"]["value"], found["base"]["accuracy"]["value"]
        columns = [("none", found["base"])] + [(g, found["groups"][g]) for g in ("ImgD", "TextD", "CrossD")]
        for measure, base in (("probability", p0), ("accuracy", a0)):
            row: list[str | Cell] = [f"{WORD[side]}, {measure}"]
            for name, cell in columns:
                paper = TABLE6[side].get(name) if measure == "probability" else None
                row.append(Cell.of(_e(cell[measure]), paper=paper))
            prefix = "" if measure == "probability" else "accuracy_"
            mean, low, high = (own["random"][prefix + k] for k in ("mean", "low", "high"))
            shifted = [float("nan") if v is None else base + v for v in (mean, low, high)]
            cell = Estimate(shifted[0], shifted[1], shifted[2])
            row.append(Cell.of(cell, paper=TABLE6[side]["random"] if measure == "probability" else None))
            row.append(f"{found['base'][measure]['n']:,}")
            rows.append(row)
    return Table(
        ["Judged", "none", "w.o. ImgD", "w.o. TextD", "w.o. CrossD", "w.o. random", "n"],
        rows,
        "Table 6. Probability of the original gender after masking a group",
        "Mean probability of the original gender, and accuracy, with 95 % bootstrap intervals over families of samples; the "
        "paper's value (“probability”, its first column named “Ori-Acc”) next to the probability. Random: as many alive "
        "features as the own modality's group has, mean and 95 % range of the draws. Prompt labels, decoded, never masked.",
    )


def table7(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for gender, word in GENDERS.items():
        row: list[str | Cell] = [word]
        for side, group in OWN.items():
            cell = results["masking"][MAIN][side]["prompt"]["groups"][group]["by_gender"][gender]
            row.append(Cell.of(_e(cell["relative"]), digits=1, paper=TABLE7[gender][side]))
            row.append(Cell.of(_e(cell["points"]), digits=1))
            row.append(_p(cell["p"]))
            row.append(f"{cell['n']:,}")
        rows.append(row)
    row = ["women − men"]
    for side, group in OWN.items():
        by = results["masking"][MAIN][side]["prompt"]["groups"][group]["by_gender"]
        paper = TABLE7["woman"][side] - TABLE7["man"][side]
        row += [Cell.of(_e(by["difference"]), digits=1, plus=True, paper=paper), "", "", ""]
    rows.append(row)
    heads = [
        f"{h}{side}"
        for side in (", ImgD from images", ", TextD from texts")
        for h in ("Δ %", "points", "p", "n")
    ]
    return Table(
        ["Gender", *heads],
        rows,
        "Table 7. Loss of each gender without the group of its own modality",
        "Δ = 100·(p₀ − p)/p₀ of the mean probability; points = 100·(p₀ − p); below zero the probability rose. p: sign flips of "
        "whole families. The paper gives one number without a unit.",
    )


def effect_table(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for side in SIDES:
        for g in GROUPS:
            c = results["masking"][MAIN][side]["prompt"]["groups"][g]
            random, cross = c["random"], c["cross"]
            rows.append(
                [
                    WORD[side], g, f"{c['size']:,}", f"{percent(c['share'])} %",
                    _points(c["change"]["difference"]), _p(c["change"]["p"]), _points(c["accuracy_change"]["difference"]),
                    _points({"value": random["mean"], "low": random["low"], "high": random["high"]}),
                    _p(random["p"]), _p(random.get("q")),
                    "–" if not cross else f"{cross['size']:,}",
                    "–" if not cross else _points({"value": cross["mean"], "low": cross["low"], "high": cross["high"]}),
                    "–" if not cross else _p(cross["p"]),
                ]
            )  # fmt: skip
    return Table(
        ["Judged", "Masked", "features", "activation removed", "probability, points", "paired p", "accuracy, points",
         "random masks, same size", "p", "q", "size, CrossD comparison", "group − CrossD, points", "p CrossD"],
        rows,
        "Every group compared with random features and CrossD",
        "Random: mean change and 95 % range of sets of as many alive features; p two-sided among them, q after "
        "Benjamini–Hochberg over all readings. CrossD: as many features of both as the smaller one has, sub-sampled where a "
        "group is larger; its p is over draws of features only, so it says little where all of CrossD is used. "
        "Masks of one size can remove very different shares of the activation: see that column first.",
        text_columns=(0, 1),
    )  # fmt: skip


def readings_table(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for name, found in results["masking"].items():
        for side in SIDES:
            for k in LABELS:
                base, groups = found[side][k]["base"], found[side][k]["groups"]
                row: list[str | Cell] = [
                    name,
                    WORD[side],
                    k,
                    _share(base["accuracy"]),
                    Cell.of(_e(base["probability"])),
                ]
                for g in GROUPS:
                    c = groups[g]
                    row += [
                        _points(c["change"]["difference"]),
                        _p(c["random"]["p"]),
                        "–" if not c["cross"] else _p(c["cross"]["p"]),
                    ]
                by = groups[OWN[side]]["by_gender"]
                row += [Cell.of(_e(by[w]["relative"]), digits=1) for w in GENDERS]
                rows.append(row)
    groups = [h for g in GROUPS for h in (f"{g}, points", "p random", "p CrossD")]
    return Table(
        ["Reading", "Judged", "Labels", "accuracy %", "probability", *groups, "women Δ %", "men Δ %"],
        rows,
        "Every reading",
        "Change of the mean probability in points, p among random sets of the same size and against CrossD; Δ of each gender "
        "without the group of the own modality. Centroids and probes are of the same modality, fitted on other samples. In the "
        "latent space the prompts' own features hardly reach ImgD, so masking it moves prompt labels only through the norm.",
        text_columns=(0, 1, 2),
    )  # fmt: skip


def feature_table(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for side in SIDES:
        for f in results["features"][side]:
            change = f["change"]
            rows.append(
                [
                    WORD[side], f"{f['feature']}", f["group"], fixed(f["score"], 2), percent(f["chosen_by"], 2, plus=True),
                    _points(change, 2), _p(f["p"]), _p(f["q"]), percent(f["change_of_woman"], 2, plus=True),
                    f"{f['active']:,} of {change['n']:,}",
                ]
            )  # fmt: skip
    return Table(
        [
            "Judged",
            "Feature",
            "Group",
            "MDS",
            "points, where chosen",
            "points, judged",
            "p",
            "q",
            "of “woman”",
            "active on",
        ],
        rows,
        "The ten features whose single ablation moves the probability most",
        "Chosen on the samples that labels are fitted on, measured on those that are judged: the change of the own gender's "
        "probability with that one feature at zero, and of “woman” over all. q: Benjamini–Hochberg over the ten.",
        text_columns=(0, 2),
    )


def audit_table(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for line in results["audit"]:
        row: list[str | Cell] = [
            line["kind"], line["stratum"], f"{line['women']:,} / {line['men']:,} / {line['unsaid']:,}", f"{line['seen']:,}"
        ]  # fmt: skip
        whole = line["kind"] == "all" or line["stratum"].startswith("all of") or line["kind"] != "profession"
        for side in SIDES:
            for when in ("before", "after"):
                row += [_share(line[side][when][g], whole) for g in ("women", "men")]
            row.append(_share(line[side]["before"]["p_woman"]["unsaid"], whole))
        rows.append(row)
    heads = [
        f"{word}: {h}"
        for word, mask in (("images", "ImgD"), ("texts", "TextD"))
        for h in (
            "women right %",
            "men right %",
            f"women, w.o. {mask}",
            f"men, w.o. {mask}",
            "“woman” of unstated gender %",
        )
    ]
    return Table(
        ["Kind", "Stratum", "women / men / unstated", "seen", *heads],
        rows,
        "Bias audit: woman or man by skin tone and by profession",
        "Share classified correctly by prompt, decoded, and after masking the own modality's group; mean probability of “woman” "
        "where no gender is stated. Intervals (95 %) are over families of samples. Seen: samples the model was trained on. "
        "Skin tone is that of a drawing's code points.",
        text_columns=(0, 1),
    )  # fmt: skip


def tone_table(results: Mapping[str, Any]) -> Table:
    found = results["tones"]
    rows: list[list[str | Cell]] = []
    for side in SIDES:
        for mask, c in found[side].items():
            rows.append(
                [WORD[side], mask, _share(c["balanced"]), _share(c["by_class"]["light"]["accuracy"]),
                 _share(c["by_class"]["dark"]["accuracy"]), Cell.of(_e(c["probability"])),
                 _points(c["change"]["difference"]), _p(c["change"]["p"])]
            )  # fmt: skip
    return Table(
        ["Judged", "Masked", "balanced %", "light %", "dark %", "probability", "points", "paired p"],
        rows,
        "Skin tone itself as the label",
        f"Light and medium-light against medium-dark and dark, by the prompts “light skin tone” and “dark skin "
        f"tone”; n = {found['n']:,}, "
        "samples the model was trained on included; chance 50 %.",
        text_columns=(0, 1),
    )  # fmt: skip


def separation_table(results: Mapping[str, Any]) -> Table:
    """Returns what masking changes of the classes' separation, and of where all samples are."""
    rows: list[list[str | Cell]] = []
    for name, arm in results["discrimination"]["arms"].items():
        base = arm["base"]
        start = [percent(base["own"]), fixed(base["auc"]), fixed(base["dprime"], 2), percent(base["drift"])]
        rows.append([f"{name}, n = {arm['n']:,} of {arm['families']} families", "none", *start, "", "", ""])
        for g, cell in arm["groups"].items():
            own, drift = (_points(cell["change"][m]["estimate"]) for m in ("own", "drift"))
            area, apart = (Cell.of(_e(cell["change"][m]["estimate"]), digits=d, plus=True)
                           for m, d in (("auc", 3), ("dprime", 2)))  # fmt: skip
            random, mass = cell["random"], cell["mass"]
            rows.append([
                "", f"w.o. {g}", own, area, apart, drift,
                "–" if not random else f"{fixed(random['auc']['mean'], plus=True)}, p {_p(random['auc']['p'])}",
                "–" if not random else fixed(random["auc"]["detectable"]),
                "none" if "none" in mass else f"{fixed(mass['auc']['mean'], plus=True)}, p {_p(mass['auc']['p'])}",
            ])  # fmt: skip
    return Table(
        ["Judged", "Masked", "own probability", "AUC", "d'", "“woman” %", "AUC, random sets of the size",
         "detectable (AUC)", "AUC, of size and mass"],
        rows,
        "Separation and drift",
        "First line of each kind: values, then changes in points, with jackknife intervals over families. AUC and d' are of "
        "the log-odds and do not see a drift of all samples; the mean probability of “woman”, both classes weighted equally, "
        "sees nothing else. Random: alive features outside the group; p two-sided; detectable: the smallest difference from "
        "random sets seen at 80 % power. “None”: no set outside the group has its activation mass. Implicit texts name "
        "roles, clothes and looks, no gender; each keyword is a family.",
        text_columns=(0, 1),
    )  # fmt: skip


def live_note(results: Mapping[str, Any]) -> str:
    worst = max(v["by_hand"] for v in results["live"].values())
    clean = all(v["bit_equal_after"] for v in results["live"].values())
    return (
        f"largest difference of a probability from masking by hand {worst:.1e}; outputs after the contexts are "
        f"{'bit-equal' if clean else 'NOT equal'} to those before"
    )


def _e(d: Mapping[str, Any]) -> Estimate:
    return Estimate.from_json(dict(d))


def _share(d: Mapping[str, Any] | None, interval: bool = True) -> Cell | str:
    if d is None or d["value"] is None:
        return "–"
    known = interval and d["low"] is not None
    return Cell(percent(d["value"], 1), f"[{percent(d['low'])}, {percent(d['high'])}]" if known else "")


def _points(d: Mapping[str, Any], digits: int = 1) -> Cell | str:
    if d["value"] is None:
        return "–"
    known = d["low"] is not None
    between = f"[{percent(d['low'], digits)}, {percent(d['high'], digits)}]" if known else ""
    return Cell(percent(d["value"], digits, plus=True), between)


def _p(p: float | None) -> str:
    if p is None:
        return "–"
    return fixed(p, 4 if p < 0.001 else 3)
