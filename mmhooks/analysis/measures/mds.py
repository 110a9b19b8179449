"""Modality Dominance Score: how much of a feature's activation comes from images, and the three groups.

The metric streams: it keeps sums and counts, never two dense tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.inputs.sparse import Latents, check_latent_pair, count, sums
from mmhooks.analysis.inputs.store_rows import BATCH, ActivationStore, paired_latents, row_batches
from mmhooks.analysis.results import Estimate, Records, Result, correlation
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.hooks.features import FeatureSet

GROUPS = ("ImgD", "TextD", "CrossD")


@dataclass(frozen=True)
class MDSResult(Result):
    """Scores of ``n`` features over ``n_pairs`` pairs.

    Attributes:
        R: mean over pairs of ``a_I / (a_I + a_T)``, without pairs where both are 0; NaN for dead features.
        standard_error: of R, over pairs; NaN below two pairs.
        ratio_of_means: ``E[a_I] / (E[a_I] + E[a_T])``.
        counts: pairs that R averages over. image_counts, text_counts: pairs where that side is not 0.
        dead: fires in neither modality; in no group, and not part of mu and sigma.
        rare: alive, but ``counts < min_fires``; flagged, and still in a group.
        mu, sigma: over alive features; sigma is the population standard deviation.
        mu_estimate: mu with a bootstrap interval over features.
        groups: ImgD (R > mu + sigma), TextD (R < mu - sigma), CrossD (the other alive ones).
        shuffled_R, shuffled_r: scores of pairs with shuffled texts, and their correlation with R; near 1 means
            that the score says little about the pairing.
    """

    R: Float[Tensor, " n"]
    standard_error: Float[Tensor, " n"] = field(repr=False)
    ratio_of_means: Float[Tensor, " n"] = field(repr=False)
    counts: Int[Tensor, " n"] = field(repr=False)
    image_counts: Int[Tensor, " n"] = field(repr=False)
    text_counts: Int[Tensor, " n"] = field(repr=False)
    dead: Bool[Tensor, " n"] = field(repr=False)
    rare: Bool[Tensor, " n"] = field(repr=False)
    mu: float
    sigma: float
    mu_estimate: Estimate
    groups: tuple[FeatureSet, FeatureSet, FeatureSet]
    shuffled_R: Float[Tensor, " n"] = field(repr=False)
    shuffled_r: float
    n_pairs: int
    kind: str
    min_fires: int
    head: str = ""
    data: str = ""

    @property
    def thresholds(self) -> tuple[float, float]:
        """``(mu - sigma, mu + sigma)``."""
        return self.mu - self.sigma, self.mu + self.sigma

    @property
    def alive(self) -> Bool[Tensor, " n"]:
        return ~self.dead

    def table(self) -> Records:
        """One row for all alive features, then one per group, with the shuffled control."""
        shared = {"pairs": self.n_pairs, "head": self.head, "data": self.data}
        rows = Records()
        for name, members in zip(("all alive", *GROUPS), (None, *self.groups), strict=True):
            mask = self.alive if members is None else members.mask
            estimate = bootstrap(self.R[mask])
            rows.append(
                {
                    "group": name,
                    "features": int(mask.sum()),
                    "rare": int((self.rare & mask).sum()),
                    "mean R": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "sigma": float(self.R[mask].std(unbiased=False)) if mask.any() else math.nan,
                    "ratio of means": float(self.ratio_of_means[mask].mean()) if mask.any() else math.nan,
                    "r with shuffled pairs": correlation(self.R[mask], self.shuffled_R[mask]),
                    "dead": int(self.dead.sum()) if members is None else 0,
                    **shared,
                }
            )
        return rows


def mds(
    image_latents: Latents | ActivationStore,
    text_latents: Latents | None = None,
    *,
    kind: Kind = "relu",
    head: str | Head = "",
    data: str = "",
    min_fires: int = 20,
    seed: int = 0,
    image: str | None = None,
    text: str | None = None,
    progress: bool = False,
) -> MDSResult:
    """Computes the Modality Dominance Score of every feature (seed paper, section 2.3; decisions in docs/measures.md).

    Args:
        image_latents, text_latents: the two sides of the same pairs, row by row, dense or sparse. Or only a store:
            ``mds(store, head=sae)`` runs the head on stored embeddings, ``mds(store)`` reads stored latents; one
            pass, bounded memory.
        kind: the activation that is compared: "relu" (SAE, NCL), "abs" (signed features, such as raw CLIP's own
            coordinates, whose signed ratio has no mean), "paper" (the raw values, as printed).
        head, data: provenance, kept in the result and in its groups; with a store ``head`` is the head itself.
        min_fires: an alive feature counted in fewer pairs is flagged as rare.
        seed: of the shuffled control.
        image, text: with a store, the sites to read; default ``image.embed`` and ``text.embed`` with a head,
            else each side's one site of latents.

    Raises:
        ShapeMismatch: the two sides differ in shape, or there are no pairs.
        NotFinite: NaN or infinity in either side; says how many and where.
        UnknownSite: the store does not hold a site.

    >>> image = torch.tensor([[3.0, 0.0], [1.0, 0.0]]); text = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> mds(image, text).R
    tensor([0.8750,    nan], dtype=torch.float64)
    """
    sides = paired_latents(image_latents, text_latents, head=head, data=data, image=image, text=text)
    if not len(sides):
        raise ShapeMismatch("Modality Dominance Score: expected at least one pair, got none")
    metric = MDS(
        sides.n_features, kind=kind, head=sides.head, data=sides.data, min_fires=min_fires, seed=seed
    )
    if not sides.reads:  # tables, which are shuffled as a whole for the control
        metric = metric.to(sides.images.device) if isinstance(sides.images, Tensor) else metric
        metric.update(sides.images, sides.texts)
        return metric.result()
    for _, begin, end in row_batches(len(sides), BATCH, "MDS", reads=sides.reads, progress=progress):
        metric.update(sides.images[begin:end], sides.texts[begin:end], start=begin)
    return metric.result()


def result_of(metric: MDS, sums: Mapping[str, Tensor]) -> MDSResult:
    """Makes the result from the sums and counts that a metric's ``compute()`` returns."""
    sums = {name: value.cpu() for name, value in sums.items()}
    n, counts, score = metric.n_features, sums["counts"], sums["R"]
    n_pairs = int(sums["n_pairs"])
    dead = (sums["image_counts"] == 0) & (sums["text_counts"] == 0)
    variance = (divide(sums["ratio_square_sum"], counts) - score.square()).clamp_min(0)
    # Standard error of the mean, unbiased: population variance over (count - 1).
    error = torch.where(counts > 1, (variance / (counts - 1).clamp_min(1)).sqrt(), torch.nan)
    shuffled = divide(sums["shuffled_sum"], sums["shuffled_counts"])
    alive = ~score.isnan()
    mu = float(score[alive].mean()) if alive.any() else math.nan
    sigma = float(score[alive].std(unbiased=False)) if alive.any() else math.nan
    about = {"kind": metric.kind, "data": metric.data, "n_pairs": n_pairs, "mu": mu, "sigma": sigma}
    # Equal scores differ only by rounding; that is not dominance.
    margin = sigma if sigma > 1e-9 else math.inf
    image, text = score > mu + margin, score < mu - margin
    masks = (image, text, alive & ~image & ~text)
    imgd, textd, crossd = (
        FeatureSet(mask, n, name=name, head=metric.head, info=about)
        for name, mask in zip(GROUPS, masks, strict=True)
    )
    return MDSResult(
        R=score,
        standard_error=error,
        ratio_of_means=sums["ratio_of_means"],
        counts=counts,
        image_counts=sums["image_counts"],
        text_counts=sums["text_counts"],
        dead=dead,
        rare=~dead & (counts < metric.min_fires),
        mu=mu,
        sigma=sigma,
        mu_estimate=bootstrap(score, seed=metric.seed),
        groups=(imgd, textd, crossd),
        shuffled_R=shuffled,
        shuffled_r=correlation(score, shuffled),
        n_pairs=n_pairs,
        kind=metric.kind,
        min_fires=metric.min_fires,
        head=metric.head,
        data=metric.data,
    )


Kind = Literal["relu", "abs", "paper"]
CACHE_BYTES = 2**20
KINDS: tuple[Kind, ...] = ("relu", "abs", "paper")
_SUMS = ("ratio_sum", "ratio_square_sum", "image_sum", "text_sum", "shuffled_sum")
_COUNTS = ("counts", "image_counts", "text_counts", "shuffled_counts")


class MDS(Metric):
    """Streaming score of every feature over batches of pairs: ``update(image, text)``, then ``compute()`` for the
    tensors or :meth:`result` for everything.

    Equal to :func:`mmhooks.analysis.measures.mds.mds` on all pairs at once, for any order of batches and any number
    of processes. Only the shuffled control differs: a stream shuffles texts within each batch, so batches should
    be large (a batch of one pair adds nothing to it).

    Args:
        n_features: width of the latents.
        kind, head, data, min_fires, seed: as in :func:`mmhooks.analysis.measures.mds.mds`.

    >>> metric = MDS(3)
    >>> metric.update(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    >>> metric.compute()["R"]
    tensor([0.5000, 0.7500,    nan], dtype=torch.float64)
    """

    # The states, which torchmetrics sets by name.
    ratio_sum: Tensor
    ratio_square_sum: Tensor
    image_sum: Tensor
    text_sum: Tensor
    shuffled_sum: Tensor
    counts: Tensor
    image_counts: Tensor
    text_counts: Tensor
    shuffled_counts: Tensor
    n_pairs: Tensor
    kind: Kind

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        n_features: int,
        *,
        kind: Kind = "relu",
        head: str = "",
        data: str = "",
        min_fires: int = 20,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kind not in KINDS:
            raise MMHooksError(f"kind: expected one of {', '.join(KINDS)} for MDS, got {kind!r}")
        self.n_features, self.kind, self.head, self.data = n_features, kind, head, data
        self.min_fires, self.seed = min_fires, seed
        for name in _SUMS:
            self.add_state(name, torch.zeros(n_features, dtype=torch.float64), dist_reduce_fx="sum")
        for name in _COUNTS:
            self.add_state(name, torch.zeros(n_features, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("n_pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, image: Latents, text: Latents, *, start: int | None = None) -> None:
        """Adds the latents of a batch of pairs, dense or sparse; the cost of sparse ones grows with their entries.

        Args:
            start: number of the first pair, which also seeds the shuffled control; default: the number of pairs
                this metric has seen. Processes that share a stream must give it, to shuffle as one process does.

        Raises:
            ShapeMismatch: the sides differ in shape, or their width is not ``n_features``.
            NotFinite: NaN or infinity in either.
        """
        start = int(self.n_pairs) if start is None else start
        check_latent_pair(image, text, self.n_features, start=start)
        if isinstance(image, SparseRows) != isinstance(text, SparseRows):
            image, text = (x.dense() if isinstance(x, SparseRows) else x for x in (image, text))
        if len(image) == 0:
            return
        generator = torch.Generator().manual_seed(self.seed + start)
        device = image.values.device if isinstance(image, SparseRows) else image.device
        order = _no_fixed_point(len(image), generator).to(device) if len(image) > 1 else None
        if isinstance(image, SparseRows) and isinstance(text, SparseRows):
            self._add_sparse(image, text, order)
        elif isinstance(image, Tensor) and isinstance(text, Tensor):
            self._add_dense(image, text, order)
        self.n_pairs = self.n_pairs + len(image)

    def _add_dense(self, image: Tensor, text: Tensor, order: Tensor | None) -> None:
        # Runs of rows that fit into the CPU cache: several times faster than whole tables.
        size = max(1, CACHE_BYTES // (4 * self.n_features))
        for begin in range(0, len(image), size):
            rows = slice(begin, begin + size)
            a_i, a_t = (activation(x[rows], self.kind) for x in (image, text))
            ratio, counted = _ratio(a_i, a_t)
            self.ratio_sum += _sum(ratio)
            self.ratio_square_sum += _sum(ratio.square())
            self.counts += _count(counted)
            self.image_sum += _sum(a_i)
            self.text_sum += _sum(a_t)
            self.image_counts += _count(a_i != 0)
            self.text_counts += _count(a_t != 0)
            if order is not None:
                ratio, counted = _ratio(a_i, activation(text[order[rows]], self.kind))
                self.shuffled_sum += _sum(ratio)
                self.shuffled_counts += _count(counted)

    def _add_sparse(self, image: SparseRows, text: SparseRows, order: Tensor | None) -> None:
        n, device = self.n_features, self.counts.device
        image, text = (activated_rows(x, self.kind) for x in (image, text))
        image_counts = count(image.indices, image.active, n)
        text_counts = count(text.indices, text.active, n)
        ratio, squares, counted = _sparse_ratio(image, text)
        self.ratio_sum += ratio.to(device)
        self.ratio_square_sum += squares.to(device)
        self.counts += (counted + text_counts).to(device)
        self.image_sum += sums(image.indices, image.values, n).to(device)
        self.text_sum += sums(text.indices, text.values, n).to(device)
        self.image_counts += image_counts.to(device)
        self.text_counts += text_counts.to(device)
        if order is not None:
            ratio, _, counted = _sparse_ratio(image, text[order])
            self.shuffled_sum += ratio.to(device)
            self.shuffled_counts += (counted + text_counts).to(device)

    def compute(self) -> dict[str, Tensor]:
        """``R``, ``ratio_of_means`` and ``counts`` of every feature, with the sums they are computed from."""
        sums = {name: getattr(self, name).reshape(-1).clone() for name in (*_SUMS, *_COUNTS, "n_pairs")}
        means = divide(self.image_sum, self.image_sum + self.text_sum)
        return {"R": divide(self.ratio_sum, self.counts), "ratio_of_means": means, **sums}

    def result(self) -> MDSResult:
        """The :class:`~mmhooks.analysis.measures.mds.MDSResult`, groups included, of everything added so far."""
        # Through compute(), where torchmetrics sums over processes.
        return result_of(self, {name: torch.atleast_1d(value) for name, value in self.compute().items()})


def divide(a: Float[Tensor, " n"], b: Shaped[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Computes ``a / b``, NaN where ``b`` is 0."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1), torch.nan)


def activation(z: Float[Tensor, "b n"], kind: Kind) -> Float[Tensor, "b n"]:
    """The activation that is compared between modalities, at least in float32: ReLU(z), its absolute value, or z itself."""
    z = z.detach()
    z = z if z.dtype == torch.float64 else z.float()
    return z.relu() if kind == "relu" else z.abs() if kind == "abs" else z


def _ratio(a_i: Tensor, a_t: Tensor) -> tuple[Tensor, Tensor]:
    # The paper's own form has signed activations, whose ratio is heavy-tailed; nothing is clipped.
    total = a_i + a_t
    counted = total != 0
    return torch.where(counted, a_i / torch.where(counted, total, 1), 0), counted


def activated_rows(batch: SparseRows, kind: Kind) -> SparseRows:
    """:func:`activation` of sparse rows, which stay sparse."""
    return SparseRows(activation(batch.values, kind), batch.indices.long(), batch.n_features)


def _sparse_ratio(image: SparseRows, text: SparseRows) -> tuple[Tensor, Tensor, Tensor]:
    """Sums ``a_I / (a_I + a_T)`` and its square, and counts the pairs beyond those where the text fires.

    Where only the text fires the ratio is 0, so only the image's entries are visited, each with the text's
    activation of the same pair and feature.
    """
    n = image.n_features
    text_values = _at(image.indices, text)
    active, total = image.active, image.values + text_values
    counted = active & (total != 0)
    ratio = torch.where(counted, image.values / torch.where(counted, total, 1), 0)
    # A pair where both fire is already counted with the text's; with signed values their sum may be 0.
    extra = counted.double() - (active & (text_values != 0)).double()
    return (
        sums(image.indices, ratio, n),
        sums(image.indices, ratio.square(), n),
        sums(image.indices, extra, n).round().long(),
    )


def _at(indices: Tensor, batch: SparseRows) -> Tensor:
    """Reads the activations of ``batch`` at the features ``indices[i]`` of each row i."""
    size = max(1, CACHE_BYTES // (4 * batch.n_features))
    table = batch.values.new_zeros(min(size, len(batch)), batch.n_features)
    found = torch.empty(indices.shape, dtype=batch.values.dtype, device=batch.values.device)
    for begin in range(0, len(batch), size):
        rows = slice(begin, begin + size)
        part = table[: len(batch.values[rows])]
        part.scatter_add_(1, batch.indices[rows], batch.values[rows])
        torch.gather(part, 1, indices[rows], out=found[rows])
        part.scatter_(1, batch.indices[rows], 0.0)
    return found


def _sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64)


def _count(x: Tensor) -> Tensor:
    return x.float().sum(0).long()  # exact below 2^24 rows, and runs are far shorter


def _no_fixed_point(n: int, generator: torch.Generator) -> Tensor:
    """Draws a random cyclic order, in which no text keeps its own image; a permutation keeps one pair on average."""
    order = torch.randperm(n, generator=generator)
    shuffled = torch.empty_like(order)
    shuffled[order] = order.roll(1)
    return shuffled
