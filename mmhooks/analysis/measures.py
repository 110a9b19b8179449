"""What one pass over a store gives: every measure with its interval, as one frozen result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmhooks.analysis.bridge import BridgeResult
from mmhooks.analysis.geometry import Density, ModalityGap
from mmhooks.analysis.inference import FeatureTests, PermutationTest
from mmhooks.analysis.mds import GROUPS, MDSResult
from mmhooks.analysis.monosemanticity import GroupContrast, MonosemanticityResult
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.similarity import EmbedSimResult, WinRateResult
from mmhooks.analysis.top import TopActivating


@dataclass(frozen=True)
class Measures(Result):
    """All measures of one head over one store; see :func:`mmhooks.analysis.measure.measure`.

    Attributes:
        mds, mds_over_samples: scores with groups; their mean over alive features with a jackknife over samples.
        dominance: per-feature test that R is not one half, after Benjamini-Hochberg.
        density, embed_sim, win_rate, monosemanticity, top: by side.
        contrasts, permutations: visual (ImgD − TextD on pictures) and textual (TextD − ImgD on texts)
            EmbedSim, with random groups and with a permutation test.
        gap, cknna, bridge: of the two sides' embeddings; CKNNA by what is compared.
        skipped: measures that could not be taken, and why.
        judges: whose embeddings say how alike samples are, by side.
        sites: what was read, by side.
        seconds: spent on reading, on each measure and in all, by this process.
    """

    n_pairs: int
    head: str
    data: str
    sites: dict[str, str]
    judges: dict[str, str]
    settings: dict[str, Any]
    mds: MDSResult
    mds_over_samples: Estimate
    dominance: FeatureTests
    density: dict[str, Density]
    top: dict[str, TopActivating] = field(repr=False)
    gap: ModalityGap | None = None
    embed_sim: dict[str, EmbedSimResult] = field(default_factory=dict)
    win_rate: dict[str, WinRateResult] = field(default_factory=dict)
    monosemanticity: dict[str, MonosemanticityResult] = field(default_factory=dict)
    contrasts: dict[str, GroupContrast] = field(default_factory=dict)
    permutations: dict[str, PermutationTest] = field(default_factory=dict)
    bridge: BridgeResult | None = None
    cknna: dict[str, Estimate] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def table(self) -> Records:
        """One row a number: value, interval, what n counts."""
        rows = [_row("MDS μ", "both", self.mds.mu_estimate, "features")]
        rows.append(_row("MDS μ", "both", self.mds_over_samples, "pairs"))
        for side, found in self.density.items():
            rows.append(_row("L0", side, found.l0, "samples"))
        for name, results in (
            ("EmbedSim", self.embed_sim),
            ("WinRate", self.win_rate),
            ("MonoSemanticity", self.monosemanticity),
        ):
            rows += [_row(name, side, result.estimate, "features") for side, result in results.items()]
        if self.gap is not None:
            rows.append(_row("modality gap", "both", self.gap.gap, "pairs"))
            rows.append(_row("cosine of pairs", "both", self.gap.pair_cosine, "pairs"))
        rows += [_row("CKNNA", what, estimate, "batches") for what, estimate in self.cknna.items()]
        return Records(rows)

    def tables(self) -> dict[str, Records]:
        """All tables by title, in reading order."""
        features = Records(
            {
                "side": side,
                "dead": found.dead,
                "median density of alive": float(found.values[found.values > 0].median())
                if bool((found.values > 0).any())
                else float("nan"),
                "L0": found.l0.value,
                "samples": found.n_samples,
            }
            for side, found in self.density.items()
        )
        tables = {
            "Measures": self.table(),
            "Modality dominance": self.mds.table(),
            "R differs from one half": self.dominance.table(),
            "Features": features,
            "EmbedSim of groups": Records(
                {"kind": kind, **row} for kind, c in self.contrasts.items() for row in c.table()
            ),
            "Permutation tests": Records(
                {"kind": kind, **row} for kind, t in self.permutations.items() for row in t.table()
            ),
            "Strongest bridges": Records() if self.bridge is None else self.bridge.table(),
            "Skipped": Records({"measure": name, "why": why} for name, why in self.skipped.items()),
            "Seconds": Records({"stage": name, "seconds": value} for name, value in self.seconds.items()),
        }
        return {title: table for title, table in tables.items() if table}

    def group_names(self) -> list[str]:
        """For every feature its group, or "dead"."""
        names = ["dead"] * len(self.mds.R)
        for name, group in zip(GROUPS, self.mds.groups, strict=True):
            for k in group:
                names[k] = name
        return names


def _row(measure: str, side: str, e: Estimate, over: str) -> dict[str, Any]:
    return {"measure": measure, "side": side, "value": e.value, "low": e.low, "high": e.high, "n": e.n, "over": over}  # fmt: skip
