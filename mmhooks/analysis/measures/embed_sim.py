"""EmbedSim: how similar the samples that activate a feature are, compared with random samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmhooks.analysis.inputs.store_rows import ActivationStore, Side
from mmhooks.analysis.measures.samples import (
    Samples,
    Similarity,
    Zeros,
    check_kind,
    compared_samples,
    top_cosines,
    upper_triangle,
)
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.heads.base import Head

SimKind = Literal["primary", "difference", "paper"]


@torch.no_grad()
def embed_sim(
    latents: Float[Tensor, "samples n"] | ActivationStore,
    embeddings: Float[Tensor, "samples2 d"] | str | None = None,
    *,
    m: int = 20,
    kind: SimKind = "primary",
    pool: int | None = None,
    min_samples: int = 2,
    eps: float = 1e-3,
    seed: int = 0,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
    families: Int[Tensor, " samples3"] | None = None,
    zeros: Zeros = "drop",
) -> EmbedSimResult:
    """Computes EmbedSim: the mean cosine of a feature's top ``m`` samples, compared with random samples.

    ``primary`` is ``(S+ - S-) / |S-|`` with S- the mean cosine of all pairs in one random pool; ``difference``
    is ``S+ - S-``; ``paper`` is the mean over pairs of ``(S+_ij - S-_ij) / S-_ij`` with m random samples drawn for
    each feature, heavy-tailed where S- is near zero. The result holds all three.

    Args:
        latents: activations, one row per sample; give the absolute value of signed ones. Or a store, whose
            ``side`` is read in one pass with bounded memory.
        embeddings: of the same samples, by another model; normalized to unit norm here. With a store also the
            name of a site; default the model's own ``<side>.embed``.
        pool: size of the random pool; default all samples.
        min_samples: at least 2; a feature with fewer activating samples is NaN, one with fewer than m uses those.
        head, site: with a store, as in :func:`mmhooks.analysis.measures.mds.mds`.
        families: the family of each sample (:func:`mmhooks.data.families`). Then at most one sample per family is
            among a feature's top samples, and random samples are of different families.
        zeros: "drop" leaves samples with activation 0 out of a feature's top samples; "keep" fills up the list with
            random ones of them, as the paper's plain top-m does.

    Raises:
        ShapeMismatch: the rows differ, or a number is out of range. NotFinite: NaN in either.

    >>> x = torch.eye(4)[[0, 0, 1, 2]]; latents = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    >>> embed_sim(latents, x, m=2).s_plus
    tensor([1.])
    """
    check_kind("EmbedSim", kind, ("primary", "difference", "paper"))
    samples = compared_samples(
        latents, embeddings, m, pool, min_samples, seed, head, side, site, families, zeros
    )
    return embed_sim_of(samples, kind=kind, min_samples=min_samples, eps=eps, seed=seed)


@dataclass(frozen=True)
class EmbedSimResult(Result):
    """EmbedSim of ``n`` features.

    Attributes:
        values: the requested kind, one per feature; NaN if fewer than ``min_samples`` samples activate it.
        estimate: their mean, with a bootstrap interval over features.
        s_plus: mean cosine of each feature's top samples. s_minus: mean cosine of the shared random pool.
        paper: per feature, the mean of element-wise ratios (equation 5).
        excluded: pairs of samples left out of ``paper`` because the absolute value of their random cosine is below
            ``eps``, out of ``pairs_compared``.
        counts: number of top samples per feature, at most m.
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
        """One row per form."""
        gap = self.s_plus - self.s_minus
        forms = {"primary": gap / abs(self.s_minus), "difference": gap, "paper": self.paper}
        return Records(
            {"form": name, **e.columns("EmbedSim", "features"), "m": self.m,
             "S-": self.s_minus, "excluded pairs": self.excluded if name == "paper" else 0}
            for name, e in ((name, bootstrap(values, seed=self.seed)) for name, values in forms.items())
        )  # fmt: skip


@torch.no_grad()
def embed_sim_of(
    samples: Samples, *, kind: SimKind = "primary", min_samples: int = 2, eps: float = 1e-3, seed: int = 0
) -> EmbedSimResult:
    """Computes EmbedSim from samples; arguments as in :func:`mmhooks.analysis.measures.embed_sim.embed_sim`."""
    check_kind("EmbedSim", kind, ("primary", "difference", "paper"))
    top, s_minus = samples.top, samples.s_minus
    m, enough, count = top.indices.shape[1], top.count >= min_samples, top.count
    s_plus = top_similarity(samples, min_samples)
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


def top_similarity(samples: Samples, min_samples: int) -> Float[Tensor, " n"]:
    """Computes S+, the mean cosine of each feature's top samples; NaN if it has fewer than ``min_samples``."""
    unit, top, count = samples.unit, samples.top, samples.top.count
    total = torch.zeros(len(count), unit.shape[1], dtype=unit.dtype)
    for rows in top.indices.T:
        total += torch.where((rows >= 0)[:, None], unit[rows.clamp_min(0)], 0)
    pairs = (count * (count - 1)).clamp_min(1)
    # The sum of all cosines is |sum of unit vectors|^2; the diagonal adds one per sample.
    return torch.where(count >= min_samples, (total.square().sum(1) - count) / pairs, torch.nan)


def _paper_similarity(
    samples: Samples, enough: Bool[Tensor, " n"], eps: float
) -> tuple[Float[Tensor, " n"], int, int]:
    values, excluded, compared = torch.full((len(enough),), math.nan), 0, 0
    for rows, cosines, valid in top_cosines(samples.unit, samples.top):
        other = upper_triangle(samples.unit[samples.control(rows)])
        valid = valid & enough[rows.start : rows.stop, None]
        usable = valid & (other.abs() >= eps)
        ratio = torch.where(usable, (cosines - other) / torch.where(usable, other, 1.0), 0.0)
        number = usable.sum(1)
        values[rows] = torch.where(number > 0, ratio.sum(1) / number.clamp_min(1), torch.nan)
        excluded += int((valid & ~usable).sum())
        compared += int(valid.sum())
    values[~enough] = math.nan
    return values, excluded, compared


class EmbedSim(Similarity):
    """Streaming EmbedSim of every feature: ``update(latents, embeddings)``, then :meth:`result`.

    Equal to :func:`mmhooks.analysis.measures.embed_sim.embed_sim` with its default pool (all samples). The
    paper's form draws each feature's random samples from the pool kept here instead of from all samples.

    Args:
        n_features, dim: widths of latents and embeddings.
        m, kind, min_samples, eps, seed: as in ``embed_sim``. pool: random samples kept.

    >>> metric = EmbedSim(1, 4, m=2)
    >>> metric.update(torch.tensor([[1.0], [1.0], [0.0], [0.0]]), torch.eye(4)[[0, 0, 1, 2]])
    >>> metric.result().s_plus
    tensor([1.])
    """

    def __init__(
        self,
        n_features: int,
        dim: int,
        *,
        m: int = 20,
        kind: SimKind = "primary",
        pool: int = 2048,
        min_samples: int = 2,
        eps: float = 1e-3,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_kind("EmbedSim", kind, ("primary", "difference", "paper"))
        super().__init__(n_features, dim, m=m, pool=pool, min_samples=min_samples, seed=seed, **kwargs)
        self.kind: SimKind = kind
        self.eps = eps

    def result(self) -> EmbedSimResult:  # type: ignore[override]
        samples = self._samples(self.compute())
        return embed_sim_of(
            samples, kind=self.kind, min_samples=self.min_samples, eps=self.eps, seed=self.seed
        )
