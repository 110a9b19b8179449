"""How numbers are written: a true minus sign, no zero before the point, a dash for what is not known."""

from __future__ import annotations

import math

from mmhooks.analysis.results import Estimate

MISSING = "–"
MINUS = "−"


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
    if x is None or math.isnan(x):
        return MISSING
    body = f"{abs(100 * x):.{digits}f}"
    zero = not body.strip("0.")
    sign = "" if zero else (MINUS if x < 0 else ("+" if plus else ""))
    return sign + body


def interval(estimate: Estimate, digits: int = 3) -> str:
    """``"[.1, .3]"``, or nothing where there is none.

    >>> interval(Estimate(0.2, 0.1, 0.3), 1), interval(Estimate(0.2))
    ('[.1, .3]', '')
    """
    if not estimate.has_interval:
        return ""
    return f"[{fixed(estimate.low, digits)}, {fixed(estimate.high, digits)}]"
