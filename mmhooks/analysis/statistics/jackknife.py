"""Delete-a-group jackknife: intervals over samples for any streaming metric.

A metric keeps sums, so single samples cannot be resampled afterwards. J copies of the metric, each fed every J-th
batch, cost the time of one and J times its memory; leaving out one copy at a time gives the delete-a-group
jackknife of any number the metric computes. Groups consist of whole batches, so the interval is wider where
neighbouring rows of a store are similar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch

M = TypeVar("M", bound=Metric)
GROUPS = 20


def jackknife_error(left_out: Float[Tensor, "groups k"]) -> Float[Tensor, " k"]:
    """Computes the standard error of k statistics from their values with each group left out (delete-a-group jackknife).

    >>> jackknife_error(torch.tensor([[1.0], [3.0]], dtype=torch.float64)).item()  # of a mean of 2 numbers, 1 apart
    1.0
    """
    groups = len(left_out)
    return ((groups - 1) / groups * (left_out - left_out.mean(0)).square().sum(0)).sqrt()


class JackknifeGroups(Generic[M]):
    """``groups`` copies of the metric that ``make`` builds; ``make`` gets torchmetrics' own options.

    >>> from torchmetrics import MeanMetric
    >>> parts = JackknifeGroups(MeanMetric, groups=3)
    >>> for i in range(6): parts.update(float(i), number=i)
    >>> float(parts.merged().compute())
    2.5
    """

    def __init__(self, make: Callable[..., M], groups: int = GROUPS) -> None:
        if groups < 2:
            raise ShapeMismatch(f"a jackknife: expected at least 2 groups, got {groups}")
        self._make = make
        self.parts: list[M] = [make() for _ in range(groups)]
        self._reduced: list[M] | None = None
        self._left_out: list[M] | None = None

    def update(self, *args: Any, number: int, **kwargs: Any) -> None:
        """Adds batch ``number`` of the stream; the number decides its group, in whichever process it is read."""
        self._reduced = self._left_out = None
        self.parts[number % len(self.parts)].update(*args, **kwargs)

    def merged(self) -> M:
        """Merges the metric over all batches and all processes."""
        return self._merge(self._over_processes())

    def left_out(self) -> list[M]:
        """Merges the metric over all groups but one, for each group that holds data in turn."""
        parts = [p for p in self._over_processes() if p.update_called]
        if self._left_out is None:
            # All groups before j and all after it are merged step by step: 3 merges per group instead of one for each other.
            before, after = [self._merge([])], [self._merge([])]
            for part in parts[:-1]:
                before.append(self._merge([before[-1], part]))
            for part in parts[:0:-1]:
                after.append(self._merge([part, after[-1]]))
            self._left_out = [self._merge([a, b]) for a, b in zip(before, reversed(after), strict=True)]
        return self._left_out

    def estimate(self, statistic: Callable[[M], float], n: int, *, level: float = 0.95) -> Estimate:
        """Computes ``statistic`` of all data with its jackknife interval (Student's t over the groups that hold data)."""
        return self.estimates(lambda metric: [statistic(metric)], n, level=level)[0]

    def estimates(
        self, statistics: Callable[[M], Sequence[float]], n: int, *, level: float = 0.95
    ) -> list[Estimate]:
        """Computes several statistics at once, as :meth:`estimate` does one."""
        from scipy.stats import t

        parts = [p for p in self._over_processes() if p.update_called]
        values = statistics(self._merge(parts))
        if len(parts) < 2:
            return [Estimate(float(v), math.nan, math.nan, n, level) for v in values]
        without = torch.tensor(
            [statistics(rest) for rest in self.left_out()],
            dtype=torch.float64,
        )
        groups = len(parts)
        half = (float(t.ppf(0.5 + level / 2, groups - 1)) * jackknife_error(without)).tolist()
        return [Estimate(float(v), v - h, v + h, n, level) for v, h in zip(values, half, strict=True)]

    def _over_processes(self) -> list[M]:
        """The parts summed over processes, identical in every process."""
        if self._reduced is None:
            self._reduced = [self._reduce(part) for part in self.parts]
        return self._reduced

    def _reduce(self, part: M) -> M:
        seen = torch.tensor(int(part.update_called))
        with part.sync_context():
            state = dict(part.metric_state)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        return self._from_states([state] if int(seen) else [])

    def _merge(self, parts: Sequence[M]) -> M:
        return self._from_states([part.metric_state for part in parts if part.update_called])

    def _from_states(self, states: Sequence[Mapping[str, Any]]) -> M:
        whole = self._make(sync_on_compute=False)
        for state in states:
            whole.merge_state(dict(state))
            whole._update_count += 1  # merge_state does not, and compute() would warn
        return whole
