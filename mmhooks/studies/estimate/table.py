"""The table of an estimate: operations, hours and gigabytes of each stage, and of the whole study."""

from __future__ import annotations

from collections.abc import Sequence

from mmhooks.report import Table
from mmhooks.studies.estimate.stages import GB, Assumption, Machine, Stage

NOT_COUNTED = (
    "Not in these numbers: reading, decoding and resizing images, tokenisation, rankings, masks of stored latents, "
    "resampling and all other statistics (on the CPU), loading weights, an endpoint's answers, figures."
)


def estimate_table(study: str, stages: Sequence[Stage], machine: Machine, assumed: Assumption) -> Table:
    """Returns a row a stage: how many, PFLOP, hours with their range, what limits it, and bytes in memory and on disk."""
    low, high = assumed.at(assumed.high), assumed.at(assumed.low)
    rows = [
        [
            s.name,
            f"{s.count:,} {s.unit}" + (f" × {s.repeat}" if s.repeat > 1 else ""),
            s.dtype,
            number(s.flops / 1e15),
            hours(s.seconds(machine, assumed)),
            f"{hours(s.seconds(machine, low))}–{hours(s.seconds(machine, high))}",
            s.bound(machine, assumed),
            number(s.cost.weights / GB),
            number((s.cost.memory - s.cost.weights) / GB),
            number(s.disk / GB) if s.disk else "",
        ]
        for s in stages
    ]
    total = [sum(s.seconds(machine, a) for s in stages) for a in (assumed, low, high)]
    rows.append(
        [
            "all", "", "", number(sum(s.flops for s in stages) / 1e15), hours(total[0]),
            f"{hours(total[1])}–{hours(total[2])}", "", "", number(max(s.cost.memory for s in stages) / GB),
            number(sum(s.disk for s in stages) / GB),
        ]
    )  # fmt: skip
    return Table(
        ["Stage", "how many", "type", "PFLOP", "hours", "range", "limit", "weights, GB", "activations, GB", "disk, GB"],
        rows,
        f"{study} on one {machine.name}",
        f"Hours at {100 * assumed.utilisation:.0f} % of the peaks of arithmetic and memory (range: "
        f"{100 * assumed.high:.0f} % to {100 * assumed.low:.0f} %), {1e6 * assumed.launch:g} µs an operator; the longest "
        "limit counts. Activations without fused attention, an upper bound, caches of keys and values included; in the "
        f"last row the largest sum of weights and activations, of {machine.memory / GB:.0f} GB. {NOT_COUNTED}",
        text_columns=(0, 1, 2, 6),
    )  # fmt: skip


def hours(seconds: float) -> str:
    """
    >>> hours(36), hours(7200), hours(0.4)
    ('0.01', '2', '0.00011')
    """
    return number(seconds / 3600)


def number(value: float) -> str:
    """
    >>> number(0.0), number(0.01234), number(12.34), number(1234.5)
    ('0', '0.012', '12', '1,234')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{float(f'{value:.2g}'):.10f}".rstrip("0").rstrip(".")
