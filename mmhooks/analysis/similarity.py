"""EmbedSim and WinRate of top samples that are known already, however they were found (seed paper, equations 5 and 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.analysis.intervals import bootstrap
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.top import TopActivating
from mmhooks.errors import MMHooksError, ShapeMismatch

SimKind = Literal["primary", "difference", "paper"]
WinKind = Literal["expectation", "paper"]
# Cosines nearer than that are equal: a pair of top samples meets itself in the random pool, through another product of
# matrices, and would win or lose by its rounding.
TIE = 1e-6


@dataclass(frozen=True)
class EmbedSimResult(Result):
    """EmbedSim of ``n`` features.

    Attributes:
        values: of the kind asked for, one a feature; NaN where fewer than ``min_samples`` activate it.
        estimate: their mean, with a bootstrap interval over features.
        s_plus: mean cosine of each feature's top samples. s_minus: mean cosine of the shared random pool.
        paper: the mean of element-wise ratios (equation 5) of each feature.
        excluded: pairs of samples left out of ``paper`` because their random cosine is below ``eps`` in size,
            of ``pairs_compared``.
        counts: how many top samples each feature has, at most m.
    """

    values: Float[Tensor, " n"]
    estimate: Estimate
    s_plus: Float[Tensor, " n"] = field(repr=False)
    s_minus: float
    paper: Float[Tensor, " n"] = field(repr=False)
    excluded: int
    pairs_compared: int
    counts: Int[Tensor, " n"] = field(repr=False)
    kind: str
    m: int
    pool: int
    eps: float
    seed: int

    def table(self) -> Records:
        """One row for each of the three forms."""
        gap = self.s_plus - self.s_minus
        forms = {"primary": gap / abs(self.s_minus), "difference": gap, "paper": self.paper}
        return Records(
            {"form": name, "EmbedSim": e.value, "low": e.low, "high": e.high, "features": e.n, "m": self.m,
             "S-": self.s_minus, "excluded pairs": self.excluded if name == "paper" else 0}
            for name, e in ((name, bootstrap(values, seed=self.seed)) for name, values in forms.items())
        )  # fmt: skip


@dataclass(frozen=True)
class WinRateResult(Result):
    """WinRate of ``n`` features: ``values`` (NaN where too few samples activate one), and their mean."""

    values: Float[Tensor, " n"]
    estimate: Estimate
    counts: Int[Tensor, " n"] = field(repr=False)
    kind: str
    m: int
    pool: int
    seed: int

    def table(self) -> Records:
        e = self.estimate
        return Records(
            [
                {
                    "form": self.kind,
                    "WinRate": e.value,
                    "low": e.low,
                    "high": e.high,
                    "features": e.n,
                    "m": self.m,
                }
            ]
        )


@dataclass(frozen=True)
class Samples:
    """What similarity is computed from.

    Attributes:
        unit: unit vectors of the samples that count.
        top: the strongest samples of each feature, as rows of ``unit``.
        pool: the shared random pool, as rows of ``unit``.
        s_minus: mean cosine of all pairs of random samples, over ``s_minus_pool`` of them.
        control: for a run of features m random samples each, as rows of ``unit`` (the paper's forms).
    """

    unit: Float[Tensor, "rows d"]
    top: TopActivating
    pool: Int[Tensor, " p"]
    s_minus: float
    s_minus_pool: int
    control: Callable[[range], Tensor]


@torch.no_grad()
def embed_sim_of(
    samples: Samples, *, kind: SimKind = "primary", min_samples: int = 2, eps: float = 1e-3, seed: int = 0
) -> EmbedSimResult:
    """EmbedSim; arguments as in :func:`mmhooks.analysis.interpretability.embed_sim`."""
    check_kind("EmbedSim", kind, ("primary", "difference", "paper"))
    unit, top, s_minus = samples.unit, samples.top, samples.s_minus
    m, enough = top.indices.shape[1], top.count >= min_samples
    total, count = torch.zeros(len(enough), unit.shape[1], dtype=unit.dtype), top.count
    for j in range(m):
        rows = top.indices[:, j]
        total += torch.where((rows >= 0)[:, None], unit[rows.clamp_min(0)], 0)
    pairs = (count * (count - 1)).clamp_min(1)
    # The sum of all cosines is |sum of unit vectors|^2; the diagonal is one a sample.
    s_plus = torch.where(enough, (total.square().sum(1) - count) / pairs, torch.nan)
    paper, excluded, compared = _paper_similarity(samples, enough, eps)
    gap = s_plus - s_minus
    values = {
        "primary": gap / abs(s_minus) if s_minus else gap * math.nan,
        "difference": gap,
        "paper": paper,
    }[kind]
    return EmbedSimResult(
        values, bootstrap(values, seed=seed), s_plus, s_minus, paper, excluded, compared, count, kind, m,
        samples.s_minus_pool, eps, seed,
    )  # fmt: skip


@torch.no_grad()
def win_rate_of(
    samples: Samples, *, kind: WinKind = "expectation", min_samples: int = 2, seed: int = 0
) -> WinRateResult:
    """WinRate; arguments as in :func:`mmhooks.analysis.interpretability.win_rate`."""
    check_kind("WinRate", kind, ("expectation", "paper"))
    unit, top = samples.unit, samples.top
    enough = top.count >= min_samples
    values = torch.full((len(enough),), math.nan)
    if kind == "expectation":
        random_cosines = _upper(unit[samples.pool][None])[0].sort().values
        for rows, cosines, valid in _top_cosines(unit, top):
            below = torch.searchsorted(random_cosines, cosines - TIE, right=False) / len(random_cosines)
            values[rows] = (below * valid).sum(1) / valid.sum(1).clamp_min(1)
    else:
        for rows, cosines, valid in _top_cosines(unit, top):
            other = _upper(unit[samples.control(rows)])
            values[rows] = ((cosines > other + TIE) & valid).sum(1) / valid.sum(1).clamp_min(1)
    values[~enough] = math.nan
    m = top.indices.shape[1]
    return WinRateResult(values, bootstrap(values, seed=seed), top.count, kind, m, len(samples.pool), seed)


def check_kind(measure: str, kind: str, known: tuple[str, ...]) -> None:
    if kind not in known:
        raise MMHooksError(f"kind of {measure} must be one of {', '.join(known)}, came {kind!r}")


def check_sizes(m: int, min_samples: int, n: int) -> None:
    """Raises ShapeMismatch where there can be no pair of samples."""
    if m < 2 or min_samples < 2 or n < 2:
        raise ShapeMismatch(
            f"similarity needs two samples: m = {m}, min_samples = {min_samples}, {n} samples came"
        )


def mean_cosine(unit: Float[Tensor, "n d"]) -> float:
    """Mean cosine over all pairs of different rows, of unit vectors: ``(|sum|^2 - n) / (n^2 - n)``."""
    n = len(unit)
    if n < 2:
        return math.nan
    # The exact squared norms, not n: rounding of unit vectors would show where the mean is near zero.
    total = unit.double().sum(0).square().sum() - unit.double().square().sum()
    return float(total) / (n * n - n)


def random_samples(n: int, m: int, features: range, seed: int) -> Int[Tensor, "f m"]:
    """``m`` different random samples for each feature; those of a feature depend on it and the seed alone."""
    rows = []
    for feature in features:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + feature)
        if 4 * m < n:  # a few of many: draw until m differ, rather than shuffle all
            picked: dict[int, None] = {}
            while len(picked) < m:
                picked.update(dict.fromkeys(torch.randint(n, (2 * m,), generator=generator).tolist()))
            rows.append(torch.tensor(list(picked)[:m]))
        else:
            order = torch.randperm(n, generator=generator)[:m]
            rows.append(order if len(order) == m else order.repeat(-(-m // n))[:m])
    return torch.stack(rows)


def random_pool(n: int, size: int | None, seed: int) -> Int[Tensor, " p"]:
    """``size`` different samples of ``n`` at random; all of them where ``size`` is None or larger."""
    if size is None or size >= n:
        return torch.arange(n)
    if size < 2:
        raise ShapeMismatch(f"the random pool needs at least 2 samples, came {size}")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]


def _upper(unit: Float[Tensor, "f m d"]) -> Float[Tensor, "f p"]:
    """Cosines of all pairs i < j in each set."""
    cosines = unit @ unit.transpose(1, 2)
    i, j = torch.triu_indices(unit.shape[1], unit.shape[1], 1)
    return cosines[:, i, j]


def _top_cosines(unit: Tensor, top: TopActivating) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Per run of features: which ones, cosines of their top samples' pairs, and which of these are of samples."""
    n, m = top.indices.shape
    i, j = torch.triu_indices(m, m, 1)
    width = max(1, 2**22 // (m * unit.shape[1]))
    for begin in range(0, n, width):
        rows = range(begin, min(begin + width, n))
        indices = top.indices[rows.start : rows.stop]
        real = indices >= 0
        yield rows, _upper(unit[indices.clamp_min(0)]), real[:, i] & real[:, j]


def _paper_similarity(
    samples: Samples, enough: Bool[Tensor, " n"], eps: float
) -> tuple[Float[Tensor, " n"], int, int]:
    values, excluded, compared = torch.full((len(enough),), math.nan), 0, 0
    for rows, cosines, valid in _top_cosines(samples.unit, samples.top):
        other = _upper(samples.unit[samples.control(rows)])
        valid = valid & enough[rows.start : rows.stop, None]
        usable = valid & (other.abs() >= eps)
        ratio = torch.where(usable, (cosines - other) / torch.where(usable, other, 1.0), 0.0)
        number = usable.sum(1)
        values[rows] = torch.where(number > 0, ratio.sum(1) / number.clamp_min(1), torch.nan)
        excluded += int((valid & ~usable).sum())
        compared += int(valid.sum())
    values[~enough] = math.nan
    return values, excluded, compared
