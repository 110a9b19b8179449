"""The generation study written down: grids, curves, tables and the page, from the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generation import GROUPS, MEASURES
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mmhooks.report import Block, Listing, Page, Plot, Prose, Section, Table, TableBlock
from mmhooks.report.style import Palette, draw
from mmhooks.report.tables import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid(
    strips: Mapping[str, Tensor], picture: Image, results: Mapping[str, Any], palette: Palette
) -> Figure:
    """Figure 8: a row a group, a column a strength; the reference at the left."""
    from matplotlib.figure import Figure

    strengths, case = results["strengths"], results["cases"][results["shown"]]
    figure = Figure(figsize=(1.15 * (len(strengths) + 1), 1.25 * len(strips)), facecolor=palette.ground)
    axes = figure.subplots(len(strips), len(strengths) + 1, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    for row, (group, pictures) in enumerate(strips.items()):
        axes[row, 0].set_ylabel(group, color=palette.ink)
        if row == 0:
            axes[row, 0].imshow(picture.convert("RGB"))
            axes[row, 0].set_title(f"toward\n{case['reference']}", fontsize=8, color=palette.ink)
        for column, one in enumerate(pictures):
            axis = axes[row, column + 1]
            axis.imshow(to_pil_image(one.clamp(0, 1)))
            if row == 0:
                start = f"{case['prompt']}\n" if column == 0 else ""
                axis.set_title(f"{start}{strengths[column]:g}", fontsize=8, color=palette.ink)
    figure.subplots_adjust(0.04, 0.01, 0.99, 0.88, 0.04, 0.04)
    return figure


def curves(found: Mapping[str, Any], strengths: list[float], palette: Palette) -> Figure:
    """A panel a measure, a line a group, 95 % intervals over prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.2), layout="constrained", facecolor=palette.ground)
    for axis, (measure, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for group in GROUPS:
            rows, colour = found["curves"][group][measure], palette.group(group)
            line = "--" if group == "random" else "-"
            axis.plot(strengths, [r["value"] for r in rows], line, color=colour, label=group)
            axis.fill_between(
                strengths, [r["low"] for r in rows], [r["high"] for r in rows], color=colour, alpha=0.15
            )
        axis.set(xlabel="strength", title=label)
    figure.axes[0].legend()
    return figure


def table(found: Mapping[str, Any], title: str, strength: float) -> Table:
    def cell(e: Mapping[str, Any]) -> Cell:
        return Cell(f"{e['value']:.3f}", f"[{e['low']:.3f}, {e['high']:.3f}]")

    rows = [
        [group, str(found["sizes"].get(group, "")), str(found["edited"][group]),
         *(cell(found["curves"][group][m][-1]) for m in MEASURES)]
        for group in GROUPS
    ]  # fmt: skip
    return Table(["Group", "Features", "Edited", *MEASURES.values()], rows, caption=title,
                 note=f"At strength {strength:g}; 95 % bootstrap over prompts.")  # fmt: skip


def write(results: Mapping[str, Any], strips: Mapping[str, Any], picture: Image, out: Path) -> None:
    """``tables.md``, PNG figures and ``index.html``."""
    strengths, sections = results["strengths"], []
    markdown = ["# Interpolation by modality", ""]
    for mode, by_space in results["modes"].items():
        for space, found in by_space.items():
            title, name = f"{mode}, {space}", f"{mode}-{space}".lower()
            plots: list[Block] = []
            for kind, make, alt in (
                (
                    "grid",
                    lambda p, m=mode, s=space: grid(strips[m][s], picture, results, p),
                    "pictures by strength",
                ),
                ("curves", lambda p, f=found: curves(f, strengths, p), "measures by strength"),
            ):
                light, dark = draw(make, alt=f"{title}: {alt}")
                (out / f"{kind}-{name}.png").write_bytes(light.data)
                plots.append(Plot(light, dark, caption=alt.capitalize()))
            numbers = table(found, title, strengths[-1])
            said = [v["sentence"] for v in found["verdicts"].values()]
            items: Any = [("same" if v["holds"] else "differs", f"{g} {v['claim']}", v["sentence"])
                          for g, v in found["verdicts"].items()]  # fmt: skip
            control = (
                f"Scores of shuffled pairs correlate with these by {found['shuffled_r']:.3f}: near 1 they say little "
                "about the pairing."
            )
            sections.append(
                Section(title, [*plots, Listing(items), TableBlock(numbers), Prose(control, "note")])
            )
            markdown += [numbers.markdown(), "", *(f"- {s}" for s in said), f"- {control}", "",
                         f"![grid](grid-{name}.png)", f"![curves](curves-{name}.png)", ""]  # fmt: skip
    for mode, why in results["impossible"].items():
        markdown += [f"Mode {mode} is not possible here: {why}", ""]
        sections.append(Section(f"{mode}: not possible here", [Prose(why, "warn")]))
    (out / "tables.md").write_text("\n".join(markdown))
    lead = (
        f"{len(results['cases'])} prompts of {results['pipeline']}, {results['seeds']} drawings each: features of the "
        f"conditioner move toward a reference picture. Features are scored on {results['data_pairs']:,} pairs."
    )
    footer = [results["command"], f"Data: {results['data']}, {results['licence']}. {results['attribution']}"]
    Page("Interpolation by modality", sections, lead, "mmhooks", footer).save(out / "index.html")
