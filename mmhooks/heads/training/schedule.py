"""The learning rate as a fraction of its peak, a function of the step only: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def lr_factor(schedule: Schedule, step: int, total: int, warmup: float, decay: float) -> float:
    """Increases linearly over the first fraction ``warmup`` of ``total`` steps, decreases over the last ``decay``.

    "linear" decreases linearly to zero, "cosine" along half a cosine, "constant" does not decrease.

    >>> [round(lr_factor("linear", step, 10, 0.2, 0.5), 2) for step in (0, 1, 5, 7, 9)]
    [0.5, 1.0, 1.0, 0.6, 0.2]
    >>> round(lr_factor("cosine", 5, 10, 0.0, 1.0), 2), lr_factor("constant", 9, 10, 0.2, 0.5)
    (0.5, 1.0)
    """
    up = min(1.0, (step + 1) / max(1.0, warmup * total))
    left = min(1.0, (total - step) / max(1.0, decay * total))
    if schedule == "constant":
        return up
    return min(up, left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
