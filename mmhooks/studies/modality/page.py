"""Page of the modality study: figures, ``tables.md`` and ``index.html``, from the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.report import (
    Block,
    Details,
    Gallery,
    Listing,
    Page,
    Plot,
    Prose,
    Section,
    Table,
    TableBlock,
    Tile,
    Tiles,
    percent,
)
from mmhooks.report.figures import (
    Effect,
    Histogram,
    Scatter,
    beside_paper,
    image_strips,
    mask_effects,
    mds_histograms,
    score_scatter,
    summary,
)
from mmhooks.report.style import draw
from mmhooks.studies.common.cards import FeatureExample, card, format_duration, strip
from mmhooks.studies.common.claims import Claim
from mmhooks.studies.common.paper_report import paper_markdown, paper_sections, print_paper
from mmhooks.studies.common.write import save_plots
from mmhooks.studies.modality.cross_modal import cross_modal_table
from mmhooks.studies.modality.definitions import definition_table, verdict_table
from mmhooks.studies.modality.paper import MONOSEMANTICITY
from mmhooks.studies.modality.seeds import seed_numbers_table, seed_table
from mmhooks.studies.modality.tables import (
    control_table,
    estimate,
    forms_table,
    group_table,
    mask_table,
    measured_models,
    table1,
    table2,
)
from mmhooks.utils.escape import markdown as escaped
from mmhooks.utils.escape import rich_text
from mmhooks.utils.files import write_text

# -- figures ---------------------------------------------------------------------------------------------------


def figures(results: Mapping[str, Any], shown: Sequence[FeatureExample], hero: str) -> dict[str, Plot]:
    """Returns all figures by file name (without suffix), each in light and dark colours."""
    models = measured_models(results)
    panels = []
    for m in models:
        r = results["models"][m]
        scores = [float("nan") if s is None else s for s in r["mds"]["scores"]]
        sizes = {g: r["groups"][g]["size"] for g in GROUPS}
        mu, sigma = r["mds"]["mu"]["value"], r["mds"]["sigma"]["value"]
        panels.append(Histogram(m, scores, mu, sigma, sizes))
    out = {
        "fig1_mds": _plot(
            lambda p: mds_histograms(panels, p),
            "Histograms of the Modality Dominance Score, one panel per model",
            "Figure 1. Modality Dominance Scores of the alive features. Solid line: mean; dashed: one σ to each side, "
            "the boundaries of the groups.",
        )
    }
    firsts = [s for g in ("ImgD", "CrossD", "TextD") for s in shown if s.model == hero and s.group == g]
    chosen = [next(s for s in firsts if s.group == g) for g in dict.fromkeys(s.group for s in firsts)]
    if chosen:
        panel = panels[models.index(hero)]
        out["summary"] = _plot(
            lambda p: summary(panel, [strip(s) for s in chosen], p), "The result in one figure"
        )
    for number, group in zip((2, 4, 3), ("ImgD", "CrossD", "TextD"), strict=True):
        strips = [strip(s) for s in shown if s.group == group and s.model == hero]
        if strips:
            out[f"fig{number}_{group.lower()}"] = _plot(
                lambda p, strips=strips: image_strips(strips, p),
                f"Top images and texts of {group} features",
                f"Figure {number}. The eight images and the top texts of {group} features of {hero}.",
            )
    effects = {m: _effects(results, m) for m in models}
    out["masking"] = _plot(
        lambda p: mask_effects(effects, p),
        "Change of image-to-text R@1 when a group is masked, compared with random masks",
        "Change of image→text R@1 when a group is masked (dot; number of features in brackets), compared with random "
        "masks of the same size (ticks; band: 95 %).",
    )
    out["cross_modal"] = _plot(
        lambda p: score_scatter([_scatter(results, m) for m in models if m != "CLIP" and m != "DeCLIP"], p),
        "MDS of every feature against its lift on pairs; features cross-modal by both criteria are marked",
        "Each dot is a feature: its MDS, and how many times more often it fires on both sides of a pair than with shuffled "
        "texts (logarithmic; the line is chance). Filled: paired at a false discovery rate of .05. Ringed: retrieval relies on "
        "it in both modalities.",
    )
    rows = {
        word: [(m, estimate(results, m, "monosemanticity", k), MONOSEMANTICITY[m][i]) for m in models]
        for i, (k, word) in enumerate((("image", "Visual"), ("text", "Textual")))
    }
    out["table2"] = _plot(
        lambda p: beside_paper(rows, p), "Monosemanticity, measured and in the paper", "Table 2 as a figure."
    )
    return out


def _scatter(results: Mapping[str, Any], model: str) -> Scatter:
    r = results["models"][model]
    cross = r["cross_modal"]
    mu, sigma = r["mds"]["mu"]["value"], r["mds"]["sigma"]["value"]
    names = [
        "" if s is None else "ImgD" if s > mu + sigma else "TextD" if s < mu - sigma else "CrossD"
        for s in r["mds"]["scores"]
    ]
    return Scatter(model, r["mds"]["scores"], cross["lift"], names, cross["is_paired"], cross["is_causal"])


def _plot(make: Any, alt: str, caption: str = "") -> Plot:
    light, dark = draw(make, alt=alt)
    return Plot(light, dark, caption)


def _effects(results: Mapping[str, Any], model: str) -> list[Effect]:
    groups = results["models"][model]["masking"]["groups"]
    return [Effect(g, g, groups[g]["change"], groups[g]["random"], groups[g]["size"]) for g in GROUPS]


# -- the page --------------------------------------------------------------------------------------------------


def page(
    results: Mapping[str, Any],
    found: Sequence[Claim],
    shown: Sequence[FeatureExample],
    plots: Mapping[str, Plot],
    hero: str,
) -> Page:
    data, env = results["data"], results["environment"]
    tally = {v: sum(c.verdict == v for c in found) for v in ("same", "differs", "open")}
    base = results["models"][measured_models(results)[0]]["masking"]
    tiles = Tiles(
        [
            Tile("Pairs", f"{data['n']:,}", f"{data['name']}; {data['heldout']:,} held out"),
            Tile("Retrieval image→text, R@10", f"{percent(base['base']['R@10']['value'])} %",
                 f"n = {base['n']:,}, chance {percent(base['chance']['R@10'])} %"),
            Tile("Claims of the paper", f"{tally['same']} of {len(found)} hold",
                 f"{tally['differs']} differ, {tally['open']} undecided"),
            Tile("This run", format_duration(env["seconds"]),
                 f"{env['threads']} threads, {env['peak_memory_gb']:.1f} GB at most"),
        ]
    )  # fmt: skip
    sections = [
        Section("At a glance", [tiles, plots["fig1_mds"], TableBlock(control_table(results))]),
        Section("Features", _galleries(shown, hero, results)),
        Section("Against the paper", [Prose(COMPARED), Listing([(c.verdict, c.claim, c.measured) for c in found])]),
        Section("Interpretability", [TableBlock(table1(results)), TableBlock(table2(results)), plots["table2"],
                                     Details("EmbedSim of each group, and its other forms",
                                             [TableBlock(t(results)) for t in (group_table, forms_table)])]),
        Section("Cross-modal by the pairing", [Prose(PAIRED), TableBlock(cross_modal_table(results, measured_models(results))),
                                               plots["cross_modal"]]),
        Section("Other training seeds", [TableBlock(made(results)) for made in _seed_tables(results)]
                or [Prose("Heads of one seed; `--seeds 5` measures those of others too.")]),
        Section("Other definitions", [TableBlock(verdict_table(results)),
                                      Details("The numbers", [TableBlock(definition_table(results, measured_models(results)))])]),
        Section("Masking", [Prose(MASKED), Prose(MASK_CODE, "code"), plots["masking"], TableBlock(mask_table(results))]),
        *paper_sections(results),
        Section("How it was made", _settings(results)),
    ]  # fmt: skip
    return Page(
        "Which features of CLIP belong to images, to texts, or to both?",
        sections,
        f"Section 2 of “The Multi-Faceted Monosemanticity in Multimodal Representations”, run on `{data['model']}` and "
        f"{data['n']:,} pairs of {data['name']}. Every number carries its n and an interval.",
        "mmhooks · modality study",
        [f"Images and texts: {data['name']}; licence: {data['licence']}. {data['attribution']}",
         f"mmhooks {env['mmhooks']}, torch {env['torch']}, seed {results['settings']['seed']}. Apache-2.0."],
    )  # fmt: skip


COMPARED = (
    "Each statement of the paper's Section 2 that these models can test. All are tested together (Holm): “holds” and "
    "“differs” are decided at .05 over all of them, the others are undecided."
)
PAIRED = (
    "MDS is nearly the same if the texts are shuffled: it says how often a feature fires on each side, not whether it means "
    "the same on both. Two measures see the pairing: whether the feature fires on both sides of the same pair, and what "
    "masking it does to retrieval."
)
MASKED = "The group is set to zero inside the live model, in both towers; then held-out images retrieve their texts."
MASK_CODE = "with model.hooks(mask=imgd):\n    image = model.encode_image(pixels)"


def _galleries(shown: Sequence[FeatureExample], hero: str, results: Mapping[str, Any]) -> list[Block]:
    settings = results["settings"]
    how = (
        f"Features drawn at random (seed {settings['seed']}) among those of each group that are active on enough samples, "
        "not selected by hand; images and texts by activation, strongest first (the paper's Figures 2–4 and "
        "Tables 3–5). An image's tooltip is its text."
    )
    blocks: list[Block] = [Prose(how)]
    for group in ("ImgD", "CrossD", "TextD"):
        cards = [card(s) for s in shown if s.model == hero and s.group == group]
        blocks.append(
            Gallery(cards, f"{group} features of {hero}:" + ("" if cards else " none falls in this group."))
        )
    for model in measured_models(results):
        if model != hero:
            cards = [card(s) for s in shown if s.model == model]
            blocks.append(Details(f"The same for {model}", [Gallery(cards)]))
    return blocks


def _seed_tables(results: Mapping[str, Any]) -> list[Callable[[Mapping[str, Any]], Table]]:
    return [seed_table, seed_numbers_table] if len(results["seeds"]["verdicts"]) > 1 else []


ACTIVATIONS = {
    "abs": "|x| of the embedding's coordinates (signed values make the ratio unstable)",
    "relu": "the positive part of the embedding's coordinates",
    "raw": "the embedding's coordinates as they are",
}


def _settings(results: Mapping[str, Any]) -> list[Block]:
    data, env, settings = results["data"], results["environment"], results["settings"]
    steps = [[name, format_duration(seconds)] for name, seconds in env["steps"].items()]
    facts = [
        ["Command", settings["command"]],
        ["Model", data["model"]],
        ["Data", f"{data['name']}, {data['n']:,} pairs, fingerprint {data['fingerprint']}"],
        ["Skipped pairs", f"{data['skipped']:,}"],
        ["Heads", "; ".join(f"{m}: {r['head']}" for m, r in results["models"].items() if r["head"])],
        [
            "Raw features",
            f"CLIP and DeCLIP: {ACTIVATIONS[settings['activation']]}",
        ],
        [
            "Families",
            f"{results['models'][measured_models(results)[0]]['families']:,} (one sample of each in a list)",
        ],
        ["Embedders", f"images {settings['image_embedder']}, texts {settings['text_embedder']}"],
        [
            "Top samples",
            f"m = {settings['top_m']}, at least {settings['min_samples']}, zeros: {settings['zeros']}",
        ],
        ["Versions", ", ".join(f"{k} {env[k]}" for k in ("python", "mmhooks", "torch", "open_clip"))],
    ]
    return [
        TableBlock(Table(["", ""], facts, "Settings", text_columns=(0, 1))),
        Details("Seconds of each step", [TableBlock(Table(["Step", "Time"], steps))]),
    ]


def markdown(results: Mapping[str, Any], found: Sequence[Claim]) -> str:
    """Returns the content of ``tables.md``: all tables and every statement."""
    data, env = results["data"], results["environment"]
    head = (
        f"# Modality study of {escaped(data['model'])}\n\n"
        f"{data['n']:,} pairs of {escaped(data['name'])} ({data['heldout']:,} held out), "
        f"licence: {escaped(data['licence'])}. {format_duration(env['seconds'])}, {env['peak_memory_gb']:.1f} GB at most.\n"
    )
    models = measured_models(results)
    made = [
        table1,
        table2,
        group_table,
        forms_table,
        control_table,
        mask_table,
        verdict_table,
        *_seed_tables(results),
    ]
    tables = [
        *(make(results) for make in made),
        definition_table(results, models),
        cross_modal_table(results, models),
    ]
    body = "\n\n".join(table.markdown() for table in tables)
    lines = "\n".join(f"- {escaped(c.sentence(), code=True)}" for c in found)
    return f"{head}\n{body}\n\n## Against the paper\n\n{lines}\n{paper_markdown(results)}"


def save_all(
    results: Mapping[str, Any], found: Sequence[Claim], shown: Sequence[FeatureExample], out: Path, hero: str
) -> list[Path]:
    """Writes the PNGs, ``tables.md`` and ``index.html``; returns the paths."""
    plots = figures(results, shown, hero)
    paths = save_plots(plots, out)
    write_text(out / "tables.md", markdown(results, found))
    return [*paths, out / "tables.md", page(results, found, shown, plots, hero).save(out / "index.html")]


def report(console: Any, results: Mapping[str, Any], found: Sequence[Claim], paths: Sequence[Path]) -> None:
    """Prints the tables and statements, then the paths of all files."""
    from rich.table import Table as Grid

    for made in (control_table, table1, table2, mask_table):
        table = made(results)
        grid = Grid(
            title=rich_text(table.caption),
            title_justify="left",
            caption=rich_text(table.note),
            caption_justify="left",
        )
        for i, column in enumerate(table.columns):
            grid.add_column(rich_text(column), justify="left" if i in table.text_columns else "right")
        for row in table.cells():
            lines = (
                "\n".join(p for p in (c.text, c.interval, f"paper {c.paper}" if c.paper else "") if p)
                for c in row
            )
            shown = (f"{line} ≠" if c.differs else line for line, c in zip(lines, row, strict=True))
            grid.add_row(*(rich_text(line, lines=True) for line in shown))
        console.print(grid)
        console.print()
    for claim in found:
        console.print(rich_text(claim.sentence()))
    print_paper(console, results)
    env = results["environment"]
    console.print()
    console.print(
        rich_text(f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB at most, {env['threads']} threads")
    )
    for path in paths:
        console.print(rich_text(f"  {path}"))
