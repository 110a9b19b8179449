"""Figures of a modality study. Each function takes numbers and images and returns a matplotlib ``Figure``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch
from mmhooks.report.numbers import fixed
from mmhooks.report.style import LIGHT, Palette
from mmhooks.utils.escape import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

GROUPS = ("ImgD", "CrossD", "TextD")


@dataclass(frozen=True)
class Histogram:
    """One panel of Figure 1: the scores of a model's alive features and the thresholds of its groups."""

    title: str
    scores: Sequence[float]
    mu: float
    sigma: float
    sizes: Mapping[str, int]
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """One row of an image figure: a feature, its top images and its top texts."""

    title: str
    group: str
    images: Sequence[Image]
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Effect:
    """The change that an edit caused, with that of random sets of the same size."""

    label: str
    group: str
    value: float
    random: Sequence[float]
    size: int = 0


@dataclass(frozen=True)
class Scatter:
    """One panel of a scatter plot: per feature its score, its lift, its group, and whether it is filled and ringed."""

    title: str
    scores: Sequence[float | None]
    lift: Sequence[float | None]
    groups: Sequence[str]
    filled: Sequence[bool]
    ringed: Sequence[bool]


def mds_histograms(panels: Sequence[Histogram], palette: Palette = LIGHT) -> Figure:
    """Draws Figure 1: one histogram per model on a shared axis from 0 (text only) to 1 (image only)."""
    from matplotlib.figure import Figure

    if not panels:
        raise ShapeMismatch("expected at least one panel, got none: there is no histogram to draw")
    figure = Figure(figsize=(max(4.8, 3.1 * len(panels) + 0.4), 3.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _histogram(axis, panel, palette)
    axes[0].set_ylabel("features")
    label = "Modality Dominance Score      0 = text only, 1 = image only"
    figure.supxlabel(label, fontsize=10, color=palette.soft)
    return figure


def _histogram(axis: Axes, panel: Histogram, palette: Palette) -> None:
    scores = np.asarray([s for s in panel.scores if s == s], dtype=float)
    low, high = panel.mu - panel.sigma, panel.mu + panel.sigma
    # Narrow distributions need narrow bins: a raw CLIP's scores all lie within a few hundredths of one half.
    width = float(np.clip(panel.sigma / 6, 0.004, 0.025))
    edges = np.arange(0, 1 + width, width)
    parts = [scores[scores > high], scores[(scores >= low) & (scores <= high)], scores[scores < low]]
    axis.hist(parts, bins=edges.tolist(), stacked=True, color=[palette.group(g) for g in GROUPS], linewidth=0)
    for at in (low, high):
        axis.axvline(at, color=palette.soft, linewidth=0.8, linestyle=(0, (3, 3)))
    axis.axvline(panel.mu, color=palette.ink, linewidth=1.0)
    axis.set(xlim=(0, 1), xticks=(0, 0.25, 0.5, 0.75, 1), xticklabels=("0", ".25", ".5", ".75", "1"))
    axis.set_title(one_line(panel.title), pad=30, parse_math=False)
    line = f"μ {fixed(panel.mu)}   σ {fixed(panel.sigma)}" + (
        f"   {one_line(panel.note)}" if panel.note else ""
    )
    # Offsets in points: the lines keep their distance whatever the height of the panel.
    place: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 9.5}
    axis.annotate(line, (0, 1), (0, 17), color=palette.soft, parse_math=False, **place)
    at = 0.0
    for group in ("TextD", "CrossD", "ImgD"):
        label = f"{group} {panel.sizes.get(group, 0)}"
        axis.annotate(label, (at, 1), (0, 4), color=palette.group(group), fontweight="bold", **place)
        at += 0.034 * len(label) + 0.05
    axis.tick_params(length=3)


def image_strips(strips: Sequence[Strip], palette: Palette = LIGHT, *, columns: int = 8) -> Figure:
    """Draws Figures 2-4: per feature a row of its top images, with its top texts (Tables 3-5) to the right."""
    from matplotlib.figure import Figure

    if not strips:
        raise ShapeMismatch("expected at least one strip, got none: there is no feature to draw")
    side, wide = 0.92, 4.3
    figure = Figure(figsize=(columns * side + wide, len(strips) * (side + 0.42) + 0.1))
    total_w, total_h = figure.get_size_inches()
    for row, strip in enumerate(strips):
        top = total_h - 0.05 - row * (side + 0.42)
        figure.text(
            0.1 / total_w, (top - 0.2) / total_h, one_line(strip.title), fontsize=11, fontweight="bold",
            color=palette.group(strip.group), parse_math=False,
        )  # fmt: skip
        for column, image in enumerate(list(strip.images)[:columns]):
            box = (0.1 + column * side, top - 0.3 - side, side - 0.07, side - 0.07)
            axis = figure.add_axes((box[0] / total_w, box[1] / total_h, box[2] / total_w, box[3] / total_h))
            axis.imshow(np.asarray(image.convert("RGB")), interpolation="lanczos")
            axis.set(xticks=(), yticks=())
            for spine in axis.spines.values():
                spine.set(visible=True, color=palette.line, linewidth=0.8)
        if not strip.images:
            figure.text(0.1 / total_w, (top - 0.75) / total_h, "no active image", color=palette.soft)
        lines = [shorten(t, 46) for t in list(strip.texts)[:5]] or ["no active text"]
        figure.text(
            (columns * side + 0.3) / total_w, (top - 0.3) / total_h, "\n".join(lines), fontsize=10,
            linespacing=1.42, va="top", color=palette.ink if strip.texts else palette.soft, parse_math=False,
        )  # fmt: skip
    return figure


def summary(
    panel: Histogram, strips: Sequence[Strip], palette: Palette = LIGHT, *, columns: int = 6
) -> Figure:
    """Draws the result in one figure: the scores of one model, with one feature per group beside them."""
    from matplotlib.figure import Figure

    if not strips:
        raise ShapeMismatch("expected at least one strip, got none: there is no feature to draw")
    side, left, texts = 0.78, 4.1, 2.5
    height = max(len(strips) * (side + 0.42) + 0.15, 3.2)
    width = left + columns * side + texts
    figure = Figure(figsize=(width, height))
    _histogram(
        figure.add_axes((0.5 / width, 0.55 / height, 3.2 / width, (height - 1.3) / height)), panel, palette
    )
    figure.axes[0].set_xlabel("Modality Dominance Score: 0 = text only, 1 = image only", fontsize=9.5)
    for row, strip in enumerate(strips):
        top = height - 0.1 - row * (side + 0.42)
        figure.text(
            left / width, (top - 0.2) / height, one_line(strip.title), fontsize=10.5, fontweight="bold",
            color=palette.group(strip.group), parse_math=False,
        )  # fmt: skip
        for column, image in enumerate(list(strip.images)[:columns]):
            x, y = left + column * side, top - 0.3 - side
            axis = figure.add_axes((x / width, y / height, (side - 0.06) / width, (side - 0.06) / height))
            axis.imshow(np.asarray(image.convert("RGB")), interpolation="lanczos")
            axis.set_axis_off()
        lines = [shorten(t, 28) for t in list(strip.texts)[:4]] or ["no active text"]
        figure.text(
            (left + columns * side + 0.15) / width, (top - 0.3) / height, "\n".join(lines), fontsize=9.5,
            linespacing=1.4, va="top", color=palette.ink if strip.texts else palette.soft, parse_math=False,
        )  # fmt: skip
    return figure


def mask_effects(
    panels: Mapping[str, Sequence[Effect]], palette: Palette = LIGHT, *, label: str = "change of R@1, points"
) -> Figure:
    """Plots the effect of masking each group (dot) over that of equally many random features (grey ticks and band)."""
    from matplotlib.figure import Figure

    if not panels:
        raise ShapeMismatch("expected at least one model, got none: there is no effect to draw")
    rows = max(len(v) for v in panels.values())
    figure = Figure(figsize=(3.1 * len(panels) + 0.6, 0.55 * rows + 1.25), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axis, (title, effects)) in enumerate(zip(axes, panels.items(), strict=True)):
        axis.axvline(0, color=palette.line, linewidth=1)
        for y, effect in enumerate(effects):
            draws = 100 * np.asarray(effect.random, dtype=float)
            if draws.size:
                low, high = np.quantile(draws, (0.025, 0.975))
                axis.fill_betweenx((y - 0.26, y + 0.26), low, high, color=palette.cross, alpha=0.28, lw=0)
                axis.plot(draws, np.full(draws.size, y), "|", color=palette.soft, markersize=9, alpha=0.35)
            axis.plot(100 * effect.value, y, "o", color=palette.group(effect.group), markersize=8, zorder=3)
        axis.set_title(one_line(title), parse_math=False)
        axis.set(ylim=(len(effects) - 0.5, -0.5), yticks=range(len(effects)))
        axis.set_yticklabels([f"{one_line(e.label)} ({e.size})" for e in effects], parse_math=False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        if i == 0:
            axis.set_xlabel(label)
    return figure


def score_scatter(panels: Sequence[Scatter], palette: Palette = LIGHT) -> Figure:
    """Plots the lift of every feature on pairs over its Modality Dominance Score, coloured by group."""
    from matplotlib.figure import Figure

    if not panels:
        raise ShapeMismatch("expected at least one panel, got none: there is nothing to plot")
    figure = Figure(figsize=(3.6 * len(panels) + 0.6, 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(1, color=palette.line, linewidth=1)
        known = [
            (score, max(lift, 0.1), group, filled, ringed)  # never together: drawn at the bottom
            for score, lift, group, filled, ringed in zip(
                panel.scores, panel.lift, panel.groups, panel.filled, panel.ringed, strict=True
            )
            if score is not None and lift is not None and group
        ]
        for name, fill in itertools.product(GROUPS, (False, True)):
            colour, chosen = palette.group(name), [k[:2] for k in known if k[2] == name and k[3] == fill]
            x, y = zip(*chosen, strict=True) if chosen else ((), ())
            axis.scatter(x, y, s=14, edgecolors=colour, facecolors=colour if fill else "none", alpha=0.7)
        rings = [k[:2] for k in known if k[4]]
        x, y = zip(*rings, strict=True) if rings else ((), ())
        axis.scatter(x, y, s=70, edgecolors=palette.text, facecolors="none")
        axis.set(xlim=(-0.03, 1.03), yscale="log")
        axis.set_title(one_line(panel.title), parse_math=False)
        axis.set_xlabel("Modality Dominance Score")
    axes[0].set_ylabel("lift on pairs")
    return figure


def beside_paper(
    panels: Mapping[str, Sequence[tuple[str, Estimate, float | None]]], palette: Palette = LIGHT
) -> Figure:
    """Plots measured values with their intervals (filled) and the paper's values (hollow), one panel per measure."""
    from matplotlib.figure import Figure

    if not panels:
        raise ShapeMismatch("expected at least one panel, got none: there is no measure to draw")
    rows = max(len(v) for v in panels.values())
    figure = Figure(figsize=(3.3 * len(panels) + 0.8, 0.5 * rows + 1.3), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axis, (title, entries)) in enumerate(zip(axes, panels.items(), strict=True)):
        axis.axvline(0, color=palette.line, linewidth=1)
        for y, (_, estimate, paper) in enumerate(entries):
            if estimate.has_interval:
                axis.plot((estimate.low, estimate.high), (y, y), color=palette.text, linewidth=2, alpha=0.6)
            axis.plot(estimate.value, y, "o", color=palette.text, markersize=7)
            if paper is not None:
                axis.plot(paper, y, "D", markerfacecolor="none", markeredgecolor=palette.img, markersize=6.5)
        axis.set_title(one_line(title), parse_math=False)
        axis.set(ylim=(len(entries) - 0.5, -0.5), yticks=range(len(entries)))
        axis.set_yticklabels([one_line(name) if i == 0 else "" for name, _, _ in entries], parse_math=False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    marks = "●  measured, 95 % interval       ◇  paper"
    figure.supxlabel(marks, fontsize=10, color=palette.soft)
    return figure


def shorten(text: str, width: int) -> str:
    """Shortens ``text`` to one line of at most ``width`` characters.

    >>> shorten("a  long\\nline", 6)
    'a lon…'
    """
    flat = one_line(text)
    return flat if len(flat) <= width else flat[: width - 1].rstrip() + "…"
