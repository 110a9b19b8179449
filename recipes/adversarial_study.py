"""The study: groups of a head, defence on each, what every victim answers, and what that makes of Table 8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from adversarial_samples import HARMFUL, TYPED, Samples
from jaxtyping import Bool, Float
from modality_study import encode, unit
from scipy.stats import binomtest
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.align import align, samples_of
from mmhooks.analysis.groups import groups_of
from mmhooks.analysis.intervals import bootstrap, wilson
from mmhooks.analysis.judges import RuleJudge, names
from mmhooks.analysis.pixels import psnr
from mmhooks.analysis.results import plain

GROUPS = ("ImgD", "TextD", "CrossD")
DEFENCES = (*GROUPS, "random", "all")
DESCRIBE = "What is in the picture?"


def head_of(model: Any, name: str, pairs: Any, source: str | None, *, cache: Path, epochs: int, features: int,
            seed: int, progress: Any) -> tuple[Any, Any]:  # fmt: skip
    """The head (mini's own, a given one, or one trained here and kept) and its MDS on the pairs."""
    encoded = encode(model, name, pairs, cache, batch=128, progress=progress)
    if source is None and name == "mini":
        source = "mini/sae"
    if source is None:
        image, text = unit(encoded.image), unit(encoded.text)
        told = f"{epochs} {features} {seed}".encode() + image.numpy().tobytes() + text.numpy().tobytes()
        folder = cache / f"attack-sae-{blake2b(told, digest_size=10).hexdigest()}"
        if not (folder / "config.json").exists():
            torch.manual_seed(seed)
            head = mm.TopKSAE(image.shape[1], features, min(32, features // 4))
            mm.train_head(head, image, text, epochs=epochs, seed=seed)
            head.save(folder)
        source = str(folder)
    head = mm.load_head(source)
    with torch.no_grad():
        latents = [head.encode(head.prepare(x)) for x in (encoded.image, encoded.text)]
    return head, mm.mds(*latents, head=head.id, data=pairs.fingerprint)


@dataclass(frozen=True)
class Defended:
    """Pictures after each defence: ``final[defence]``, and at the steps kept; same for the nonsense controls."""

    size: int  # features of every group and of the random control
    final: dict[str, Float[Tensor, "n 3 s s2"]] = field(repr=False)
    kept: dict[str, dict[int, Tensor]] = field(repr=False)
    nonsense: dict[str, Tensor] = field(repr=False)
    benign: dict[str, Tensor] = field(repr=False)  # pictures without a trigger under the same defence
    loss: dict[str, list[float]]
    psnr: dict[str, list[float]]
    linf: dict[str, list[float]]


def masks(mds: Any, n: int, seed: int) -> tuple[int, dict[str, Bool[Tensor, "n f"] | None]]:
    """For each defence the features of every sample: equal counts, drawn anew for each sample; None is all."""
    groups, _ = groups_of(mds)
    k = min(len(f) for f in groups.values())
    alive = mm.FeatureSet(mds.alive, len(mds.alive), name="alive", head=mds.head)
    chosen = {g: samples_of(f, k, n, seed=seed) for g, f in groups.items()}
    return k, {**chosen, "random": samples_of(alive, k, n, seed=seed + 1), "all": None}


def defend(model: Any, samples: Samples, mds: Any, *, steps: int, lr: float, keep: Sequence[int], cost: int,
           seed: int, progress: bool) -> Defended:  # fmt: skip
    """Every defence on every sample, on the typographic samples' nonsense twins, and on ``cost`` benign pictures.

    All are one batch: the same call, the same features for a sample and its twin.
    """
    k, chosen = masks(mds, len(samples), seed)
    typed, some = list(samples.typed), list(range(min(cost, len(samples))))
    pictures = torch.cat([samples.attack, samples.controls["nonsense"], samples.base[some]])
    owner = [*range(len(samples)), *typed, *some]
    n, m = len(samples), len(typed)
    made: dict[str, Any] = {}
    for name in DEFENCES:
        mask = chosen[name]
        made[name] = align(
            model, pictures, samples.partner[owner], None if mask is None else mask[owner], steps=steps, lr=lr,
            keep=keep, progress=progress, label=f"defence on {name}",
        )  # fmt: skip
    return Defended(
        k,
        {d: o.pictures[:n] for d, o in made.items()},
        {d: {s: p[:n] for s, p in o.kept.items()} for d, o in made.items()},
        {d: o.pictures[n : n + m] for d, o in made.items()},
        {d: o.pictures[n + m :] for d, o in made.items()},
        {d: o.history[:, :n].mean(1).tolist() for d, o in made.items()},
        {d: psnr(o.pictures[:n], samples.attack).tolist() for d, o in made.items()},
        {d: o.linf[:n].tolist() for d, o in made.items()},
    )


class Bench:
    """Asks one victim about pictures and has the answers judged."""

    def __init__(self, victim: Any, judge: Any, samples: Samples) -> None:
        self.victim, self.judge, self.samples = victim, judge, samples
        self.answers: dict[str, list[str]] = {}

    def hits(self, what: str, pictures: Tensor, rows: Sequence[int] | None = None) -> list[bool]:
        """Success of the harmful request, sample by sample; the answers are kept under ``what``."""
        rows = range(len(self.samples)) if rows is None else rows
        asked = [self.samples.requests[i] for i in rows]
        targets = [self.samples.target[i] for i in rows]
        answers = self.victim.answer(pictures, asked)
        self.answers[what] = answers
        return self.judge.successes(asked, answers, targets)


def attack_results(bench: Bench, defended: Defended, steps: int) -> dict[str, Any]:
    """Table 8 of one victim: rates by condition and trigger, controls, curve, paired comparisons."""
    s = bench.samples
    typed = list(s.typed)
    hits = {"benign": bench.hits("benign", s.partner), "unaligned": bench.hits("unaligned", s.attack)}
    hits |= {d: bench.hits(d, p) for d, p in defended.final.items()}
    twins = {"unaligned": bench.hits("nonsense", s.controls["nonsense"], typed)} if typed else {}
    if typed:
        twins |= {d: bench.hits(f"nonsense, {d}", p, typed) for d, p in defended.nonsense.items()}
    triggers = {"all triggers": list(range(len(s)))} | {t: s.rows(t) for t in dict.fromkeys(s.trigger)}
    exact = {c: [names(a, [t]) for a, t in zip(bench.answers[c], s.target, strict=True)] for c in hits}
    curve = {d: {0: hits["unaligned"], steps: hits[d]} for d in defended.final}
    for d, kept in defended.kept.items():
        curve[d] |= {k: bench.hits(f"{d} at {k}", p) for k, p in kept.items() if k not in (0, steps)}
    return {
        "victim": bench.victim.name,
        "judge": bench.judge.name,
        "n": len(s),
        "rates": {
            c: {t: rate([h[i] for i in rows]) for t, rows in triggers.items()} for c, h in hits.items()
        },
        "target_named": {c: rate(h) for c, h in exact.items()},
        "typographic": {
            t: typographic(bench, hits, twins, [i for i in typed if s.trigger[i] == t])
            for t in TYPED
            if s.rows(t)
        },
        "curve": {d: {str(k): rate(h) for k, h in sorted(c.items())} for d, c in curve.items()},
        "against_random": {d: paired(hits[d], hits["random"]) for d in (*GROUPS, "all")},
        "attack_against_benign": paired(hits["unaligned"], hits["benign"]),
        "answers": {c: answers[:12] for c, answers in bench.answers.items()},
    }


def typographic(bench: Bench, hits: dict, twins: dict, rows: list[int]) -> dict[str, Any]:
    """For every condition B(word) − B(nonsense) on the same pictures; noise patch and blank plate beside it."""
    place = {i: k for k, i in enumerate(bench.samples.typed)}
    ids = [place[i] for i in rows]
    out: dict[str, Any] = {"n": len(rows)}
    for c, twin in twins.items():
        word = torch.tensor([float(hits[c][i]) for i in rows])
        fake = torch.tensor([float(twin[k]) for k in ids])
        out[c] = {"word": rate([hits[c][i] for i in rows]), "nonsense": rate([twin[k] for k in ids]),
                  "difference": plain(bootstrap(word - fake))}  # fmt: skip
    for control in ("noise", "blank"):
        got = bench.hits(control, bench.samples.controls[control][ids], rows)
        out[control] = rate(got)
    return out


def cost_results(victims: Sequence[Any], samples: Samples, defended: Defended) -> dict[str, Any]:
    """Whether benign pictures are still named rightly after the same defence: zero-shot label, or description."""
    n = len(next(iter(defended.benign.values())))
    out: dict[str, Any] = {}
    for victim in victims:
        rows = {"before": samples.base[:n], "partner": samples.partner[:n], **defended.benign}
        out[victim.name] = {
            what: rate([names(a, [t]) for a, t in zip(victim.answer(p, [DESCRIBE] * n), samples.base_name[:n], strict=True)])
            for what, p in rows.items()
        }  # fmt: skip
    return {
        "n": n,
        "named": out,
        "psnr": {d: float(psnr(p, samples.base[:n]).mean()) for d, p in defended.benign.items()},
    }


def rate(hits: Sequence[bool]) -> dict[str, Any]:
    return plain(wilson(sum(hits), len(hits)))


def paired(one: Sequence[bool], other: Sequence[bool]) -> dict[str, Any]:
    """Exact McNemar test and the difference of rates with its bootstrap interval, on the same samples."""
    more = sum(a and not b for a, b in zip(one, other, strict=True))
    less = sum(b and not a for a, b in zip(one, other, strict=True))
    p = binomtest(more, more + less).pvalue if more + less else 1.0
    difference = bootstrap(torch.tensor([float(a) - float(b) for a, b in zip(one, other, strict=True)]))
    return {"difference": plain(difference), "more": more, "less": less, "p": float(p)}


def rule_judge() -> RuleJudge:
    return RuleJudge(HARMFUL)
