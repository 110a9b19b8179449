"""Tables and figure of the spurious-cue study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def accuracy_table(report: dict[str, Any], random: Any, caption: str) -> Any:
    from mmhooks.report import Cell, Table

    groups = list(report["plain"]["groups"])
    rows: list[list[Any]] = []
    for name, r in report.items():
        cells = [Cell.of(r[k]) for k in ("average", "test_average", "worst")]
        label = "nothing" if name == "plain" else f"attention heads by {name}"
        rows.append([label, *cells, *(Cell.of(r["groups"][g]) for g in groups)])
    rows.append(["random ones chosen alike", "–", "–", Cell.of(random), *("–" for _ in groups)])
    return Table(["Ablated", "Average", "Test average", "Worst group", *groups], rows, caption)


def splits_table(worst: dict[str, list[float]], heads: dict[str, list[list[str]]]) -> Any:
    """Returns the worst group of every split, and how many attention heads were ablated."""
    from mmhooks.report import Table

    rows = []
    for name, values in worst.items():
        counts = [len(own) for own in heads[name]] if name in heads else [0] * len(values)
        rows.append(
            [name, *(f"{v:.3f}" + (f" ({n})" if n else "") for v, n in zip(values, counts, strict=True))]
        )
    columns = [f"Split {i + 1}" for i in range(len(worst["plain"]))]
    return Table(["Ablated", *columns], rows, "Worst group by split (attention heads ablated)")


def heads_table(heads: dict[str, list[list[str]]], texts: Sequence[dict[str, list[str]]]) -> Any:
    from mmhooks.report import Table

    rows = [
        [name, str(i + 1), head, "; ".join(named[head][:6])]
        for name, splits in heads.items()
        for i, (own, named) in enumerate(zip(splits, texts, strict=True))
        for head in own
    ]
    columns = ["Chosen by", "Split", "Layer.attention head", "First texts"]
    return Table(columns, rows, "Attention heads", text_columns=(0, 1, 2, 3))


def groups_plot(report: dict[str, Any], random: Any) -> Any:
    from matplotlib.figure import Figure

    from mmhooks.report import Plot
    from mmhooks.report.style import draw

    def make(palette: Any) -> Figure:
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axis = figure.subplots()
        colours = [palette.soft, palette.img, palette.text]
        groups = [*report["plain"]["groups"], "worst group"]
        for i, ((name, r), colour) in enumerate(zip(report.items(), colours, strict=False)):
            points = [*r["groups"].values(), r["worst"]]
            x = [j + 0.2 * (i - 1) for j in range(len(points))]
            low = [max(0.0, p.value - p.low) for p in points]
            high = [max(0.0, p.high - p.value) for p in points]
            axis.errorbar(
                x, [p.value for p in points], [low, high], fmt="o", color=colour, label=name, capsize=3
            )
        band = [len(groups) - 0.66] * 2, [random.low, random.high]
        axis.plot(*band, color=palette.soft, linewidth=5, alpha=0.3)
        axis.set_xticks(range(len(groups)), [g.replace(", ", ",\n") for g in groups])
        axis.set_ylim(0, 1)
        axis.set_ylabel("accuracy")
        axis.legend(fontsize=8)
        return figure

    light, dark = draw(make, alt="Accuracy of every group before and after the ablation")
    return Plot(
        light,
        dark,
        "Accuracy of every group with 95 % intervals, direct effects ablated; broad band: random attention heads.",
    )
