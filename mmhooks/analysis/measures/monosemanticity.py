"""MonoSemanticity score of features, and visual and textual monosemanticity of groups (Table 2 of the seed paper).

The score takes one pass: the scaling to 0..1 is applied to the sums, not to the activations. Let low and high be the
extremes of a feature over the whole stream, ``s = high - low``, ``ã = (a - low) / s``, N samples and unit vectors e:

    sum ã e = (sum a e - low sum e) / s
    sum ã   = (sum a - N low) / s
    sum ã²  = (sum a² - 2 low sum a + N low²) / s²

``s`` cancels in ``MS = (|sum ã e|² - sum ã²) / ((sum ã)² - sum ã²)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.inputs.checks import check_rows, chunks, unit_rows
from mmhooks.analysis.inputs.sparse import Columns, Latents, check_samples, to_float32
from mmhooks.analysis.inputs.store_rows import (
    BATCH,
    ActivationStore,
    Side,
    check_store,
    latent_rows,
    row_batches,
    vector_rows,
)
from mmhooks.analysis.measures.embed_sim import EmbedSimResult
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.controls import size_matched
from mmhooks.analysis.statistics.intervals import bootstrap, bootstrap_difference
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import ShapeMismatch, WrongHead
from mmhooks.heads.base import Head
from mmhooks.hooks.features import FeatureSet, as_feature_set


@dataclass(frozen=True)
class GroupContrast(Result):
    """EmbedSim of one group minus that of another, with the same difference of random groups of the same sizes.

    Attributes:
        estimate: the difference, with a bootstrap interval over the features of both groups.
        control: mean and central 95 % of the random differences; n is the number of draws.
        plus, minus: per group its name and the number of its features that have a value.
    """

    estimate: Estimate
    control: Estimate
    plus: tuple[str, int]
    minus: tuple[str, int]

    @property
    def beats_control(self) -> bool:
        """Whether the difference lies outside the central range of the random ones."""
        return not self.control.low <= self.estimate.value <= self.control.high

    def table(self) -> Records:
        e, c = self.estimate, self.control
        return Records(
            [
                {
                    "contrast": f"{self.plus[0]} − {self.minus[0]}",
                    "difference": e.value,
                    "low": e.low,
                    "high": e.high,
                    "features": f"{self.plus[1]} / {self.minus[1]}",
                    "random": c.value,
                    "random low": c.low,
                    "random high": c.high,
                    "draws": c.n,
                }
            ]
        )


@dataclass(frozen=True)
class MonosemanticityResult(Result):
    """MonoSemanticity of every feature, the activation-weighted mean cosine of all pairs of samples; NaN if dead."""

    values: Float[Tensor, " n"]
    estimate: Estimate
    n_samples: int = field(default=0)

    def table(self) -> Records:
        return Records([self.estimate.columns("MS", "features") | {"samples": self.n_samples}])


def visual_monosemanticity(
    on_images: EmbedSimResult, imgd: Any, textd: Any, *, draws: int = 200, seed: int = 0
) -> GroupContrast:
    """Computes EmbedSim(ImgD) - EmbedSim(TextD) on images (seed paper, Table 2).

    Args:
        on_images: :func:`~mmhooks.analysis.measures.embed_sim.embed_sim` of image latents and image embeddings.
        imgd, textd: groups of :func:`~mmhooks.analysis.measures.mds.mds`, or indices, or bool masks.
        draws: number of random groups of the same sizes, from features with a value.

    Raises:
        WrongHead: a group belongs to another number of features.
    """
    return contrast(on_images, imgd, textd, draws=draws, seed=seed)


def textual_monosemanticity(
    on_texts: EmbedSimResult, imgd: Any, textd: Any, *, draws: int = 200, seed: int = 0
) -> GroupContrast:
    """Computes EmbedSim(TextD) - EmbedSim(ImgD) on texts (seed paper, Table 2); arguments as for images."""
    return contrast(on_texts, textd, imgd, draws=draws, seed=seed)


def contrast(sim: EmbedSimResult, plus: Any, minus: Any, *, draws: int = 200, seed: int = 0) -> GroupContrast:
    """Computes the mean EmbedSim of ``plus`` minus that of ``minus``: FeatureSets, indices or bool masks."""
    for group in (plus, minus):
        if isinstance(group, FeatureSet) and group.n_features != len(sim.values):
            raise WrongHead(
                f"expected a group of the {len(sim.values)} features of EmbedSim, got {group!r}: compute both from one head"
            )
    plus, minus = (as_feature_set(group, len(sim.values)) for group in (plus, minus))
    known: Bool[Tensor, " n"] = ~sim.values.isnan()
    one, other = sim.values[plus.mask & known], sim.values[minus.mask & known]
    estimate = bootstrap_difference(one, other, seed=seed)
    both = FeatureSet(range(len(one) + len(other)), len(sim.values), name=f"{plus.name}|{minus.name}")
    drawn = []
    for i, chosen in enumerate(size_matched(both, draws=draws, seed=seed, alive=known)):
        # The first features of a shuffled set act as one group, the rest as the other.
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed + i))
        values = sim.values[chosen.indices[order]].double()
        drawn.append(float(values[: len(one)].mean() - values[len(one) :].mean()))
    return GroupContrast(estimate, _range(drawn), (plus.name, len(one)), (minus.name, len(other)))


@torch.no_grad()
def monosemanticity(
    latents: Float[Tensor, "samples n"] | ActivationStore,
    embeddings: Float[Tensor, "samples2 d"] | str | None = None,
    *,
    seed: int = 0,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
) -> MonosemanticityResult:
    """Computes MonoSemanticity: mean cosine over all pairs of samples, weighted by the product of their activations.

    Activations are scaled to 0..1 per feature. With weights a and unit vectors e this equals
    ``(|sum a e|^2 - sum a^2) / ((sum a)^2 - sum a^2)``, one matrix product instead of all pairs.

    Args:
        latents: one row per sample, or a store, whose ``side`` is read in one pass.
        embeddings: of the same samples, by another model. With a store also the name of a site; default the
            model's own ``<side>.embed``.
        head, site: with a store, as in :func:`mmhooks.analysis.measures.mds.mds`.

    Raises:
        ShapeMismatch: the numbers of rows differ, or there are none. NotFinite: NaN in either.

    >>> x = torch.eye(3)[[0, 0, 1]]; latents = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> monosemanticity(latents, x).values
    tensor([1., 0.], dtype=torch.float64)
    """
    if not isinstance(latents, Tensor):
        check_store(latents)
        rows = latent_rows(latents, side, head, site)
        vectors = vector_rows(latents, f"{side}.embed" if embeddings is None else embeddings)
        metric = MonoSemanticity(rows.n_features, vectors.width, seed=seed)
        for _, begin, end in row_batches(len(rows), BATCH, reads=[rows, vectors]):
            metric.update(rows[begin:end], vectors[begin:end])
        return metric.result()
    if not isinstance(embeddings, Tensor):
        raise ShapeMismatch(
            f"expected embeddings as a tensor, as the latents are, got {type(embeddings).__name__}"
        )
    check_rows(latents, embeddings)
    if not len(latents):
        raise ShapeMismatch("MonoSemanticity: expected at least one sample, got none")
    metric = MonoSemanticity(latents.shape[1], embeddings.shape[1], seed=seed).to(latents.device)
    metric.update(latents, embeddings)
    return metric.result()


def _range(drawn: list[float]) -> Estimate:
    known = torch.tensor([v for v in drawn if math.isfinite(v)], dtype=torch.float64)
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan, 0)
    low, high = torch.quantile(known, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(known.mean()), low, high, len(known))


class MonoSemanticity(Metric):
    """Streaming score of every feature: ``update(latents, embeddings)``, then :meth:`result`.

    Equal to :func:`mmhooks.analysis.measures.monosemanticity.monosemanticity` of all samples at once. A sparse batch
    costs its entries times the width of the embeddings; the zeros it omits count as the smallest activation
    unless an entry is negative.

    Args:
        n_features, dim: widths of latents and embeddings. The state is ``n_features * dim`` doubles.

    >>> metric = MonoSemanticity(2, 3)
    >>> metric.update(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(3)[[0, 0, 1]])
    >>> metric.result().values
    tensor([1., 0.], dtype=torch.float64)
    """

    total: Tensor
    squares: Tensor
    weighted: Tensor
    unit_sum: Tensor
    unit_squares: Tensor
    low: Tensor
    high: Tensor
    n_samples: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, n_features: int, dim: int, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_features, self.dim, self.seed = n_features, dim, seed
        zeros = torch.zeros(n_features, dtype=torch.float64)
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("squares", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("weighted", zeros[:, None].repeat(1, dim), dist_reduce_fx="sum")
        self.add_state("unit_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("unit_squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("low", zeros + torch.inf, dist_reduce_fx="min")
        self.add_state("high", zeros - torch.inf, dist_reduce_fx="max")
        self.add_state("n_samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, latents: Latents, embeddings: Float[Tensor, "samples2 d"]) -> None:
        """Adds a batch of samples.

        Raises:
            ShapeMismatch: rows or widths differ. NotFinite: NaN or infinity in either.
        """
        check_samples(latents, embeddings, self.n_features, self.dim, start=int(self.n_samples))
        if len(latents) == 0:
            return
        if isinstance(latents, SparseRows):
            self._add_entries(latents, unit_rows(embeddings.cpu().double(), start=int(self.n_samples)))
        else:
            for begin, part in chunks(latents):
                vectors = embeddings[begin : begin + len(part)].double()
                unit = unit_rows(vectors, start=int(self.n_samples) + begin)
                self._add_table(to_float32(part), unit.to(part.device))
        self.n_samples = self.n_samples + len(latents)

    def _add_entries(self, batch: SparseRows, unit: Tensor) -> None:
        columns = Columns.of(batch)
        owner = torch.arange(self.n_features).repeat_interleave(columns.counts)
        values = columns.values.double()
        low, high = columns.extremes()
        has_zero = columns.counts < len(batch)  # some sample of the batch is 0
        self._add(
            total=torch.bincount(owner, values, minlength=self.n_features),
            squares=torch.bincount(owner, values.square(), minlength=self.n_features),
            weighted=columns.transposed_times(unit).double(),
            unit_sum=unit.sum(0, dtype=torch.float64),
            unit_squares=unit.double().square().sum(),
            low=torch.where(has_zero, low.clamp_max(0), low).double(),
            high=torch.where(has_zero, high.clamp_min(0), high).double(),
        )

    def _add_table(self, a: Tensor, unit: Tensor) -> None:
        # In float64: a feature that fires for one sample must have a weight of exactly 0, or its value is made of
        # rounding. The sums are of the part above the batch's minimum: a large common offset would lose digits.
        a = a.double()
        low, high, rows = a.amin(0), a.amax(0), len(a)
        above = a - low
        floor, height = low, above.sum(0)
        unit_sum = unit.sum(0, dtype=torch.float64)
        self._add(
            total=height + rows * floor,
            squares=above.square().sum(0) + 2 * floor * height + rows * floor.square(),
            weighted=above.T @ unit + floor[:, None] * unit_sum,
            unit_sum=unit_sum,
            unit_squares=unit.double().square().sum(),
            low=floor,
            high=high,
        )

    def _add(self, *, low: Tensor, high: Tensor, **sums: Tensor) -> None:
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value.to(self.total.device))
        self.low = torch.minimum(self.low, low.to(self.low.device))
        self.high = torch.maximum(self.high, high.to(self.high.device))

    def compute(self) -> dict[str, Tensor]:
        """``values``, one per feature (NaN for a constant one), and the sums over all unit vectors."""
        n, some = self.n_samples.double(), self.high > self.low
        low = torch.where(some, self.low, 0)
        span = torch.where(some, self.high - self.low, 1)
        square_sum = (self.squares - 2 * low * self.total + n * low.square()).clamp_min(0)
        weight = (self.total - n * low).square() - square_sum
        vector = self.weighted - low[:, None] * self.unit_sum
        known = some & (weight / span.square() > 1e-9)
        values = (vector.square().sum(1) - square_sum) / torch.where(known, weight, 1)
        return {
            "values": torch.where(known, values, torch.nan),
            "unit_sum": self.unit_sum,
            "unit_squares": self.unit_squares,
            "n_samples": self.n_samples,
        }

    def result(self) -> MonosemanticityResult:
        """The scores with the bootstrap interval of their mean."""
        state = self.compute()
        values = torch.atleast_1d(state["values"].cpu())
        return MonosemanticityResult(values, bootstrap(values, seed=self.seed), int(state["n_samples"]))
