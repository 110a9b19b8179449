"""Base classes of results: estimates with intervals, tables that print as Markdown, and saving as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmhooks.hooks.features import FeatureSet
from mmhooks.utils.escape import markdown
from mmhooks.utils.files import write_text

Side = Literal["above", "below", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A number, its interval, and the number of features or samples it is computed from.

    ``low`` and ``high`` are NaN if there is no interval (n < 2); ``n`` is None if the count is unknown.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int | None = None
    level: float = 0.95

    @property
    def known(self) -> bool:
        return not math.isnan(self.value)

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    def side(self, of: float = 0.0) -> Side:
        """Says on which side of ``of`` the whole interval lies; ``"undecided"`` if it contains ``of``.

        >>> Estimate(.2, .1, .3).side(), Estimate(.2, -.1, .3).side()
        ('above', 'undecided')
        """
        if not self.has_interval:
            return "undecided"
        if self.low > of:
            return "above"
        return "below" if self.high < of else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values; NaN becomes ``null``."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> Estimate:
        """The inverse of :meth:`to_json`."""
        numbers = {k: (math.nan if d.get(k) is None else d[k]) for k in ("value", "low", "high")}
        return cls(**numbers, n=d.get("n"), level=d.get("level", 0.95))

    def columns(self, value: str = "value", n: str = "n") -> dict[str, Any]:
        """Returns the columns of a table's row: the value under a name of its own, its interval, and what it counts.

        >>> Estimate(.2, .1, .3, 9).columns("IoU", "images")
        {'IoU': 0.2, 'low': 0.1, 'high': 0.3, 'images': 9}
        """
        return {value: self.value, "low": self.low, "high": self.high, n: self.n}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


class Records(list[dict[str, Any]]):
    """Rows of a table, as dicts with the same keys.

    >>> print(Records([{"group": "ImgD", "size": 3}]).markdown())
    | group | size |
    |:--|:--|
    | ImgD | 3 |
    """

    def markdown(self) -> str:
        if not self:
            return ""
        lines = [self._line(self[0]), "|" + "|".join(":--" for _ in self[0]) + "|"]
        return "\n".join(lines + [self._line([_cell(v) for v in row.values()]) for row in self])

    @staticmethod
    def _line(cells: Any) -> str:
        return "| " + " | ".join(markdown(c) for c in cells) + " |"

    __str__ = markdown


class Result:
    """Base of the frozen result dataclasses: :meth:`save` writes every field as JSON, NaN as ``null``."""

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def save(self, path: str | Path) -> Path:
        """Writes the result as JSON, atomically, and returns the path."""
        content = {"kind": type(self).__name__, **self.to_json()}
        return write_text(path, json.dumps(content, indent=1) + "\n")


def plain(value: Any) -> Any:
    """Converts ``value`` to plain JSON values; NaN and infinity become None."""
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, FeatureSet):
        return {
            "name": value.name,
            "n_features": value.n_features,
            "head": value.head,
            "indices": list(value),
        }
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):  # an Estimate, an Origin
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def correlation(a: Tensor, b: Tensor) -> float:
    """Computes Pearson's r over the entries known in both; NaN if fewer than three are, or one side is constant."""
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < 3:
        return math.nan
    x, y = (v[both].double() - v[both].double().mean() for v in (a, b))
    norm = float(x.norm() * y.norm())
    return float(torch.dot(x, y)) / norm if norm > 1e-12 else math.nan


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "–"
    return str(value)
