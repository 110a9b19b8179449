"""The paper's claims on the generation study as primary hypotheses, and their verdicts against many random sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.statistics.measured import against_few_sets, over_clusters
from mmhooks.analysis.statistics.primaries import (
    Decision,
    Measured,
    Primary,
    decide,
    power_text,
    verdict_text,
)

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
        Decisions by space and claim, which hold over random sets *and* over prompts (:func:`beyond_sets`).
    """
    primaries, found = [], {}
    for space, by_group in groups.items():
        for name, (claim, group, measure) in CLAIMS.items():
            primary = Primary(f"{space}: {name}", claim.alternative, claim.margin)
            primaries.append(primary)
            found[primary.name] = beyond_sets(primary, by_group[group][measure], random[space][measure])
    decided = decide(primaries, found)
    return {space: {name: decided[f"{space}: {name}"] for name in CLAIMS} for space in groups}


def beyond_sets(primary: Primary, own: Float[Tensor, " n"], sets: Float[Tensor, "sets n"]) -> Measured:
    """Tests a group's values minus the mean of random sets: over sets, by their scatter, and over prompts, paired.

    The scatter of sets says that these prompts tell the group from other features, not that other prompts would; the
    scatter of prompts says the reverse. So p and the detectable effect are the larger of the two, and the interval is
    the wider one.
    """
    own, sets = own.double(), sets.double()
    both = (
        against_few_sets(primary, float(own.mean()), sets.mean(1)),
        over_clusters(primary, own - sets.mean(0)),
    )
    wide = max(both, key=lambda m: m.estimate.high - m.estimate.low)
    return Measured(wide.estimate, max(m.p for m in both), max(m.detectable for m in both))


def power_line(decisions: Mapping[str, Decision]) -> str:
    """Says what each claim of a space could have shown at 80 % power.

    >>> power_line({})
    'What could be seen, before Holm: .'
    """
    parts = [
        f"{name}: {power_text(d.detectable, margin=d.margin is not None)}" for name, d in decisions.items()
    ]
    return f"What could be seen, before Holm: {'; '.join(parts)}."


def as_json(decisions: Mapping[str, Decision]) -> dict[str, Any]:
    """Returns the decisions of one space for ``results.json``, each with its sentence."""
    return {
        name: {**d.to_json(), "claim": name, "holds": d.outcome == "shown",
               "sentence": f"{name}: {verdict_text(d)}."}
        for name, d in decisions.items()
    }  # fmt: skip
