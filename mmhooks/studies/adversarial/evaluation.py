"""Evaluation of the victims: their answers before and after each defence, judged, and the numbers of Table 8."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.attacks.judges import RuleJudge, names
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.analysis.results import plain
from mmhooks.analysis.statistics.equivalence import clustered_mean
from mmhooks.analysis.statistics.power import detectable_mean
from mmhooks.analysis.statistics.primaries import Measured, Primary, decide
from mmhooks.analysis.statistics.repeated import repeated_difference, repeated_rate
from mmhooks.analysis.statistics.resampling import bootstrap_ratio
from mmhooks.studies.adversarial.defence import DefendedImages
from mmhooks.studies.adversarial.options import Options
from mmhooks.studies.adversarial.samples import HARMFUL, TYPED, Samples
from mmhooks.studies.common.encode import encode, unit
from mmhooks.studies.common.heads import load_or_train_head
from mmhooks.utils.digest import digest
from mmhooks.utils.indexing import number_labels

# The paper's statements: each group defends better than random features, and TextD best, then CrossD, then ImgD.
PRIMARIES = {
    Primary(f"{a} − {b}", "less"): (a, b)
    for a, b in ((*((g, "random") for g in GROUPS), *combinations(("TextD", "CrossD", "ImgD"), 2)))
}


def scored_head(model: Any, pairs: Any, options: Options, *, cache: Path) -> tuple[Any, Any]:
    """Returns the head (mini's wide one, a given one, or one trained here and cached) and its MDS on the pairs."""
    encoded = encode(model, options.model, pairs, cache, batch=128, progress=not options.quiet)
    source = options.head or ("mini/sae-wide" if options.model == "mini" else None)
    if source is None:
        image, text = (unit(encoded.vectors(side)) for side in ("image", "text"))
        n, epochs, seed = options.features, options.epochs, options.seed
        torch.manual_seed(seed)
        untrained = mm.TopKSAE(image.shape[1], n, min(32, n // 4))
        folder = cache / f"attack-sae-{digest(epochs, n, seed, image, text)[:20]}"
        head = load_or_train_head(folder, untrained, image, text, epochs=epochs, seed=seed)
    else:
        head = mm.load_head(source)
    return head, mm.mds(encoded.store, head=head)


class Evaluation:
    """Asks one victim about images and has the answers judged; records answers, and hits by defence and draw."""

    def __init__(self, victim: Any, judge: Any, samples: Samples) -> None:
        self.victim, self.judge, self.samples = victim, judge, samples
        self.answers: dict[str, list[str]] = {}
        self.rates: dict[str, list[list[bool]]] = {}  # one list per draw
        self.strong: dict[str, list[bool]] = {}
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

    def evaluate_baselines(self) -> None:
        """Evaluates the friendly partners, the attack, and the attack with a nonsense word."""
        s = self.samples
        for name, images in (("benign", s.partner), ("unaligned", s.attack)):
            self._keep(name, name, images)
        if s.typed:
            self.nonsense_hits["unaligned"] = self.hits("nonsense", s.controls["nonsense"], s.typed)

    def evaluate_defence(self, made: DefendedImages) -> None:
        """Evaluates the images of one defence; nonsense words and the curve only for its first draw."""
        if made.strong:
            self.strong[made.defence] = self.hits(f"{made.defence}, strong", made.final)
            return
        draw = f", draw {made.draw + 1}" if made.draw else ""
        self._keep(made.defence, made.defence + draw, made.final)
        if made.draw:
            return
        if self.samples.typed:
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


def attack_results(evaluation: Evaluation) -> dict[str, Any]:
    """Returns Table 8 of one victim: rates by condition and trigger, controls, curve, paired comparisons."""
    s = evaluation.samples
    hits = {c: torch.tensor(h) for c, h in evaluation.rates.items()}
    triggers = {"all triggers": list(range(len(s)))} | {t: s.rows(t) for t in dict.fromkeys(s.trigger)}
    strong = {c: torch.tensor([h]) for c, h in evaluation.strong.items()}
    drawings = number_labels(s.base_name)  # samples on one drawing are one piece of evidence
    return {
        "victim": evaluation.victim.name,
        "judge": evaluation.judge.name,
        "judge_served": sorted(getattr(evaluation.judge, "served", ())),
        "n": len(s),
        "repeats": {c: len(h) for c, h in hits.items()},
        "rates": {c: {t: rate(h[:, rows]) for t, rows in triggers.items()} for c, h in hits.items()},
        "draws": {c: h.double().mean(1).tolist() for c, h in hits.items()},
        "strong": {c: rate(h) for c, h in strong.items()},
        "target_named": {c: rate(torch.tensor(h)) for c, h in evaluation.target_named.items()},
        "typographic": {
            t: typographic(evaluation, [i for i in s.typed if s.trigger[i] == t]) for t in TYPED if s.rows(t)
        },
        "curve": {
            d: {str(k): rate(torch.tensor([h])) for k, h in sorted(c.items())}
            for d, c in evaluation.curve.items()
        },
        "drawings": len(drawings.unique()),
        "gain_left": {c: gain_left(hits, c, drawings) for c in hits if c not in ("benign", "unaligned")},
        "comparisons": comparisons(hits, drawings),
        "comparisons_strong": comparisons(strong, drawings) if strong else [],
        "attack_against_benign": plain(repeated_difference(hits["unaligned"], hits["benign"], drawings)),
        "answers": {c: answers[:12] for c, answers in evaluation.answers.items()},
    }


def comparisons(hits: dict[str, Tensor], drawings: Tensor) -> list[dict[str, Any]]:
    """Compares every group with random features and with the other groups, over the drawings under the samples.

    The six are the study's primary hypotheses: ``holm`` is corrected over them, and ``detectable`` is the smallest
    difference seen at 80 % power.
    """
    found = {p: repeated_difference(hits[a], hits[b], drawings) for p, (a, b) in PRIMARIES.items()}
    errors = {p: clustered_mean(hits[a].double().mean(0) - hits[b].double().mean(0), drawings)
              for p, (a, b) in PRIMARIES.items()}  # fmt: skip
    decided = decide(
        list(PRIMARIES),
        {
            p.name: Measured(f.difference, f.p, detectable_mean(errors[p].error, errors[p].df))
            for p, f in found.items()
        },
    )
    return [
        {"one": a, "other": b, **plain(found[p]), "holm": decided[p.name].adjusted,
         **{k: plain(getattr(decided[p.name], k)) for k in ("detectable", "outcome")}}
        for p, (a, b) in PRIMARIES.items()
    ]  # fmt: skip


def gain_left(hits: dict[str, Tensor], condition: str, drawings: Tensor) -> dict[str, Any]:
    """Returns the share of the attack's gain over the friendly partners that a defence leaves: the number that the
    paper's operating point is about (random features leave 79 % there). Interval over drawings."""
    share = {c: hits[c].double().mean(0) for c in ("benign", "unaligned", condition)}
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
