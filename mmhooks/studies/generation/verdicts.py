"""The paper's claims on the generation study as primary hypotheses, and their verdicts against many random sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.statistics.measured import against_few_sets
from mmhooks.analysis.statistics.primaries import Decision, Primary, decide, verdict_text

MARGIN = (
    0.05  # of 1 - SSIM: "keeps the structure" allows this much more distortion than random features cause
)

# By claim: the hypothesis, the group and the measure that it is about.
CLAIMS: dict[str, tuple[Primary, str, str]] = {
    p.name: (p, group, measure)
    for p, group, measure in (
        (Primary("ImgD breaks the structure", "greater"), "ImgD", "distortion"),
        (Primary("CrossD breaks the structure", "greater"), "CrossD", "distortion"),
        (Primary("TextD moves the concept", "greater"), "TextD", "shift"),
        (Primary("TextD keeps the structure", "less", MARGIN), "TextD", "distortion"),
    )
}

Sets = Mapping[str, Float[Tensor, "sets n"]]


def verdicts(
    groups: Mapping[str, Mapping[str, Mapping[str, Float[Tensor, " n"]]]], random: Mapping[str, Sets]
) -> dict[str, dict[str, Decision]]:
    """Decides the paper's claims in every space, with Holm's correction over all of them together.

    Args:
        groups: by space, group and measure, the values of the prompts at the largest strength.
        random: by space and measure, those of every random set.

    Returns:
        Decisions by space and claim. Estimates are the group's mean over prompts minus that of the random sets, with an
        interval by the scatter of sets.
    """
    primaries, found = [], {}
    for space, by_group in groups.items():
        for name, (claim, group, measure) in CLAIMS.items():
            primary = Primary(f"{space}: {name}", claim.alternative, claim.margin)
            primaries.append(primary)
            value = float(by_group[group][measure].double().mean())
            found[primary.name] = against_few_sets(primary, value, random[space][measure].double().mean(1))
    decided = decide(primaries, found)
    return {space: {name: decided[f"{space}: {name}"] for name in CLAIMS} for space in groups}


def as_json(decisions: Mapping[str, Decision]) -> dict[str, Any]:
    """Returns the decisions of one space for ``results.json``, each with its sentence."""
    return {
        name: {**d.to_json(), "claim": name, "holds": d.outcome == "shown",
               "sentence": f"{name}: {verdict_text(d)}."}
        for name, d in decisions.items()
    }  # fmt: skip
