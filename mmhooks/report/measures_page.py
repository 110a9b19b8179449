"""Writes all measures of a store: JSON, Markdown and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmhooks.analysis.measures.all_measures import Measures
from mmhooks.analysis.results import Records
from mmhooks.report.figures import GROUPS, Histogram, mds_histograms
from mmhooks.report.numbers import fixed
from mmhooks.report.style import LIGHT, Palette, draw
from mmhooks.utils.escape import markdown as escaped
from mmhooks.utils.escape import one_line
from mmhooks.utils.files import make_folder, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_measures(result: Measures, out: str | Path) -> list[Path]:
    """Writes ``measures.json`` (every number), ``measures.md`` and the figures into the folder ``out``.

    Each file is written atomically. Returns their paths.
    """
    folder = make_folder(out)
    content = json.dumps({"kind": "Measures", **result.to_json()}, indent=1) + "\n"
    paths = [write_text(folder / "measures.json", content)]
    figures = _figures(result)
    for name, (png, _) in figures.items():
        paths.append(write_bytes(folder / name, png))
    captions = {name: caption for name, (_, caption) in figures.items()}
    paths.append(write_text(folder / "measures.md", markdown(result, captions)))
    return paths


def markdown(result: Measures, figures: Mapping[str, str] | None = None) -> str:
    """Formats the tables of ``result``, then the figures (file name to caption); data is escaped."""
    about = {
        "head": result.head,
        "data": result.data,
        "pairs": result.n_pairs,
        **{f"{side} latents from": site for side, site in result.sites.items()},
        **{f"similarity ({side}) by": judge for side, judge in result.judges.items()},
        **result.settings,
    }
    lines = ["# Measures", "", Records({"": k, "value": str(v)} for k, v in about.items()).markdown(), ""]
    for title, table in result.tables().items():
        lines += [f"## {escaped(title)}", "", Records(table).markdown(), ""]
    if figures:
        lines += ["## Figures", ""]
        for name, caption in figures.items():
            lines += [f"![{escaped(caption)}]({name})", "", escaped(caption), ""]
    return "\n".join(lines)


def density_histograms(
    panels: Mapping[str, tuple[Sequence[float], Sequence[int]]], palette: Palette = LIGHT
) -> Figure:
    """Plots how many features fire how often, on a logarithmic axis; one line per side (edges, counts)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    axis: Any = figure.subplots()
    colours = {"image": palette.img, "text": palette.text}
    for side, (edges, counts) in panels.items():
        axis.stairs(counts, edges, color=colours.get(side, palette.cross), linewidth=2, label=side)
    axis.set(xscale="log", xlabel="share of samples that activate a feature", ylabel="features")
    axis.set_title("Density")
    axis.legend()
    return figure


def by_group(
    panels: Mapping[str, Sequence[float]], groups: Sequence[str], palette: Palette = LIGHT
) -> Figure:
    """Plots every feature's value as a dot, one row per group with its mean as a bar, one panel per measure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(panels) + 0.6, 2.6), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    names = np.asarray(groups)
    rng = np.random.default_rng(0)
    for i, (axis, (title, values)) in enumerate(zip(axes, panels.items(), strict=True)):
        table = np.asarray(values, dtype=float)
        for y, group in enumerate(GROUPS):
            shown = table[(names == group) & np.isfinite(table)]
            jitter = y + rng.uniform(-0.25, 0.25, shown.size)
            axis.plot(shown, jitter, ".", color=palette.group(group), markersize=3, alpha=0.4)
            if shown.size:
                axis.plot([shown.mean()] * 2, [y - 0.36, y + 0.36], color=palette.ink, linewidth=2)
        axis.set_title(one_line(title), parse_math=False)
        axis.set(ylim=(len(GROUPS) - 0.4, -0.6), yticks=range(len(GROUPS)))
        axis.set_yticklabels(GROUPS if i == 0 else [""] * len(GROUPS))
        axis.tick_params(axis="y", length=0)
    return figure


def _figures(result: Measures) -> dict[str, tuple[bytes, str]]:
    """File name to PNG and caption."""
    mds, sizes = result.mds, {g.name: len(g) for g in result.mds.groups}
    scores = [float(x) for x in mds.R if not math.isnan(float(x))]
    found: dict[str, tuple[bytes, str]] = {}

    def add(name: str, make: Any, caption: str) -> None:
        found[name] = (draw(make, alt=caption, dark=False)[0].data, caption)

    if scores:
        note = f"r shuffled {fixed(mds.shuffled_r, 2)}"
        panel = Histogram(f"{result.n_pairs:,} pairs", scores, mds.mu, mds.sigma, sizes, note)
        add("mds.png", lambda p: mds_histograms([panel], p), f"MDS of {len(scores)} alive features.")
    densities = {side: d.histogram() for side, d in result.density.items()}
    add("density.png", lambda p: density_histograms(densities, p), "How many features fire how often.")
    panels = {
        f"{name}, {side}": r.values.tolist()
        for name, results in (("EmbedSim", result.embed_sim), ("MonoSemanticity", result.monosemanticity))
        for side, r in results.items()
    }
    if panels:
        names = result.group_names()
        add("groups.png", lambda p: by_group(panels, names, p), "Features by group; bars are means.")
    return found
