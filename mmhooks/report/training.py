"""Figures of training: the curves of one run, and L0 against unexplained variance for the heads of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmhooks.errors import ShapeMismatch
from mmhooks.report.style import LIGHT, Palette
from mmhooks.utils.escape import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"


def sweep_figure(rows: Sequence[Mapping[str, Any]], palette: Palette = LIGHT) -> Figure:
    """Plots L0 against held-out FVU, against the spread of the MDS, and against EmbedSim.

    Args:
        rows: ``SweepResult.rows``. One marker shape per variant, larger for wider heads; a line joins the Pareto front.

    >>> row = {"variant": "topk", "n": 64, "K": 4, "seed": 0, "L0": 4.0, "FVU": 0.2, "pareto": True,
    ...        "MDS sigma": 0.1, "EmbedSim image": 0.3, "EmbedSim text": 0.1}
    >>> [axis.get_xlabel() for axis in sweep_figure([row]).axes]
    ['L0', 'L0', 'L0']
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ShapeMismatch("expected at least one row, got none: there is no run to draw")
    figure = Figure(figsize=(11.5, 3.6), layout="constrained")
    fvu, spread, similarity = figure.subplots(1, 3)
    kinds = sorted({(row["variant"], row["n"]) for row in rows})
    variants = sorted({variant for variant, _ in kinds})
    widths = sorted({width for _, width in kinds})
    for variant, width in kinds:
        chosen = [row for row in rows if (row["variant"], row["n"]) == (variant, width)]
        l0 = [row["L0"] for row in chosen]
        look: Any = {
            "marker": MARKERS[variants.index(variant) % len(MARKERS)],
            "s": 24 + 26 * widths.index(width),
            "alpha": 0.8,
            "linewidths": 0,
        }
        fvu.scatter(
            l0,
            [r["FVU"] for r in chosen],
            color=palette.text,
            label=f"{one_line(variant)}, n = {width:,}",
            **look,
        )
        spread.scatter(l0, [r["MDS sigma"] for r in chosen], color=palette.text, **look)
        similarity.scatter(l0, [r["EmbedSim image"] for r in chosen], color=palette.img, **look)
        similarity.scatter(l0, [r["EmbedSim text"] for r in chosen], color=palette.text, **look)
    front = sorted((row["L0"], row["FVU"]) for row in rows if row["pareto"])
    fvu.plot(*zip(*front, strict=True), color=palette.soft, linewidth=0.9, zorder=0)
    for axis, name in ((fvu, "held-out FVU"), (spread, "MDS σ"), (similarity, "EmbedSim")):
        axis.set_xlabel("L0")
        axis.set_ylabel(name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    fvu.set_ylim(bottom=0)
    fvu.legend(fontsize=8.5)
    for name, colour in (("image", palette.img), ("text", palette.text)):
        similarity.scatter([], [], color=colour, label=name)
    similarity.legend(fontsize=8.5)
    return figure


def training_figure(history: Sequence[Mapping[str, float]], palette: Palette = LIGHT) -> Figure:
    """Plots a training history by epoch: errors, active features, features that did not fire.

    >>> [axis.get_ylabel() for axis in training_figure([{"epoch": 1.0, "loss": 0.5, "l0": 4.0, "silent": 0.1}]).axes]
    ['loss', 'L0', 'silent for an epoch']
    """
    from matplotlib.figure import Figure

    if not history:
        raise ShapeMismatch("expected at least one row of history, got none: there is no epoch to draw")
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    colours = {"image": palette.img, "text": palette.text}
    loss, l0, silent = figure.subplots(1, 3)
    for name in [n for n in history[0] if n in ("loss", "fvu") or n.startswith("valid_fvu")]:
        colour = colours.get(name.rsplit("_", 1)[-1], palette.soft)
        style = {"linestyle": "-" if name != "fvu" else ":", "color": colour}
        loss.plot(
            epochs,
            [row.get(name, float("nan")) for row in history],
            label=one_line(name.replace("_", " ")),
            **style,
        )
    loss.set_yscale("log")
    loss.legend(fontsize=8.5)
    for axis, name in ((l0, "l0"), (silent, "silent")):
        axis.plot(epochs, [row.get(name, float("nan")) for row in history], color=palette.ink)
        axis.set_ylim(bottom=0)
    for axis, name in ((loss, "loss"), (l0, "L0"), (silent, "silent for an epoch")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
    return figure
