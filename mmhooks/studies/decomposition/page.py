"""Page of the decomposition study: tables, figures and ``index.html``, from the numbers of ``results.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhooks.report import (
    Block,
    Cell,
    Details,
    Page,
    Plot,
    Prose,
    Section,
    Table,
    TableBlock,
    Tile,
    Tiles,
    fixed,
    percent,
)
from mmhooks.report.figures import Strip, image_strips
from mmhooks.report.style import LIGHT, Palette, draw
from mmhooks.studies.common.paper_report import paper_markdown, paper_sections, print_paper
from mmhooks.studies.common.write import save_plots
from mmhooks.utils.escape import markdown as escaped
from mmhooks.utils.escape import rich_text
from mmhooks.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(results: Mapping[str, Any]) -> list[Table]:
    return [
        make(results)
        for make in (
            head_table,
            overlap_table,
            ablation_table,
            rebuilt_table,
            share_table,
            neuron_table,
            code_table,
        )
    ]


def head_table(results: Mapping[str, Any]) -> Table:
    span, kinds = results["text_span"], results["labels"]["kinds"]
    text_agreement, other, rows = results["agreement"], results["other_selection"], []
    for i, head in enumerate(span["heads"]):
        texts, curve = span["texts"][i], span["explained"][i]
        common = Counter(kinds[head]).most_common(1) if kinds and kinds[head] else []
        rows.append([
            head, f"{span['variance'][i]:.4f}", percent(curve[-1] if curve else None), fixed(text_agreement["heads"][i], 2),
            f"{common[0][0]} {common[0][1]}/{len(texts)}" if common else "–", "; ".join(texts[:5]),
        ])  # fmt: skip
    data = results["data"]
    return Table(
        ["Attention head", "Variance", "Spanned", "Agreement", "Most common kind", "First texts"], rows,
        "Texts of attention heads",
        f"TextSpan (selection {span['selection']}) over {span['n_samples']:,} images, {data['pool_size']:,} texts of the pool "
        f"{data['pool']}, "
        f"{results['settings']['texts']} texts per attention head. Spanned: share of its variance. Agreement: mean correlation "
        "of held-out images' projections on its first five texts with the similarity of their captions to these texts: "
        f"{interval(text_agreement['own'])} over attention heads, {interval(text_agreement['random'])} for random texts. "
        f"Of each head's texts, selection {other['selection']} has {min(other['shared'])} to {max(other['shared'])} too.",
        (0, 4, 5),
    )  # fmt: skip


def overlap_table(results: Mapping[str, Any]) -> Table:
    o = results["overlap"]
    rows = [
        [head, percent(o["texts"][i]), percent(o["texts_chance"][i]), percent(o["space"][i]),
         percent(o["space_chance"][i]), percent(o["first"][i])]
        for i, head in enumerate(o["heads"])
    ]  # fmt: skip
    return Table(
        ["Attention head", "Same texts", "By chance", "Same space", "By chance", "Same first text"], rows,
        "Texts of attention heads over other images",
        f"Mean over {o['n_subsets'] // 2} splits of the images into halves that share no family of drawings. Space: overlap "
        "of the spans.",
    )  # fmt: skip


def ablation_table(results: Mapping[str, Any]) -> Table:
    a = results["ablations"]
    rows: list[list[str | Cell]] = [["nothing", rate(a["before"]), rate(a["before"])]]
    for name, direct, live in zip(a["names"], a["direct"], a["live"], strict=True):
        rows.append([name, rate(direct), rate(live)])
    data = results["data"]
    return Table(
        ["Mean-ablated", "Direct effects", "Live"], rows, "Accuracy without components",
        f"{a['n']:,} held-out images, own text among {data['classes']:,} (chance {percent(1 / data['classes'], 2)}); "
        "95 % Wilson intervals. Direct: only the component's own contribution to the embedding is replaced by its "
        "mean; live: later layers read the mean too.",
    )  # fmt: skip


def rebuilt_table(results: Mapping[str, Any]) -> Table:
    kinds = list(results["rebuilt"])
    counts = list(results["rebuilt"][kinds[0]]["by_texts"])
    rows: list[list[str | Cell]] = [
        [k, *(rate(results["rebuilt"][kind]["by_texts"][k]) for kind in kinds)] for k in counts
    ]
    rows.append(["all of each attention head", *(rate(results["rebuilt"][kind]["full"]) for kind in kinds)])
    return Table(
        ["Texts per attention head", *(k[0].upper() + k[1:] for k in kinds)], rows,
        "Accuracy with attention heads rebuilt from their texts",
        "0 texts: these attention heads at their mean.",
    )  # fmt: skip


def share_table(results: Mapping[str, Any]) -> Table:
    rows = [
        [
            str(r["part"]),
            *(x if isinstance(x, str) else percent(x) for x in (r["attention"], r["mlp"], r["all"])),
            r["strongest head"],
        ]
        for r in results["shares"]
    ]
    return Table(
        ["Part", "Attention", "MLP", "Both", "Strongest attention head"],
        rows,
        "Direct share of the embedding's length",
    )


def neuron_table(results: Mapping[str, Any]) -> Table:
    n = results["neurons"]
    rows = [
        [str(r["neuron"]), percent(r["size"], 2), percent(r["rank1"]), "; ".join(t for t, _ in r["texts"])]
        for r in n["strongest"]
    ]
    if "why" in n:
        return Table(["Neuron"], [], "Neurons through later attention heads", f"Not computed. {n['why']}.")
    return Table(
        ["Neuron", "Size", "Rank 1", "Texts"], rows, f"Neurons of block {n['layer']} through later attention heads",
        f"Size: root mean square of the second-order effect over that of embeddings, {n['n_samples']:,} images. Rank 1: "
        f"share of its first direction (mean over all neurons {percent(n['mean_rank1'])}).", (0, 3),
    )  # fmt: skip


def code_table(results: Mapping[str, Any]) -> Table:
    rows = [
        [r["measure"], Cell(f"{r['value']:.3f}", f"[{r['low']:.3f}, {r['high']:.3f}]")]
        for r in results["code"]["table"]
    ]
    return Table(
        ["Measure", "Mean"], rows, "Images as sparse sums of texts",
        f"Penalty {results['code']['penalty']}. Cosine of the centred embedding to its texts' sum; L0: texts used.",
    )  # fmt: skip


def interval(e: Mapping[str, Any]) -> str:
    return f"{fixed(e['value'], 2)} [{fixed(e['low'], 2)}, {fixed(e['high'], 2)}]"


def rate(e: Mapping[str, Any] | None) -> Cell:
    if e is None:
        return Cell("–")
    return Cell(percent(e["value"]), f"[{percent(e['low'])}, {percent(e['high'])}]")


# -- figures -----------------------------------------------------------------------------------------------------


def rebuilt_figure(results: Mapping[str, Any], palette: Palette = LIGHT) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.add_subplot()
    ks: list[int] = []
    for (kind, found), colour in zip(results["rebuilt"].items(), (palette.img, palette.text), strict=True):
        ks = [int(k) for k in found["by_texts"]]
        rows = list(found["by_texts"].values())
        axis.plot(ks, [100 * r["value"] for r in rows], "o-", color=colour, label=kind, markersize=4)
        axis.fill_between(
            ks,
            [100 * r["low"] for r in rows],
            [100 * r["high"] for r in rows],
            color=colour,
            alpha=0.15,
            lw=0,
        )
        axis.axhline(100 * found["full"]["value"], color=colour, lw=0.8, ls=":")
    axis.set(
        xlabel="texts per attention head",
        ylabel="accuracy, %",
        title="Attention heads rebuilt from their texts",
        ylim=(0, None),
    )
    axis.legend(labelcolor=palette.ink)
    return figure


def explained_figure(results: Mapping[str, Any], palette: Palette = LIGHT) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.add_subplot()
    span = results["text_span"]
    layers = sorted({h.split(".")[0] for h in span["heads"]}, key=int)
    for head, curve in zip(span["heads"], span["explained"], strict=True):
        late = layers.index(head.split(".")[0]) / max(len(layers) - 1, 1)
        axis.plot(
            range(1, len(curve) + 1),
            [100 * v for v in curve],
            color=palette.text,
            alpha=0.25 + 0.7 * late,
            lw=1,
        )
    axis.set(
        xlabel="texts",
        ylabel="variance spanned, %",
        title="One line per attention head, later layers darker",
        ylim=(0, 102),
    )
    return figure


def strips(rows: Sequence[Strip]) -> Any:
    return lambda palette: image_strips(rows, palette)


def figures(results: Mapping[str, Any], shown: Mapping[str, Sequence[Strip]]) -> dict[str, Plot]:
    made: dict[str, tuple[Any, str]] = {
        "rebuilt": (
            lambda p: rebuilt_figure(results, p),
            "Accuracy against the number of texts per attention head.",
        ),
        "explained": (
            lambda p: explained_figure(results, p),
            "Share of each attention head's variance that its first texts span.",
        ),
    }
    captions = {
        "heads": "Images furthest along the first text of the attention heads that vary most; their first texts.",
        "neighbours": "A query (first image) and its nearest images by the whole embedding and by single attention heads.",
        "neurons": "Images with the largest second-order effect of a neuron; its direction in texts.",
        "texts": "Images and the texts that add up to them.",
    }
    made |= {k: (strips(shown[k]), caption) for k, caption in captions.items() if shown[k]}
    return {name: Plot(*draw(make, alt=caption), caption=caption) for name, (make, caption) in made.items()}


# -- the page ----------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Any], plots: Mapping[str, Plot]) -> Page:
    data, ablations, env = results["data"], results["ablations"], results["environment"]
    only = next((i for i, n in enumerate(ablations["names"]) if n.startswith("all but")), None)
    alone = ablations["direct"][only]["value"] if only is not None else None
    overlap = results["overlap"]
    steps = Table(["Step", "Seconds"], [[k, f"{v:.1f}"] for k, v in env["steps"].items()])
    tiles = [
        Tile("accuracy", percent(ablations["before"]["value"]), f"own text among {data['classes']:,}"),
        Tile("only the last layers' attention heads", percent(alone), "all else at its mean"),
        Tile("same texts, other half", percent(mean(overlap["texts"])), f"chance {percent(mean(overlap['texts_chance']))}"),
        Tile("neurons, rank 1", percent(results["neurons"]["mean_rank1"]), "second-order effects"),
    ]  # fmt: skip

    def with_plot(name: str, *blocks: Block) -> list[Block]:
        return [*([plots[name]] if name in plots else []), *blocks]

    sections = [
        Section("What attention heads say", with_plot("heads", TableBlock(head_table(results)), *with_plot("explained"))),
        Section("How far that holds", [TableBlock(overlap_table(results))]),
        Section("What the embedding loses", [TableBlock(ablation_table(results)), TableBlock(share_table(results))]),
        Section("Attention heads rebuilt from texts", with_plot("rebuilt", TableBlock(rebuilt_table(results)))),
        Section("Neighbours by one attention head", with_plot("neighbours")),
        Section("Neurons", with_plot("neurons", TableBlock(neuron_table(results)))),
        Section("Images in texts", with_plot("texts", TableBlock(code_table(results)))),
        *paper_sections(results),
        Section("How it was made", [
            Prose(results["settings"]["command"], "code"),
            Details("Seconds of each step", [TableBlock(steps)]),
        ]),
    ]  # fmt: skip
    return Page(
        f"What attention heads of {data['model']} say",
        [Section("In short", [Tiles(tiles)]), *sections],
        lead=f"{data['seen']:,} images of {data['name']} for means and texts, {ablations['n']:,} held out for accuracies.",
        kicker="mmhooks · decomposition",
        footer=[data["attribution"], f"Images: {data['licence']}"] if data["attribution"] else [],
    )


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def save_all(results: Mapping[str, Any], shown: Mapping[str, Sequence[Strip]], out: Path) -> list[Path]:
    """Writes the PNGs, ``tables.md`` and ``index.html``; returns the paths."""
    plots = figures(results, shown)
    paths = save_plots(plots, out)
    data = results["data"]
    source = f"{data['n']:,} pairs of {escaped(data['name'])}, licence: {escaped(data['licence'])}."
    head = f"# What attention heads of {escaped(data['model'])} say\n\n{source}\n\n"
    write_text(
        out / "tables.md",
        head + "\n\n".join(t.markdown() for t in tables(results)) + f"\n{paper_markdown(results)}",
    )
    return [*paths, out / "tables.md", page(results, plots).save(out / "index.html")]


def report(console: Any, results: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Prints the tables, then the paths of all files."""
    for table in tables(results):
        console.print(rich_text(table.markdown(), lines=True))
        console.print()
    print_paper(console, results)
    console.print(rich_text(f"{results['environment']['seconds']:.0f} s"))
    for path in paths:
        console.print(rich_text(f"  {path}"))
