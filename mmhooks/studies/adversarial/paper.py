"""What the paper says of the attack study, held against what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.report import percent
from mmhooks.studies.adversarial.tables import ROWS, p_value
from mmhooks.studies.common.write import Verdict


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
