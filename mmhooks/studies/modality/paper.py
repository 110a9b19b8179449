"""The paper's numbers and statements of Section 2, and whether the measured numbers agree in direction.

Yan, Cui, Yin, Liang, He, Wang, "The Multi-Faceted Monosemanticity in Multimodal Representations", version 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmhooks.analysis.statistics.primaries import LEVEL, holm
from mmhooks.report import Estimate, fixed, interval, signed
from mmhooks.studies.common.claims import (
    Claim,
    Verdict,
    agreement,
    difference,
    difference_note,
    joined_by_and,
    magnitude,
)

MODELS = ("CLIP", "DeCLIP", "CLIP+NCL", "CLIP+SAE")
MODALITIES = ("image", "text")

# Table 1: EmbedSim and WinRate, (image, text)
SIMILARITY = {
    "CLIP": (0.113, 0.451),
    "DeCLIP": (0.058, -0.073),
    "CLIP+NCL": (0.161, 0.592),
    "CLIP+SAE": (0.120, 0.244),
}
WIN_RATE = {
    "CLIP": (0.652, 0.594),
    "DeCLIP": (0.615, 0.457),
    "CLIP+NCL": (0.727, 0.608),
    "CLIP+SAE": (0.667, 0.540),
}
WIN_GAP = {"CLIP": 0.058, "DeCLIP": 0.158, "CLIP+NCL": 0.119, "CLIP+SAE": 0.127}
# Table 2: (visual, textual)
MONOSEMANTICITY = {
    "CLIP": (-0.118, -0.07),
    "DeCLIP": (0.070, -0.059),
    "CLIP+NCL": (0.197, 0.132),
    "CLIP+SAE": (0.135, 0.439),
}


def table1_differs(found: Mapping[str, Estimate], column: Mapping[str, float], model: str) -> bool:
    """Returns whether ``model`` lies on the other side of CLIP (CLIP itself: of zero) than in the paper."""
    if model not in found or not found[model].known:
        return False
    if model == "CLIP":
        return agreement(found[model], column[model]) == "differs"
    if "CLIP" not in found:
        return False
    return agreement(difference(found[model], found["CLIP"]), column[model] - column["CLIP"]) == "differs"


@dataclass(frozen=True)
class Statement:
    """One statement of the paper before correction: what its verdict would be alone, and the p-value of that verdict."""

    verdict: Verdict
    claim: str
    measured: str
    p: float


def claims(models: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """Returns the paper's statements on Tables 1 and 2 and Figure 1 that the measured models can test.

    They are tested together: a verdict stands if its p-value, by Holm's correction over all of them, is below .05.
    """
    found = statements(models)
    adjusted = holm(torch.tensor([s.p for s in found], dtype=torch.float64)).tolist() if found else []
    return [
        Claim(s.verdict if q < LEVEL else "open", s.claim, f"{s.measured} {_p(q)}")
        for s, q in zip(found, adjusted, strict=True)
    ]


def _p(q: float) -> str:
    if math.isnan(q):
        return "Not tested: no interval."
    return f"p {'< .001' if q < 0.001 else f'= {fixed(q)}'} (Holm)."


def p_value(e: Estimate) -> float:
    """Returns the two-sided p of an estimate against 0, from its 95 % interval on the side of 0 (normal)."""
    from scipy.stats import norm

    half = e.value - e.low if e.value > 0 else e.high - e.value
    if not e.has_interval:
        return math.nan
    return float(2 * norm.sf(1.959964 * abs(e.value) / half)) if half > 0 else float(e.value == 0)


def statements(models: Mapping[str, Mapping[str, Any]]) -> list[Statement]:
    """Returns the statements that the measured models can test, each with its own verdict and p-value."""

    def column(*path: str) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        for model in MODELS:
            value: Any = models.get(model)
            for key in path:
                value = value.get(key) if value is not None else None
            if value is not None:
                found[model] = Estimate.from_json(value)
        return found

    out: list[Statement] = []
    for measure, word in (("embed_sim", "EmbedSim"), ("win_rate", "WinRate")):
        for modality in MODALITIES:
            out += _highest(
                f"CLIP+NCL has the highest {word} for {modality}s (Table 1).",
                column(measure, modality), "CLIP+NCL",
            )  # fmt: skip
    gaps = {m: magnitude(e) for m, e in column("win_rate", "gap").items()}
    for model in MODELS[1:]:
        if model in gaps and "CLIP" in gaps:
            change = difference(gaps[model], gaps["CLIP"])
            verdict = agreement(change, 1.0)
            text = f"|Δ| is {fixed(gaps[model].value)} against {fixed(gaps['CLIP'].value)} of CLIP {difference_note(change)}."
            claim = f"{model}'s WinRates lean to one modality more than CLIP's (|Δ|)."
            out.append(Statement(verdict, claim, text, p_value(change)))
    for i, modality in enumerate(MODALITIES):
        word = ("Visual", "Textual")[i]
        out += _signs(word, column("monosemanticity", modality), {m: MONOSEMANTICITY[m][i] for m in MODELS})
        winner = max(MODELS, key=lambda m: MONOSEMANTICITY[m][i])
        out += _highest(
            f"{winner} has the highest {word.lower()} monosemanticity (Table 2).",
            column("monosemanticity", modality), winner,
        )  # fmt: skip
    out += _figure_one(column("mds", "mu"), column("mds", "sigma"))
    return out


def _highest(claim: str, found: dict[str, Estimate], winner: str) -> list[Statement]:
    found = {m: e for m, e in found.items() if e.known}
    if winner not in found or len(found) < 2:
        return []
    rival = max((m for m in found if m != winner), key=lambda m: found[m].value)
    change = difference(found[winner], found[rival])
    best, second = fixed(found[winner].value), fixed(found[rival].value)
    text = f"{winner} {best}, the best of the others is {rival} with {second} {difference_note(change)}."
    # The rival was chosen for its value among several; Bonferroni over them makes up for the choice.
    p = min(1.0, p_value(change) * (len(found) - 1))
    return [Statement(agreement(change, 1.0), claim, text, p)]


def _signs(word: str, found: dict[str, Estimate], paper: dict[str, float]) -> list[Statement]:
    found = {m: e for m, e in found.items() if e.known}
    if not found:
        return []
    verdicts = {m: agreement(e, paper[m]) for m, e in found.items()}
    wanted = ", ".join(f"{m} {'positive' if paper[m] > 0 else 'negative'}" for m in found)
    against = [m for m, v in verdicts.items() if v == "differs"]
    unclear = [m for m, v in verdicts.items() if v == "open"]
    values = ", ".join(f"{m} {signed(e.value)}" for m, e in found.items())
    parts = [f"{values}."]
    if against:
        parts.append(f"The sign is the opposite for {joined_by_and(against)}.")
    if unclear:
        parts.append(f"The interval contains zero for {joined_by_and(unclear)}.")
    verdict: Verdict = "differs" if against else ("open" if unclear else "same")
    each = {m: p_value(e) for m, e in found.items()}
    # All signs must hold for "same", so the largest p; one opposite sign is enough for "differs", so Bonferroni.
    opposite = min((each[m] for m in against), default=math.nan) * len(found)
    p = min(1.0, opposite) if against else max(each.values())
    return [Statement(verdict, f"{word} monosemanticity: {wanted} (Table 2).", " ".join(parts), p)]


def _figure_one(mu: dict[str, Estimate], sigma: dict[str, Estimate]) -> list[Statement]:
    out: list[Statement] = []
    if "CLIP" in mu:
        lean = difference(mu["CLIP"], Estimate(0.5, 0.5, 0.5))
        text = f"its mean score is {fixed(mu['CLIP'].value)} {interval(mu['CLIP'])}."
        claim = "CLIP's scores lean to the text side, mean below .5 (Figure 1)."
        out.append(Statement(agreement(lean, -1.0), claim, text, p_value(lean)))
    if "CLIP" in sigma and "DeCLIP" in sigma:
        wider = difference(sigma["DeCLIP"], sigma["CLIP"])
        text = f"σ is {fixed(sigma['DeCLIP'].value)} against {fixed(sigma['CLIP'].value)} {difference_note(wider)}."
        claim = "DeCLIP's scores spread more widely than CLIP's (Figure 1)."
        out.append(Statement(agreement(wider, 1.0), claim, text, p_value(wider)))
    for model in ("CLIP+NCL", "CLIP+SAE"):
        if model in mu and "CLIP" in mu:
            half = Estimate(0.5, 0.5, 0.5)
            change = difference(
                magnitude(difference(mu[model], half)), magnitude(difference(mu["CLIP"], half))
            )
            text = f"the mean lies {abs(mu[model].value - 0.5):.3f} from one half, CLIP's {abs(mu['CLIP'].value - 0.5):.3f}."
            claim = f"{model} is less skewed to one side than CLIP (Figure 1)."
            out.append(Statement(agreement(change, -1.0), claim, text, p_value(change)))
    return out
