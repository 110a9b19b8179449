"""The paper's statements on the attack study, compared with the measured numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.analysis.statistics.primaries import power_text
from mmhooks.report import percent
from mmhooks.studies.adversarial.tables import ROWS, format_p
from mmhooks.studies.common.claims import Verdict, verdict_of_outcome


def claims(results: Mapping[str, Any]) -> list[tuple[Verdict, str, str]]:
    """Returns verdict, claim and measured sentence of each statement of the paper, for each victim."""
    found: list[tuple[Verdict, str, str]] = []
    for victim in results["victims"].values():
        name = victim["victim"]
        rates = {c: victim["rates"][c]["all triggers"] for c in ROWS}
        apart = rates["unaligned"]["low"] > rates["benign"]["high"]
        found.append((
            "same" if apart else "differs",
            f"{name}: the unaligned attack succeeds more often than benign images",
            f"{percent(rates['unaligned']['value'])} % against {percent(rates['benign']['value'])} %; intervals "
            f"{'apart' if apart else 'overlap'}.",
        ))  # fmt: skip
        compared = {(r["one"], r["other"]): r for r in victim["comparisons"]}
        found.extend(
            (
                verdict_of(compared[group, "random"]),
                f"{name}: aligning on {group} defends better than on random features",
                f"{percent(rates[group]['value'])} % against {percent(rates['random']['value'])} % "
                f"({difference_text(compared[group, 'random'])}).",
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
            + "; ".join(f"{a} − {b} {difference_text(compared[a, b])}" for a, b in pairs) + ".",
        ))  # fmt: skip
    return found


def verdict_of(compared: Mapping[str, Any]) -> Verdict:
    """Returns whether the first defends better; undecided unless p is below .05 after Holm over all comparisons."""
    return verdict_of_outcome(compared["outcome"])


def difference_text(compared: Mapping[str, Any]) -> str:
    text = (
        f"{percent(compared['difference']['value'], plus=True)} points, p {format_p(compared['holm'])} (Holm)"
    )
    if compared["outcome"] != "undecided":
        return text
    return f"{text}, {power_text(compared['detectable'] or math.nan, digits=1, scale=100.0)}"
