"""Tables and figure of the study in ``spurious.py``."""

from __future__ import annotations

from typing import Any


def counted(n: int, kind: str = "") -> str:
    """``1 attention head``, ``10 random attention heads``."""
    return " ".join(
        part for part in (str(n), kind, "attention head" if n == 1 else "attention heads") if part
    )


def accuracy_table(
    report: dict[str, Any], randoms: dict[str, Any], chosen: dict[str, list[tuple[int, int]]]
) -> Any:
    from mmhooks.report import Cell, Estimate, Table

    groups = list(report["plain"]["groups"])
    rows: list[list[Any]] = []
    for name, r in report.items():
        label = name if name == "plain" else f"{counted(len(chosen[name]))} by {name}"
        cells = [Cell.of(Estimate.of(r[k])) for k in ("average", "worst")]
        rows.append([label, *cells, *(Cell.of(Estimate.of(r["groups"][g])) for g in groups)])
        if name in randoms:
            rows.append(
                [
                    counted(len(chosen[name]), "random"),
                    "–",
                    Cell.of(Estimate.of(randoms[name])),
                    *("–" for _ in groups),
                ]
            )
    return Table(["Ablated", "Average", "Worst group", *groups], rows, "Accuracy")


def heads_table(chosen: dict[str, list[tuple[int, int]]], named: dict[str, list[str]]) -> Any:
    from mmhooks.report import Table

    rows = [
        [name, f"{n}.{h}", "; ".join(named[f"{n}.{h}"][:6])] for name, own in chosen.items() for n, h in own
    ]
    return Table(
        ["Chosen by", "Layer.attention head", "First texts"], rows, "Attention heads", text_columns=(0, 1, 2)
    )


def groups_plot(report: dict[str, Any], randoms: dict[str, Any]) -> Any:
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
            if name in randoms:
                band = randoms[name]
                axis.plot([x[-1] + 0.08] * 2, [band.low, band.high], color=colour, linewidth=5, alpha=0.3)
        axis.set_xticks(range(len(groups)), [g.replace(", ", ",\n") for g in groups])
        axis.set_ylim(0, 1)
        axis.set_ylabel("accuracy")
        axis.legend(fontsize=8)
        return figure

    light, dark = draw(make, alt="Accuracy of every group before and after the ablation")
    return Plot(
        light,
        dark,
        "Accuracy of every group with 95 % intervals; broad bands: as many random attention heads.",
    )
