"""The learning rate as a share of its peak: a function of the step alone, so that a resumed run needs no state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def share(schedule: Schedule, step: int, total: int, warmup: float, decay: float) -> float:
    """Rises linearly over the first ``warmup`` of ``total`` steps, falls over the last ``decay`` of them.

    "linear" falls in a straight line to zero, "cosine" along half a cosine, "constant" stays up.

    >>> [round(share("linear", step, 10, 0.2, 0.5), 2) for step in (0, 1, 5, 7, 9)]
    [0.5, 1.0, 1.0, 0.6, 0.2]
    >>> round(share("cosine", 5, 10, 0.0, 1.0), 2), share("constant", 9, 10, 0.2, 0.5)
    (0.5, 1.0)
    """
    up = min(1.0, (step + 1) / max(1.0, warmup * total))
    left = min(1.0, (total - step) / max(1.0, decay * total))
    if schedule == "constant":
        return up
    return min(up, left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
