"""How numbers are written: a true minus sign, no zero before the point, a dash for what is not known."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

MISSING = "–"
MINUS = "−"

Side = Literal["above", "below", "undecided"]


def _known(x: float | None) -> bool:
    return x is not None and not math.isnan(x)


def fixed(x: float | None, digits: int = 3, *, plus: bool = False) -> str:
    """A number with a fixed count of digits; ``None`` and NaN become a dash.

    >>> fixed(0.1234), fixed(-1.5, 1), fixed(None), fixed(float("nan")), fixed(0.5, 2, plus=True)
    ('.123', '−1.5', '–', '–', '+.50')
    """
    if x is None or math.isnan(x):
        return MISSING
    if math.isinf(x):
        return "∞" if x > 0 else f"{MINUS}∞"
    body = f"{abs(x):.{digits}f}"
    if digits and body.startswith("0."):
        body = body[1:]
    zero = not body.strip("0.")  # a rounded zero carries no sign
    sign = "" if zero else (MINUS if x < 0 else ("+" if plus else ""))
    return sign + body


def signed(x: float | None, digits: int = 3) -> str:
    """:func:`fixed` with a plus before what is positive."""
    return fixed(x, digits, plus=True)


def percent(x: float | None, digits: int = 1, *, plus: bool = False) -> str:
    """A share as a percentage, without its sign.

    >>> percent(0.1234), percent(-0.02, plus=True)
    ('12.3', '−2.0')
    """
    if x is None or not _known(x):
        return MISSING
    body = f"{abs(100 * x):.{digits}f}"
    zero = not body.strip("0.")
    sign = "" if zero else (MINUS if x < 0 else ("+" if plus else ""))
    return sign + body


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (95 % unless told otherwise) and the count it rests on."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int | None = None
    unit: str = ""

    @property
    def known(self) -> bool:
        return _known(self.value)

    def side(self, of: float = 0.0) -> Side:
        """On which side of ``of`` the whole interval lies; ``"undecided"`` where it contains it.

        >>> Estimate(.2, .1, .3).side(), Estimate(.2, -.1, .3).side()
        ('above', 'undecided')
        """
        if not (_known(self.low) and _known(self.high)):
            return "undecided"
        if self.low > of:
            return "above"
        return "below" if self.high < of else "undecided"

    def text(self, digits: int = 3, *, plus: bool = False) -> str:
        return fixed(self.value, digits, plus=plus)

    def interval(self, digits: int = 3) -> str:
        """``"[.1, .3]"``, or nothing where there is none."""
        if not (_known(self.low) and _known(self.high)):
            return ""
        return f"[{fixed(self.low, digits)}, {fixed(self.high, digits)}]"

    @classmethod
    def of(cls, other: Any) -> Estimate:
        """From anything with ``value``, ``low``, ``high`` and ``n``: the measures' own estimates."""
        return cls(float(other.value), float(other.low), float(other.high), int(other.n))

    def to_json(self) -> dict[str, Any]:
        """JSON without NaN: what is not known is ``null``."""
        return {
            k: (None if isinstance(v, float) and not math.isfinite(v) else v)
            for k, v in asdict(self).items()
            if k != "unit" or v
        }

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Estimate:
        """The inverse of :meth:`to_json`."""
        numbers = {k: (math.nan if d.get(k) is None else d[k]) for k in ("value", "low", "high")}
        return cls(**numbers, n=d.get("n"), unit=d.get("unit", ""))
