"""Page of the generation study: grids, curves, tables and ``index.html``, from the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from torch import Tensor

from mmhooks.report import Block, Listing, Page, Plot, Prose, Section, Table, TableBlock
from mmhooks.report.style import Palette, draw
from mmhooks.report.tables import Cell
from mmhooks.studies.common.claims import verdict_of_outcome
from mmhooks.studies.common.paper_report import paper_markdown, paper_sections, paper_sentence
from mmhooks.studies.generation.interpolation import GROUPS, MEASURES
from mmhooks.utils.escape import markdown as escaped
from mmhooks.utils.escape import terminal
from mmhooks.utils.files import write_text
from mmhooks.utils.say import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURE_NOTES = {
    "shift": "away from the prompt's concept, toward the reference's",
    "gain": "cosine to the reference's concept",
    "distortion": "1 − SSIM to strength 0",
    "quality": "cosine to the nearest unedited drawing",
}


def grid(
    strips: Mapping[str, Tensor],
    image: Image,
    case: Mapping[str, str],
    strengths: list[float],
    palette: Palette,
) -> Figure:
    """Draws Figure 8: one row per group, one column per strength; the reference at the left."""
    from matplotlib.figure import Figure

    columns, cell, left, top = len(strengths), 1.2, 2.2, 0.62
    wide, high = left + columns * cell, top + len(strips) * cell
    figure = Figure(figsize=(wide, high), facecolor=palette.ground)

    def show(one: Any, x: float, y: float, side: float) -> None:
        axis = figure.add_axes((x / wide, 1 - (y + side) / high, side / wide, side / high))
        axis.imshow(one)
        axis.axis("off")

    def write_at(text: str, x: float, y: float, **options: Any) -> None:
        options = {"color": palette.ink, "va": "center"} | options
        figure.text(x / wide, 1 - y / high, terminal(text, lines=True), parse_math=False, fontdict=options)

    middle = top + len(strips) * cell / 2
    write_at(
        f"toward\n{_lines(case['reference'])}",
        0.75,
        middle - 0.65,
        ha="center",
        va="bottom",
        color=palette.soft,
    )
    show(image.convert("RGB"), 0.15, middle - 0.6, 1.2)
    write_at(f"prompt: {_cut(case['prompt'], int(10 * (wide - left)) - 8)}", left + 0.05, 0.18, weight="bold")
    write_at("strength", left - 0.1, top - 0.16, ha="right", color=palette.soft)
    for column, strength in enumerate(strengths):
        write_at(f"{strength:g}", left + (column + 0.5) * cell, top - 0.16, ha="center", color=palette.soft)
    for row, (group, images) in enumerate(strips.items()):
        colour = palette.ink if group == "CrossD" else palette.group(group)
        write_at(group, left - 0.1, top + (row + 0.5) * cell, ha="right", weight="bold", color=colour)
        for column, one in enumerate(images):
            show(
                one.permute(1, 2, 0).numpy(),
                left + column * cell + 0.03,
                top + row * cell + 0.03,
                cell - 0.06,
            )
    return figure


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _lines(text: str) -> str:
    """Wraps a text into at most two lines that fit above the reference."""
    from textwrap import wrap

    return "\n".join(wrap(text, 18, max_lines=2, placeholder=" …"))


def curves(found: Mapping[str, Any], strengths: list[float], palette: Palette) -> Figure:
    """Plots one panel per measure and one line per group; 95 % intervals over prompts, shifted side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained", facecolor=palette.ground)
    axes = figure.subplots(2, 2).flat
    gap = 0.012 * max(strengths) / 0.9
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for place, group in enumerate(GROUPS):
            rows, colour = found["curves"][group][measure], palette.group(group)
            values = [r["value"] for r in rows]
            below = [r["value"] - r["low"] for r in rows]
            above = [r["high"] - r["value"] for r in rows]
            x = [s + gap * (place - 1.5) for s in strengths]
            line = "--" if group == "random" else "-"
            axis.errorbar(x, values, [below, above], color=colour, linestyle=line, marker="o", markersize=4,
                          linewidth=1.8, elinewidth=1.2, label=group)  # fmt: skip
        axis.set_xlabel("strength")
        axis.set_xticks(strengths, [f"{s:g}" for s in strengths])
        axis.grid(axis="y", color=palette.line, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.set_title(f"{label[0].upper()}{label[1:]}", pad=22)
        axis.text(
            0, 1.035, MEASURE_NOTES[measure], transform=axis.transAxes, color=palette.soft, fontsize=9.5
        )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(GROUPS))
    return figure


def table(found: Mapping[str, Any], title: str, strength: float) -> Table:
    def cell(e: Mapping[str, Any]) -> Cell:
        return Cell(f"{e['value']:.3f}", f"[{e['low']:.3f}, {e['high']:.3f}]")

    rows = [
        [group, str(found["sizes"].get(group, "")), str(found["edited"][group]),
         *(cell(found["curves"][group][m][-1]) for m in MEASURES)]
        for group in GROUPS if group != "random"
    ]  # fmt: skip
    sets = found["random_sets"]
    label = f"{sets['n']} random sets"
    rows.append([label, "", str(found["edited"]["random"]), *(cell(sets[m]) for m in MEASURES)])
    note = (
        f"At strength {strength:g}; 95 % bootstrap over prompts, of the last row over random sets, which are drawn from "
        f"{sets['pool']} features outside the edited groups. Groups by {found['rule']}."
    )
    return Table(["Group", "Features", "Edited", *MEASURES.values()], rows, caption=title, note=note)


def write_page(
    results: Mapping[str, Any], strips_by_mode: Mapping[str, tuple[Any, Image]], out: Path
) -> list[Path]:
    """Writes PNG figures, ``tables.md`` and ``index.html``, and returns the paths; ``strips_by_mode``: strips of a mode and
    their reference."""
    strengths, sections, paths = results["strengths"], [], []
    markdown = ["# Interpolation by modality", ""]
    for mode, by_space in results["modes"].items():
        strips, image = strips_by_mode[mode]
        for space, found in by_space.items():
            title, name = f"{mode}, {space}", f"{mode}-{space}".lower()
            case = results["cases"][found["shown"]]

            def images(p: Palette, strip=strips[space], image=image, case=case) -> Figure:
                return grid(strip, image, case, strengths, p)

            def lines(p: Palette, found=found) -> Figure:
                return curves(found, strengths, p)

            plots: list[Block] = []
            for kind, make, caption in (
                (
                    "grid",
                    images,
                    "Images by strength, " + ("of the prompt that moved most" if results["chosen"] else "of one prompt"),
                ),
                (
                    "curves",
                    lines,
                    f"Measures by strength, with 95 % intervals over prompts: {len(results['cases'])} at the largest, "
                    f"{results['curve_prompts']} below it",
                ),
            ):  # fmt: skip
                light, dark = draw(make, alt=f"{title}: {caption[0].lower()}{caption[1:]}")
                paths.append(out / f"{kind}-{name}.png")
                paths[-1].write_bytes(light.data)
                plots.append(Plot(light, dark, caption=caption))
            numbers = table(found, title, strengths[-1])
            sentences = [v["sentence"] for v in found["verdicts"].values()]
            items: Any = [
                (verdict_of_outcome(v["outcome"]), v["claim"], v["sentence"])
                for v in found["verdicts"].values()
            ]
            low, high = found["thresholds"]
            control = (
                f"Groups by {found['rule']}; mu − sigma is {low:.3f}, mu + sigma {high:.3f}. Correlation with the scores of "
                f"shuffled pairs: {found['shuffled_r']:.3f}; near 1 the scores say little about the pairing."
            )
            notes = (found["power"], control)
            sections.append(
                Section(
                    title,
                    [*plots, Listing(items), TableBlock(numbers), *(Prose(t, "note") for t in notes)],
                )
            )
            sentences = [f"- {escaped(line, code=True)}" for line in (*sentences, *notes)]
            markdown += [
                numbers.markdown(),
                "",
                *sentences,
                "",
                f"![grid](grid-{name}.png)",
                f"![curves](curves-{name}.png)",
                "",
            ]
    for mode, why in results["impossible"].items():
        markdown += [f"Mode {mode} is not possible here: {escaped(why)}", ""]
        sections.append(Section(f"{mode}: not possible here", [Prose(why, "warn")]))
    write_text(out / "tables.md", "\n".join(markdown) + paper_markdown(results))
    sections += paper_sections(results)
    lead = (
        f"{cases_of(results)} of {results['pipeline']}, {results['seeds']} images each: features of the "
        f"conditioner are moved toward a reference image. Features are scored on {results['data_pairs']:,} pairs."
    )
    footer = [results["command"], f"Data: {results['data']}, {results['licence']}. {results['attribution']}"]
    page = Page("Interpolation by modality", sections, lead, "mmhooks", footer).save(out / "index.html")
    return [*paths, out / "tables.md", page]


def cases_of(results: Mapping[str, Any]) -> str:
    """Returns what the cases are: prompts or noises of one prompt, each with a reference of its own or all with one."""
    n, prompts = len(results["cases"]), {case["prompt"] for case in results["cases"]}
    references = {case["reference"] for case in results["cases"]}
    what = f"{n} noises of one prompt" if len(prompts) == 1 < n else f"{n} prompts"
    return f"{what} with one reference" if len(references) == 1 < n else what


def report(results: Mapping[str, Any], out: Path) -> None:
    """Prints the verdicts and the modes that are not possible, then the path of the page."""
    for mode, by_space in results["modes"].items():
        for space, found in by_space.items():
            say(f"{mode}, {space}: groups by {found['rule']}")
            for verdict in found["verdicts"].values():
                say(f"{mode}, {space}: {verdict['sentence']}")
            say(f"{mode}, {space}: {found['power']}")
    for mode, why in results["impossible"].items():
        say(f"{mode}: not possible here: {why}")
    if results["paper"] is not None:
        say(f"{results['paper']['paper']}: {paper_sentence(results['paper'])}")
    say(f"{out / 'index.html'}, {results['environment']['seconds']:.0f} s")
