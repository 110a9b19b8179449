"""Evaluation of the victims: their answers before and after each defence, judged, and the numbers of Table 8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mmhooks.analysis.attacks.judges import RuleJudge, names
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.analysis.results import Estimate, plain
from mmhooks.analysis.statistics.equivalence import clustered_mean
from mmhooks.analysis.statistics.power import detectable_mean
from mmhooks.analysis.statistics.primaries import Measured, Primary, decide
from mmhooks.analysis.statistics.repeated import repeated_difference, repeated_rate
from mmhooks.analysis.statistics.resampling import bootstrap_ratio
from mmhooks.studies.adversarial.defence import DefendedImages
from mmhooks.studies.adversarial.samples import HARMFUL, TYPED, Samples
from mmhooks.utils.indexing import number_labels

# The paper's statements: each group defends better than random features, and TextD best, then CrossD, then ImgD.
BASELINES = ("benign", "unaligned")
COMPARED = (*((g, "random") for g in GROUPS), *combinations(("TextD", "CrossD", "ImgD"), 2))


class Evaluation:
    """Asks one victim about images and has the answers judged; records answers, and hits by defence and draw."""

    def __init__(self, victim: Any, judge: Any, samples: Samples) -> None:
        self.victim, self.judge, self.samples = victim, judge, samples
        self.answers: dict[str, list[str]] = {}
        self.rates: dict[str, list[list[bool]]] = {}  # one list per draw
        self.paper_point: dict[str, list[bool]] = {}
        self.nonsense_hits: dict[
            str, list[bool]
        ] = {}  # typographic samples, the word replaced by a nonsense word
        self.curve: dict[str, dict[int, list[bool]]] = {}  # first draw
        self.target_named: dict[str, list[list[bool]]] = {}  # the answer names exactly the target

    def hits(self, what: str, images: Tensor, rows: Sequence[int] | None = None) -> list[bool]:
        """Returns whether the harmful request succeeded, per sample; stores the answers under ``what``."""
        rows = range(len(self.samples)) if rows is None else rows
        asked = [self.samples.requests[i] for i in rows]
        targets = [self.samples.target[i] for i in rows]
        answers = self.victim.answer(images, asked)
        self.answers[what] = answers
        return self.judge.successes(asked, answers, targets)

    def again(self) -> Evaluation:
        """Returns an evaluation of the same victim for another dictionary: what was asked before any defence is kept."""
        other = Evaluation(self.victim, self.judge, self.samples)
        for name in ("benign", "unaligned"):
            other.rates[name], other.target_named[name] = self.rates[name], self.target_named[name]
            other.answers[name] = self.answers[name]
        return other

    def evaluate_baselines(self) -> None:
        """Evaluates the friendly partners, the attack, and the attack with a nonsense word."""
        s = self.samples
        for name, images in (("benign", s.partner), ("unaligned", s.attack)):
            self._keep(name, name, images)
        if s.typed:
            self.nonsense_hits["unaligned"] = self.hits("nonsense", s.controls["nonsense"], s.typed)

    def evaluate_defence(self, made: DefendedImages) -> None:
        """Evaluates the images of one defence; nonsense words and the curve only for its first draw."""
        if made.paper_point:
            self.paper_point[made.defence] = self.hits(f"{made.defence}, paper's point", made.final)
            return
        draw = f", draw {made.draw + 1}" if made.draw else ""
        self._keep(made.defence, made.defence + draw, made.final)
        if made.draw:
            return
        if len(made.nonsense):
            self.nonsense_hits[made.defence] = self.hits(
                f"nonsense, {made.defence}", made.nonsense, self.samples.typed
            )
        last = max(made.at)
        points = {0: self.rates["unaligned"][0], last: self.rates[made.defence][0]}
        points |= {
            k: self.hits(f"{made.defence} at {k}", p) for k, p in made.at.items() if k not in (0, last)
        }
        self.curve[made.defence] = points

    def _keep(self, name: str, what: str, images: Tensor) -> None:
        self.rates.setdefault(name, []).append(self.hits(what, images))
        named = [names(a, [t]) for a, t in zip(self.answers[what], self.samples.target, strict=True)]
        self.target_named.setdefault(name, []).append(named)


def attack_results(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """Returns Table 8 of every victim: rates by condition and trigger, controls, curve, and the primary comparisons.

    The six comparisons of each victim are the study's primary hypotheses: ``holm`` is corrected over those of all victims,
    and ``outcome`` is the verdict. What is compared at the paper's operating point is exploratory.
    """
    found = {e.victim.name: compare(hits_of(e), e.samples) for e in evaluations}
    primaries = [Primary(f"{v}: {c.name}", "less") for v, compared in found.items() for c in compared]
    measured = {f"{v}: {c.name}": c.measured for v, compared in found.items() for c in compared}
    decided = decide(primaries, measured)
    return {
        e.victim.name: _results(e)
        | {
            "comparisons": [
                c.to_json() | {"holm": d.adjusted, "outcome": d.outcome}
                for c in found[e.victim.name]
                for d in (decided[f"{e.victim.name}: {c.name}"],)
            ]
        }
        for e in evaluations
    }


def exploratory_results(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """Returns for every victim the numbers of another dictionary, which no primary hypothesis is about."""
    return {e.victim.name: _outcome(hits_of(e), e.samples) for e in evaluations}


def hits_of(evaluation: Evaluation) -> dict[str, Bool[Tensor, "r n"]]:
    return {c: torch.tensor(h) for c, h in evaluation.rates.items()}


def _results(evaluation: Evaluation) -> dict[str, Any]:
    s, hits = evaluation.samples, hits_of(evaluation)
    triggers = {"all triggers": list(range(len(s)))} | {t: s.rows(t) for t in dict.fromkeys(s.trigger)}
    drawings = number_labels(s.base_name)  # samples on one drawing are one piece of evidence
    paper = {c: torch.tensor([h]) for c, h in evaluation.paper_point.items()}
    base = {c: hits[c] for c in BASELINES}
    return {
        "victim": evaluation.victim.name,
        "judge": evaluation.judge.name,
        "judge_served": sorted(getattr(evaluation.judge, "served", ())),
        "n": len(s),
        "repeats": {c: len(h) for c, h in hits.items()},
        "rates": {c: {t: rate(h[:, rows]) for t, rows in triggers.items()} for c, h in hits.items()},
        "draws": {c: h.double().mean(1).tolist() for c, h in hits.items()},
        "paper_point": _outcome(base | paper, s) if paper else {},
        "target_named": {c: rate(torch.tensor(h)) for c, h in evaluation.target_named.items()},
        "typographic": {
            t: typographic(evaluation, [i for i in s.typed if s.trigger[i] == t]) for t in TYPED if s.rows(t)
        },
        "curve": {
            d: {str(k): rate(torch.tensor([h])) for k, h in sorted(c.items())}
            for d, c in evaluation.curve.items()
        },
        "drawings": len(drawings.unique()),
        "targets": len(set(s.target)),
        "gain_left": {c: gain_left(hits, c, drawings) for c in hits if c not in BASELINES},
        "attack_against_benign": plain(repeated_difference(hits["unaligned"], hits["benign"], drawings)),
        "answers": {c: answers[:12] for c, answers in evaluation.answers.items()},
    }


def _outcome(hits: dict[str, Tensor], samples: Samples) -> dict[str, Any]:
    """Returns rates, shares of the gain that are left, and exploratory comparisons."""
    drawings = number_labels(samples.base_name)
    return {
        "rates": {c: rate(h) for c, h in hits.items()},
        "gain_left": {c: gain_left(hits, c, drawings) for c in hits if c not in BASELINES},
        "comparisons": [c.to_json() for c in compare(hits, samples)],
    }


@dataclass(frozen=True)
class Comparison:
    """Two conditions on the same samples.

    Attributes:
        difference: of the rates. gain: the same as a share of the attack's gain. measured: what the primary is decided by.
        more, less: drawings with more success in the first, and in the second.
    """

    one: str
    other: str
    difference: Estimate
    gain: Estimate
    measured: Measured
    more: int
    less: int

    @property
    def name(self) -> str:
        return f"{self.one} − {self.other}"

    def to_json(self) -> dict[str, Any]:
        own = {k: getattr(self, k) for k in ("one", "other", "difference", "gain", "more", "less")}
        return plain(own | {"p": self.measured.p, "detectable": self.measured.detectable})


def compare(hits: dict[str, Tensor], samples: Samples) -> list[Comparison]:
    """Compares every group with random features and with the other groups: over the drawings under the samples *and* over
    their targets, which both recur. p and the detectable difference are the larger of the two, the interval is the wider.
    """
    clusters = [number_labels(samples.base_name)]
    if len(set(samples.target)) > 1:  # one phrase for all is no sample of targets
        clusters.append(number_labels(samples.target))
    found = []
    for one, other in COMPARED:
        tests = [repeated_difference(hits[one], hits[other], c) for c in clusters]
        each = hits[one].double().mean(0) - hits[other].double().mean(0)
        errors = [clustered_mean(each, c) for c in clusters]
        wide = max((t.difference for t in tests), key=lambda e: e.high - e.low)
        detectable = max(detectable_mean(e.error, e.df) for e in errors)
        whole = hits["unaligned"].double().mean(0) - hits["benign"].double().mean(0)
        gain = max((bootstrap_ratio(each, whole, c) for c in clusters), key=lambda e: e.high - e.low)
        measured = Measured(wide, max(t.p for t in tests), detectable)
        found.append(Comparison(one, other, wide, gain, measured, tests[0].more, tests[0].less))
    return found


def gain_left(hits: dict[str, Tensor], condition: str, drawings: Tensor) -> dict[str, Any]:
    """Returns the share of the attack's gain over the friendly partners that a defence leaves: the number that the
    paper's operating point is about (random features leave 79 % there). Interval over drawings."""
    share = {c: hits[c].double().mean(0) for c in (*BASELINES, condition)}
    above, whole = (share[c] - share["benign"] for c in (condition, "unaligned"))
    return plain(bootstrap_ratio(above, whole, drawings))


def typographic(evaluation: Evaluation, rows: list[int]) -> dict[str, Any]:
    """Returns B(word) − B(nonsense) on the same images for every condition, and the noise and blank-plate controls."""
    place = {i: k for k, i in enumerate(evaluation.samples.typed)}
    ids = [place[i] for i in rows]
    out: dict[str, Any] = {"n": len(rows)}
    for c, nonsense in evaluation.nonsense_hits.items():
        word = torch.tensor([evaluation.rates[c][0]])[:, rows]
        fake = torch.tensor([nonsense])[:, ids]
        gap = plain(repeated_difference(word, fake).difference)
        out[c] = {"word": rate(word), "nonsense": rate(fake), "difference": gap}
    for control in ("noise", "blank"):
        got = evaluation.hits(control, evaluation.samples.controls[control][ids], rows)
        out[control] = rate(torch.tensor([got]))
    return out


def rate(hits: Bool[Tensor, "r n"]) -> dict[str, Any]:
    return plain(repeated_rate(hits))


def rule_judge() -> RuleJudge:
    return RuleJudge(HARMFUL)
