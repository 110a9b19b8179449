"""Intervals over samples for any streaming measure: copies of its metric that share out the batches.

A metric keeps sums, so single samples cannot be resampled afterwards. A fixed number of copies, each fed every
J-th batch, costs the same time as one and J times its states; leaving out one copy at a time gives the
delete-a-group jackknife of whatever the metric computes. Groups are of whole batches: where neighbouring
rows of a store are alike, the interval is as wide as that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torchmetrics import Metric

from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch

M = TypeVar("M", bound=Metric)
GROUPS = 20


class Grouped(Generic[M]):
    """``groups`` copies of the metric that ``make`` builds (it is passed torchmetrics' own options).

    >>> from torchmetrics import MeanMetric
    >>> parts = Grouped(MeanMetric, groups=3)
    >>> for i in range(6): parts.update(float(i), number=i)
    >>> float(parts.whole().compute())
    2.5
    """

    def __init__(self, make: Callable[..., M], groups: int = GROUPS) -> None:
        if groups < 2:
            raise ShapeMismatch(f"a jackknife needs at least 2 groups, came {groups}")
        self._make = make
        self.parts: list[M] = [make() for _ in range(groups)]
        self._reduced: list[M] | None = None

    def update(self, *args: Any, number: int, **kwargs: Any) -> None:
        """Adds batch ``number`` of the stream, which says whose it is whatever process meets it."""
        self._reduced = None
        self.parts[number % len(self.parts)].update(*args, **kwargs)

    def whole(self) -> M:
        """The metric of all batches, of all processes."""
        return self._merged(self._everywhere())

    def estimate(self, statistic: Callable[[M], float], n: int, *, level: float = 0.95) -> Estimate:
        """``statistic`` of the whole, with its jackknife interval (Student's t over the groups that hold data)."""
        return self.estimates(lambda metric: [statistic(metric)], n, level=level)[0]

    def estimates(
        self, statistics: Callable[[M], Sequence[float]], n: int, *, level: float = 0.95
    ) -> list[Estimate]:
        """As :meth:`estimate`, several statistics in one go."""
        from scipy.stats import t

        parts = [p for p in self._everywhere() if p.update_called]
        values = statistics(self._merged(parts))
        if len(parts) < 2:
            return [Estimate(float(v), math.nan, math.nan, n, level) for v in values]
        without = torch.tensor(
            [statistics(self._merged(parts[:j] + parts[j + 1 :])) for j in range(len(parts))],
            dtype=torch.float64,
        )
        groups = len(parts)
        error = ((groups - 1) / groups * (without - without.mean(0)).square().sum(0)).sqrt()
        half = (float(t.ppf(0.5 + level / 2, groups - 1)) * error).tolist()
        return [Estimate(float(v), v - h, v + h, n, level) for v, h in zip(values, half, strict=True)]

    def _everywhere(self) -> list[M]:
        """The parts, added up over processes; in every process alike."""
        if self._reduced is None:
            self._reduced = [self._copy(part) for part in self.parts]
        return self._reduced

    def _copy(self, part: M) -> M:
        seen = torch.tensor(int(part.update_called))
        with part.sync_context():
            state = dict(part.metric_state)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        return self._with([state] if int(seen) else [])

    def _merged(self, parts: Sequence[M]) -> M:
        return self._with([part.metric_state for part in parts if part.update_called])

    def _with(self, states: Sequence[Mapping[str, Any]]) -> M:
        whole = self._make(sync_on_compute=False)
        for state in states:
            whole.merge_state(dict(state))
            whole._update_count += 1  # merge_state leaves it, and compute() would warn that nothing came
        return whole
