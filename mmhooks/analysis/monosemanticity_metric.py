"""MonoSemanticity in one pass: the scaling to 0..1 is applied to the sums, not to the activations.

With low and high the extremes of a feature over the whole stream, ``s = high - low`` and
``ã = (a - low) / s``, N samples and unit vectors e:

    sum ã e = (sum a e - low sum e) / s
    sum ã   = (sum a - N low) / s
    sum ã²  = (sum a² - 2 low sum a + N low²) / s²

``s`` cancels in ``MS = (|sum ã e|² - sum ã²) / ((sum ã)² - sum ã²)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.checks import chunks, unit_rows
from mmhooks.analysis.entries import Columns, Latents, check_samples, rise
from mmhooks.analysis.intervals import bootstrap
from mmhooks.data.rows import SparseRows

if TYPE_CHECKING:
    from mmhooks.analysis.monosemanticity import MonosemanticityResult


class MonoSemanticity(Metric):
    """The score of every feature: ``update(latents, embeddings)``, then :meth:`result`.

    Equal to :func:`mmhooks.analysis.monosemanticity.monosemanticity` of all samples at once. A sparse batch
    costs its entries times the width of the embeddings; the zeros it leaves out count as the smallest
    activation wherever no entry is negative.

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
            ShapeMismatch: rows or widths that differ. NotFinite: NaN or infinity in either.
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
                self._add_table(rise(part), unit.to(part.device))
        self.n_samples = self.n_samples + len(latents)

    def _add_entries(self, batch: SparseRows, unit: Tensor) -> None:
        columns = Columns.of(batch)
        owner = torch.arange(self.n_features).repeat_interleave(columns.counts)
        values = columns.values.double()
        low, high = columns.extremes()
        quiet = columns.counts < len(batch)  # some sample of the batch is 0
        self._add(
            total=torch.bincount(owner, values, minlength=self.n_features),
            squares=torch.bincount(owner, values.square(), minlength=self.n_features),
            weighted=columns.transposed_times(unit).double(),
            unit_sum=unit.sum(0, dtype=torch.float64),
            unit_squares=unit.double().square().sum(),
            low=torch.where(quiet, low.clamp_max(0), low).double(),
            high=torch.where(quiet, high.clamp_min(0), high).double(),
        )

    def _add_table(self, a: Tensor, unit: Tensor) -> None:
        # In double: a feature that fires for one sample has a weight of 0 to the last digit, or a value made of
        # rounding. Sums of what lies above the batch's own minimum: a large common offset would eat the digits.
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
        """``values``, one a feature (NaN for a constant one), and the sums over all unit vectors."""
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
        from mmhooks.analysis.monosemanticity import MonosemanticityResult

        state = self.compute()
        values = torch.atleast_1d(state["values"].cpu())
        return MonosemanticityResult(values, bootstrap(values, seed=self.seed), int(state["n_samples"]))
