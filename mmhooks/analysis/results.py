"""What all results share: a table of rows that prints as Markdown, and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmhooks.hooks.features import FeatureSet
from mmhooks.utils.escape import markdown


class Table(list[dict[str, Any]]):
    """Rows as dicts with the same keys.

    >>> print(Table([{"group": "ImgD", "size": 3}]).markdown())
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
    """Base of the frozen results: :meth:`save` writes every field as JSON, NaN as ``null``."""

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def save(self, path: str | Path) -> Path:
        """Writes the result as JSON and returns the path."""
        path = Path(path)
        content = {"kind": type(self).__name__, **self.to_json()}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path


def plain(value: Any) -> Any:
    """``value`` in JSON's words."""
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
    """Pearson's r over the entries known in both; NaN where fewer than three are, or one side is constant."""
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
