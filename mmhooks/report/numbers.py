"""Number formatting: a true minus sign, no zero before the decimal point, a dash for unknown values."""

from __future__ import annotations

import math

from mmhooks.analysis.results import Estimate

MISSING = "–"
MINUS = "−"


def fixed(x: float | None, digits: int = 3, *, plus: bool = False) -> str:
    """Formats a number with ``digits`` decimals; ``None`` and NaN become a dash.

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
    """:func:`fixed` with a plus sign before positive numbers."""
    return fixed(x, digits, plus=True)


def percent(x: float | None, digits: int = 1, *, plus: bool = False) -> str:
    """Formats a share as a percentage, without the percent sign.

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
    """Formats an interval as ``"[.1, .3]"``; empty if the estimate has none.

    >>> interval(Estimate(0.2, 0.1, 0.3), 1), interval(Estimate(0.2))
    ('[.1, .3]', '')
    """
    if not estimate.has_interval:
        return ""
    return f"[{fixed(estimate.low, digits)}, {fixed(estimate.high, digits)}]"
