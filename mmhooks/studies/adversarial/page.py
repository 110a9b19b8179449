"""Page of the adversarial study: figures, ``tables.md`` and ``index.html``, from the numbers of ``results.json``."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmhooks.analysis.attacks.pixels import psnr
from mmhooks.report import Block, Details, Listing, Page, Plot, Prose, Section, Table, TableBlock
from mmhooks.report.style import draw
from mmhooks.studies.adversarial.defence import DEFENCES
from mmhooks.studies.adversarial.paper import claims
from mmhooks.studies.adversarial.samples import Samples
from mmhooks.studies.adversarial.tables import label_of, tables
from mmhooks.studies.common.paper_report import paper_markdown, paper_sections
from mmhooks.studies.common.write import save_plots
from mmhooks.utils.escape import markdown as escaped
from mmhooks.utils.escape import one_line, rich_text
from mmhooks.utils.files import write_text

# -- figures ---------------------------------------------------------------------------------------------------


def curves(results: Mapping[str, Any], palette: Any) -> Any:
    """Plots attack success against steps of the defence, first draw, one panel per victim; bars: Wilson, last step."""
    from matplotlib.figure import Figure

    victims = list(results["victims"].values())
    figure = Figure(figsize=(4.2 * len(victims) + 0.6, 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(victims), squeeze=False, sharey=True)[0]
    for axis, victim in zip(axes, victims, strict=True):
        for d in DEFENCES:
            points = {int(k): v for k, v in victim["curve"][d].items()}
            colour = palette.ink if d == "all" else palette.group(d)
            style = ":" if d == "random" else "--" if d == "all" else "-"
            axis.plot(list(points), [100 * v["value"] for v in points.values()], style, color=colour, label=label_of(d),
                      marker="o", markersize=3.5)  # fmt: skip
            last = max(points)
            axis.plot(
                (last, last), (100 * points[last]["low"], 100 * points[last]["high"]), color=colour, alpha=0.5
            )
        axis.axhline(
            100 * victim["rates"]["benign"]["all triggers"]["value"], color=palette.line, linewidth=1
        )
        axis.set(title=one_line(victim["victim"]), xlabel="steps of the defence", ylim=(0, 100))
    axes[0].set_ylabel("attack success, %")
    axes[-1].legend(fontsize=8.5)
    return figure


def strips(
    samples: Samples, defended: Mapping[str, Tensor], palette: Any, *, each: int = 2, seed: int = 0
) -> Any:
    """Shows for each trigger the partner, the attack, and the attack after each defence, with PSNR and L∞."""
    from matplotlib.figure import Figure

    rng, rows = random.Random(seed), []
    for trigger in dict.fromkeys(samples.trigger):
        own = samples.rows(trigger)
        rows += [(trigger, i) for i in sorted(rng.sample(own, min(each, len(own))))]
    columns = ["benign", "partner", "attack", *DEFENCES]
    figure = Figure(figsize=(1.15 * len(columns) + 1.2, 1.42 * len(rows) + 0.3), layout="constrained")
    axes: Any = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (trigger, i) in enumerate(rows):
        shown = {"benign": samples.base[i], "partner": samples.partner[i], "attack": samples.attack[i]}
        shown |= {d: p[i] for d, p in defended.items()}
        for axis, column in zip(axes[line], columns, strict=True):
            image = shown[column]
            axis.imshow(np.asarray(image.permute(1, 2, 0)), interpolation="nearest")
            axis.set(xticks=(), yticks=())
            if line == 0:
                axis.set_title(column, fontsize=10)
            if column in DEFENCES:
                db = float(psnr(image[None], samples.attack[i][None]))
                far = float((image - samples.attack[i]).abs().max())
                axis.set_xlabel(f"{db:.1f} dB, {far:.2f}", fontsize=7.5)
        axes[line][0].set_ylabel(f"{one_line(trigger)}\n{one_line(samples.target[i])}", fontsize=8.5)
    return figure


def figures(results: Mapping[str, Any], samples: Samples, defended: Mapping[str, Tensor]) -> dict[str, Plot]:
    made = {
        "curves": (lambda p: curves(results, p), "Attack success against steps of the defence",
                   "Attack success against steps of the defence, first draw; grey line: the friendly partners."),
        "strips": (lambda p: strips(samples, defended, p), "Images before and after the defence",
                   "Before and after the first draw of the defence; below: PSNR against the attack, largest change of a pixel."),
    }  # fmt: skip
    return {name: Plot(*draw(make, alt=alt), caption) for name, (make, alt, caption) in made.items()}


# -- page ------------------------------------------------------------------------------------------------------


def save_all(
    results: Mapping[str, Any], samples: Samples, defended: Mapping[str, Tensor], out: Path
) -> list[Path]:
    """Writes the PNGs, ``tables.md`` and ``index.html``; returns the paths."""
    plots, made, found = figures(results, samples, defended), tables(results), claims(results)
    paths = save_plots(plots, out)
    lines = "\n".join(
        f"- [{verdict}] {escaped(claim, code=True)}: {escaped(sentence, code=True)}"
        for verdict, claim, sentence in found
    )
    title = f"Alignment against cross-modal attacks, {results['settings']['model']}"
    body = "\n\n".join(t.markdown() for t in made)
    write_text(
        out / "tables.md",
        f"# {escaped(title)}\n\n{body}\n\n## Against the paper\n\n{lines}\n{paper_markdown(results)}",
    )
    answers: list[Block] = []
    for victim in results["victims"].values():
        rows = [[c, " · ".join(dict.fromkeys(a))[:400]] for c, a in victim["answers"].items()]
        answers.append(
            TableBlock(Table(["Condition", "Answers"], rows, str(victim["victim"]), text_columns=(0, 1)))
        )
    page = Page(
        title,
        [
            Section("Result", [Listing(found), plots["curves"]]),
            Section("Tables", [TableBlock(t) for t in made[:-1]]),
            Section("Images", [plots["strips"], Details("Answers of the first samples", answers)]),
            *paper_sections(results),
            Section("Settings", [TableBlock(made[-1]), Prose(
                "Requests and answers are placeholders; success is compliance with a request about a harmful thing, "
                "never content.", "note",
            )]),
        ],
        lead=f"An image with a trigger is moved until {results['head']['matched']} features of a group see its benign "
        "partner. How often does the attack still succeed?",
        kicker="Section 3.2, Table 8, Figure 6",
        footer=(results["data"]["attribution"], f"{results['environment']['seconds']:.0f} s"),
    )  # fmt: skip
    return [*paths, out / "tables.md", page.save(out / "index.html")]


def report(console: Any, paths: Sequence[Path]) -> None:
    """Prints the tables, then the paths of all files."""
    tables = next(path for path in paths if path.name == "tables.md")
    console.print(rich_text(tables.read_text(), lines=True))
    for path in paths:
        console.print(rich_text(f"  {path}"))
