"""The paper's numbers and statements of Section 3.1, compared with the measured ones; and how its two tables conflict.

Yan, Cui, Yin, Liang, He, Wang, "The Multi-Faceted Monosemanticity in Multimodal Representations", version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhooks.report import Estimate, fixed, interval, signed
from mmhooks.studies.common.claims import Claim, agreement, verdict_of_outcome

# Table 6: probability of the original gender: none, without ImgD, TextD, random
TABLE6 = {
    "image": {"none": 0.834, "ImgD": 0.785, "TextD": 0.828, "random": 0.815},
    "text": {"none": 0.709, "ImgD": 0.709, "TextD": 0.639, "random": 0.699},
}
# Table 7: Δ of removing ImgD from images, TextD from texts
TABLE7 = {"woman": {"image": 17.65, "text": 7.27}, "man": {"image": 5.64, "text": 28.67}}
OWN = {"image": "ImgD", "text": "TextD"}


def table_conflicts() -> list[str]:
    """Explains why Table 7 cannot be in points, and what share of women Table 6 would need if it were relative.

    The overall change lies between the changes of women and of men, whatever their numbers.
    """
    out = []
    for side, group in OWN.items():
        before, after = TABLE6[side]["none"], TABLE6[side][group]
        points, relative = 100 * (before - after), 100 * (before - after) / before
        low, high = sorted(TABLE7[g][side] for g in TABLE7)
        word = {"image": "images", "text": "texts"}[side]
        sentence = (
            f"For {word}, Table 6 falls by {points:.1f} points ({relative:.1f} % of {before}), while Table 7 gives "
            f"{TABLE7['woman'][side]} for women and {TABLE7['man'][side]} for men."
        )
        inside = low <= points <= high
        sentence += " As points both could hold." if inside else (
            f" As points this is impossible: {points:.1f} lies outside {low}–{high}, and the overall change must lie between "
            "those of its parts."
        )  # fmt: skip
        if low <= relative <= high:
            women = (relative - TABLE7["man"][side]) / (TABLE7["woman"][side] - TABLE7["man"][side])
            sentence += (
                f" As relative changes it would need women to carry {100 * women:.0f} % of the summed probability; "
                "the paper gives no counts."
            )
        out.append(sentence)
    return out


def claims(results: Mapping[str, Any], setting: str) -> list[Claim]:
    """Compares the statements of Section 3.1 with the measurements by prompt labels in one setting.

    First the primary hypotheses, after Holm's correction; the others are exploratory, and say so.
    """
    primary = [
        Claim(verdict_of_outcome(d["outcome"]), f"{name}.", f"{d['sentence']}.")
        for name, d in results["discrimination"]["primaries"].items()
    ]
    return primary + [
        Claim(c.verdict, f"(exploratory) {c.claim}", c.measured) for c in _exploratory(results, setting)
    ]


def _exploratory(results: Mapping[str, Any], setting: str) -> list[Claim]:
    found = results["masking"][setting]
    sides = {side: found[side]["prompt"] for side in OWN}
    out = []
    for side, group in OWN.items():
        word, other = {"image": ("images", "TextD"), "text": ("texts", "ImgD")}[side]
        measured = sides[side]
        contrast = _estimate(measured["contrast"]["difference"])
        if side == "text":
            contrast = Estimate(-contrast.value, -contrast.high, -contrast.low, contrast.n)
        out.append(
            Claim(
                agreement(contrast, -1.0) if measured["contrast"]["p"] < 0.05 else "open",
                f"Removing {group} lowers the probability of the own gender of {word} more than removing {other} "
                f"(Table 6: {TABLE6[side][group]} against {TABLE6[side][other]}).",
                f"{fixed(measured['groups'][group]['probability']['value'])} against "
                f"{fixed(measured['groups'][other]['probability']['value'])}, paired difference {signed(contrast.value)} "
                f"{interval(contrast)}, p = {measured['contrast']['p']:.3g}.",
            )
        )
        cell = measured["groups"][group]
        change, random = cell["change"]["difference"]["value"], cell["random"]
        beyond = random["p"] is not None and random["p"] < 0.05
        less = random["mean"] is not None and change < random["mean"]
        verdict = "open" if not beyond else ("same" if less else "differs")
        out.append(
            Claim(
                verdict,
                f"It lowers it more than removing as many random features (Table 6: {TABLE6[side]['random']}).",
                f"{signed(change)} against {signed(random['mean'])} [{signed(random['low'])}, {signed(random['high'])}] of "
                f"{len(random['draws'])} random sets of {cell['size']}, p = {_p(random['p'])}, "
                f"q = {_p(random.get('q'))}.",
            )
        )
    for side, group, leader, sign in (
        ("image", "ImgD", "Women's images", 1.0),
        ("text", "TextD", "Men's texts", -1.0),
    ):
        by = sides[side]["groups"][group]["by_gender"]
        difference = _estimate(by["difference"])
        out.append(
            Claim(
                agreement(difference, sign),
                f"{leader} lose more from removing {group} than the other gender's (Table 7: women "
                f"{TABLE7['woman'][side]}, men {TABLE7['man'][side]}).",
                f"women {_percent(by['woman'])}, men {_percent(by['man'])}; difference {fixed(difference.value, 1)} "
                f"{interval(difference, 1)}.",
            )
        )
    r = _estimate(results["figure5"]["woman"]["correlation"])
    out.append(
        Claim(
            agreement(r, 1.0),
            "Women's images with a larger share of ImgD among their most active features are more feminine (Figure 5).",
            f"rank correlation of that share with the probability of “woman” is {signed(r.value)} {interval(r)} "
            f"over {r.n:,} images.",
        )
    )
    return out


def _estimate(d: Mapping[str, Any]) -> Estimate:
    return Estimate.from_json(dict(d))


def _percent(d: Mapping[str, Any]) -> str:
    e = _estimate(d["relative"])
    return f"{fixed(e.value, 1)} % {interval(e, 1)}".rstrip()


def _p(p: float | None) -> str:
    return "–" if p is None else f"{p:.3g}"
