"""Figure of a head's fidelity: firing densities, and retrieval and zero-shot accuracy before and after."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from mmhooks.report.style import LIGHT, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmhooks.analysis.measures.fidelity import FidelityResult


def fidelity_figure(result: FidelityResult, palette: Palette = LIGHT) -> Figure:
    """Plots activation densities per modality and, if the head has a decoder, R@k and accuracy before and after.

    >>> import torch; import mmhooks as mm
    >>> figure = fidelity_figure(mm.fidelity(mm.TopKSAE(8, 32, 4), torch.randn(50, 8), torch.randn(50, 8)))
    >>> [axis.get_ylabel() for axis in figure.axes]
    ['features', 'share of queries']
    """
    from matplotlib.figure import Figure

    kept = result.choices_kept()
    figure = Figure(figsize=(5.2 + (0.55 * len(kept) + 1.2 if kept else 0), 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if kept else 1, squeeze=False)[0]
    colours = {"image": palette.img, "text": palette.text}
    for m in result.modalities:
        edges, features = m.density.histogram()
        widths = [b - a for a, b in pairwise(edges)]
        dead = f"{100 * m.sums.dead:.1f} % never"
        axes[0].bar(edges[:-1], features, widths, align="edge", color=colours[m.name], alpha=0.6,
                    label=f"{m.name}: FVU {m.fvu.value:.3f}, {dead}")  # fmt: skip
    axes[0].set(xscale="log", xlabel="share of vectors that activate a feature", ylabel="features")
    axes[0].legend(fontsize=8.5)
    if not kept:
        return figure
    for shift, when, alpha in ((-0.2, "before", 1.0), (0.2, "after", 0.55)):
        values = [row[when] for row in kept]
        errors = [
            [max(0.0, v - row[f"{when} low"]) for v, row in zip(values, kept, strict=True)],
            [max(0.0, row[f"{when} high"] - v) for v, row in zip(values, kept, strict=True)],
        ]
        places = [i + shift for i in range(len(kept))]
        axes[1].bar(places, values, 0.4, color=[colours[row["modality"]] for row in kept], alpha=alpha,
                    label=f"{when} reconstruction")  # fmt: skip
        axes[1].errorbar(places, values, errors, fmt="none", ecolor=palette.soft, linewidth=0.9)
    tasks = {"retrieval": "R", "zero-shot": "acc."}
    axes[1].set_xticks(range(len(kept)), [f"{r['modality']}\n{tasks[r['task']]}@{r['k']}" for r in kept])
    axes[1].tick_params(axis="x", labelsize=8)
    axes[1].set(ylim=(0, 1), ylabel="share of queries")
    axes[1].legend(fontsize=8.5)
    return figure
