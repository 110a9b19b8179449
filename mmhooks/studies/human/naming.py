"""Agreement of names: how often two participants call the same samples the same, in words and in meaning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.intervals import bootstrap

Embed = Callable[[Sequence[str]], Tensor]


def plain_name(name: str) -> str:
    """Leaves out case, punctuation, articles and repeated spaces; nothing but these makes names equal.

    >>> plain_name("The  red Flags!")
    'red flags'
    """
    words = re.sub(r"[^\w\s]", " ", name.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def naming(
    names: Mapping[str, Sequence[str]], embed: Embed | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Measures the agreement of names; every task is one sample, and intervals resample tasks.

    Args:
        names: by task, one name of each participant who answered it; "" where nothing was in common.
        embed: texts to unit vectors; None leaves similarity out.

    Returns:
        ``exact``: the share of pairs of participants whose names are equal (:func:`plain_name`), of pairs who both gave
        one; ``nothing``: the share of participants who found nothing in common; with ``embed``, ``similarity``: mean
        cosine of two participants' names of one task, minus that of names of different tasks.
    """
    tasks = [[plain_name(name) for name in given] for given in names.values()]
    tasks = [given for given in tasks if given]
    nothing = [sum(not name for name in given) / len(given) for given in tasks]
    named = [[name for name in given if name] for given in tasks]
    exact = [_share_equal(given) for given in named]
    out = {"tasks": len(tasks), "exact": _mean(exact, seed), "nothing": _mean(nothing, seed)}
    if embed is not None:
        out["similarity"] = _mean(_similarity(named, embed), seed)
    return out


def _share_equal(given: Sequence[str]) -> float:
    pairs = list(combinations(given, 2))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else float("nan")


def _similarity(named: Sequence[Sequence[str]], embed: Embed) -> list[float]:
    """By task, the mean cosine within the task minus that with the names of all other tasks."""
    flat = [name for given in named for name in given]
    if not flat:
        return []
    vocabulary = sorted(set(flat))
    vectors = dict(zip(vocabulary, embed(vocabulary).double(), strict=True))
    sums = [sum((vectors[name] for name in given), torch.zeros_like(vectors[flat[0]])) for given in named]
    total = torch.stack(sums).sum(0)
    out = []
    for given, own in zip(named, sums, strict=True):
        n, others = len(given), len(flat) - len(given)
        if n < 2 or not others:
            out.append(float("nan"))
            continue
        within = (float(own @ own) - n) / (n * (n - 1))  # unit vectors: each has cosine 1 with itself
        across = float(own @ (total - own)) / (n * others)
        out.append(within - across)
    return out


def _mean(values: Sequence[float], seed: int) -> Estimate:
    return bootstrap(torch.tensor(values, dtype=torch.float64), seed=seed)
