"""The modality study written down: tables, figures and the page, from the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modality_paper import MODELS, MONOSEMANTICITY, SIMILARITY, WIN_GAP, WIN_RATE, Claim, agreement, table1_differs
from PIL.Image import Image

from mmhooks.report import (
    Block,
    Cell,
    Details,
    Estimate,
    FeatureCard,
    Gallery,
    Listing,
    Page,
    Picture,
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
from mmhooks.report.figures import Effect, Histogram, Strip, beside_paper, mask_effects, mds_histograms, picture_strips
from mmhooks.report.style import draw

GROUPS = ("ImgD", "TextD", "CrossD")


@dataclass(frozen=True)
class Shown:
    """One feature with the samples that activate it most."""

    model: str
    feature: int
    group: str
    score: float
    pictures: int  # how many pictures and texts activate it at all
    texts: int
    top_images: Sequence[tuple[Image, str]]  # with the text of its pair
    top_texts: Sequence[tuple[str, float]]

    @property
    def title(self) -> str:
        return f"{self.model} · feature {self.feature} · {self.group}"

    @property
    def facts(self) -> str:
        return f"MDS {fixed(self.score, 2)} · active on {self.pictures:,} pictures and {self.texts:,} texts"


def estimate(results: Mapping[str, Any], model: str, *path: str) -> Estimate:
    value: Any = results["models"][model]
    for key in path:
        value = value[key]
    return Estimate.from_json(value)


def measured_models(results: Mapping[str, Any]) -> list[str]:
    return [m for m in MODELS if m in results["models"]]


# -- tables ----------------------------------------------------------------------------------------------------


def table1(results: Mapping[str, Any]) -> Table:
    models = measured_models(results)
    columns = [
        ("embed_sim", "image", {m: v[0] for m, v in SIMILARITY.items()}),
        ("embed_sim", "text", {m: v[1] for m, v in SIMILARITY.items()}),
        ("win_rate", "image", {m: v[0] for m, v in WIN_RATE.items()}),
        ("win_rate", "text", {m: v[1] for m, v in WIN_RATE.items()}),
    ]
    found = [{m: estimate(results, m, a, b) for m in models} for a, b, _ in columns]
    best = [max((m for m in models if f[m].known), key=lambda m: f[m].value, default="") for f in found]
    rows: list[list[str | Cell]] = []
    for m in models:
        cells: list[str | Cell] = [m]
        for f, top, (_, _, paper) in zip(found, best, columns, strict=True):
            cells.append(Cell.of(f[m], paper=paper[m], differs=table1_differs(f, paper, m), best=m == top))
        gap = estimate(results, m, "win_rate", "gap")
        # The paper prints |Δ|: its own columns give the sign.
        cells.append(Cell.of(gap, plus=True, paper=WIN_GAP[m]))
        cells.append(f"{found[0][m].n or 0:,} / {found[1][m].n or 0:,}")
        rows.append(cells)
    return Table(
        ["Model", "EmbedSim image", "EmbedSim text", "WinRate image", "WinRate text", "Δ image − text", "n image / text"],
        rows,
        "Table 1. How alike the samples are that activate one feature",
        "Mean over features (n of them), 95 % bootstrap interval over features, the paper's value below; ≠ where a "
        "model lies on the other side of CLIP than in the paper. Chance: EmbedSim 0, WinRate .5. The paper's model, "
        "data and picture embedder are others, so directions can be compared, sizes cannot.",
    )


def table2(results: Mapping[str, Any]) -> Table:
    models = measured_models(results)
    rows: list[list[str | Cell]] = []
    for i, (modality, word) in enumerate((("image", "Visual"), ("text", "Textual"))):
        found = {m: estimate(results, m, "monosemanticity", modality) for m in models}
        cells: list[str | Cell] = [word]
        for m in models:
            differs = agreement(found[m], MONOSEMANTICITY[m][i]) == "differs"
            cells.append(Cell.of(found[m], plus=True, paper=MONOSEMANTICITY[m][i], differs=differs))
        rows.append(cells)
        control: list[str | Cell] = [f"{word.lower()}, random groups of the same sizes"]
        for m in models:
            control.append(Cell.of(estimate(results, m, "monosemanticity", f"random_{modality}"), plus=True))
        rows.append(control)
    return Table(
        ["Modality", *models],
        rows,
        "Table 2. Visual and textual monosemanticity",
        "Visual: EmbedSim(ImgD) − EmbedSim(TextD) over pictures; textual: EmbedSim(TextD) − EmbedSim(ImgD) over texts. "
        "≠ where the sign is decided and is not the paper's. Controls: mean and 95 % range over random groups.",
    )


def group_table(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for m in measured_models(results):
        for group in GROUPS:
            g = results["models"][m]["groups"][group]
            rows.append(
                [
                    m, group, f"{g['size']:,}",
                    Cell.of(Estimate.from_json(g["embed_sim"]["image"])), f"{g['embed_sim']['image']['n']:,}",
                    Cell.of(Estimate.from_json(g["embed_sim"]["text"])), f"{g['embed_sim']['text']['n']:,}",
                ]
            )  # fmt: skip
    return Table(
        ["Model", "Group", "features", "EmbedSim image", "n", "EmbedSim text", "n"],
        rows,
        "EmbedSim of each group",
        "n: features of the group with at least two active samples in that modality; the others have no EmbedSim.",
        text_columns=(0, 1),
    )


def control_table(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for m in measured_models(results):
        r = results["models"][m]
        rows.append(
            [
                m, f"{r['n_features']:,}", f"{r['alive']:,}", f"{r['dead']:,}", f"{r['rare']:,}",
                Cell.of(estimate(results, m, "mds", "mu")), Cell.of(estimate(results, m, "mds", "sigma")),
                fixed(r["mds"]["ratio_of_means"]), fixed(r["mds"]["shuffled_r"]), fixed(r["mds"]["heldout_r"]),
                f"{r['embed_sim']['excluded']['image']:,} / {r['embed_sim']['excluded']['text']:,}",
            ]
        )  # fmt: skip
    return Table(
        [
            "Model", "features", "alive", "dead", "rare", "MDS μ", "MDS σ", "ratio of means", "r, shuffled pairs",
            "r, held-out pairs", "excluded image / text",
        ],
        rows,
        "MDS and its controls",
        "r, shuffled pairs: correlation of the scores with those of pairs whose texts were shuffled; close to 1 means "
        "that MDS is a statistic of the two marginals and hardly of the pairing. r, held-out pairs: with scores of "
        "pairs that no training saw. Excluded: pairs of samples that the paper's form of EmbedSim must leave out, "
        "because its random baseline is (nearly) zero there. Rare: active on fewer samples than a top list holds.",
    )  # fmt: skip


def mask_table(results: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for m in measured_models(results):
        r = results["models"][m]["masking"]
        for group in GROUPS:
            g = r["groups"][group]
            low, high = g["random_interval"]
            rows.append(
                [
                    m, group, f"{g['size']:,}",
                    _percent_cell(r["base"]["R@1"]), _percent_cell(g["R@1"]), percent(g["change"], plus=True),
                    f"{percent(g['random_mean'], plus=True)} [{percent(low)}, {percent(high)}]",
                    {"less": "less than random", "more": "more than random", "": "like random"}[g["beyond"]],
                ]
            )  # fmt: skip
    return Table(
        ["Model", "Masked", "features", "R@1 before", "R@1 after", "change", "random masks, same size", "harm"],
        rows,
        "What masking a group does to image→text retrieval",
        mask_note(results),
        text_columns=(0, 1, 7),
    )


def mask_note(results: Mapping[str, Any]) -> str:
    first = results["models"][measured_models(results)[0]]["masking"]
    worst = max(results["models"][m]["masking"]["by_hand"] for m in measured_models(results))
    return (
        f"n = {first['n']:,} held-out pairs, R@1 in percent with 95 % Wilson intervals, chance "
        f"{percent(first['chance']['R@1'], 2)} %. Each group was masked live with `with model.hooks(mask=group)` on both "
        f"towers; the largest difference from recomputing by hand was {worst:.1e}, and outputs after the context were "
        f"bit-equal to those before it. Random masks: {first['draws']:,} sets of as many alive features, mean and 95 % "
        "range. CLIP+NCL has no decoder: it is masked, and retrieval measured, in its own latent space."
    )


def _percent_cell(value: Mapping[str, Any]) -> Cell:
    e = Estimate.from_json(dict(value))
    return Cell(percent(e.value), f"[{percent(e.low)}, {percent(e.high)}]")


# -- figures ---------------------------------------------------------------------------------------------------


def figures(results: Mapping[str, Any], shown: Sequence[Shown], hero: str) -> dict[str, Plot]:
    """All figures by file name (without ending), each in a light and a dark dress."""
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
            "Histograms of the Modality Dominance Score, one panel a model",
            "Figure 1. Modality Dominance Scores of the alive features. Solid line: mean; dashed: one σ to each side, "
            "where the groups part.",
        )
    }
    for number, group in zip((2, 4, 3), ("ImgD", "CrossD", "TextD"), strict=True):
        strips = [strip(s) for s in shown if s.group == group and s.model == hero]
        if strips:
            out[f"fig{number}_{group.lower()}"] = _plot(
                lambda p, strips=strips: picture_strips(strips, p),
                f"Top pictures and texts of {group} features",
                f"Figure {number}. The eight pictures and the top texts of {group} features of {hero}.",
            )
    effects = {m: _effects(results, m) for m in models}
    out["masking"] = _plot(
        lambda p: mask_effects(effects, p),
        "Change of image-to-text R@1 when a group is masked, beside random masks",
        "Change of image→text R@1 when a group is masked (dot; number of features in brackets), beside random masks of "
        "the same size (ticks; band: 95 %).",
    )
    rows = {
        word: [(m, estimate(results, m, "monosemanticity", k), MONOSEMANTICITY[m][i]) for m in models]
        for i, (k, word) in enumerate((("image", "Visual"), ("text", "Textual")))
    }
    out["table2"] = _plot(
        lambda p: beside_paper(rows, p), "Monosemanticity, measured and in the paper", "Table 2 as a picture."
    )
    return out


def strip(s: Shown) -> Strip:
    title = f"{s.group}  ·  feature {s.feature}  ·  MDS {fixed(s.score, 2)}"
    return Strip(title, s.group, [image for image, _ in s.top_images], [text for text, _ in s.top_texts])


def _plot(make: Any, alt: str, caption: str) -> Plot:
    light, dark = draw(make, alt=alt)
    return Plot(light, dark, caption)


def _effects(results: Mapping[str, Any], model: str) -> list[Effect]:
    groups = results["models"][model]["masking"]["groups"]
    return [Effect(g, g, groups[g]["change"], groups[g]["random"], groups[g]["size"]) for g in GROUPS]


# -- the page --------------------------------------------------------------------------------------------------


def page(
    results: Mapping[str, Any], found: Sequence[Claim], shown: Sequence[Shown], plots: Mapping[str, Plot], hero: str
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
            Tile("This run", _minutes(env["seconds"]), f"{env['threads']} threads, {env['peak_memory_gb']:.1f} GB at most"),
        ]
    )  # fmt: skip
    sections = [
        Section("At a glance", [tiles, plots["fig1_mds"], TableBlock(control_table(results))]),
        Section("Against the paper", [Prose(COMPARED), Listing([(c.verdict, c.claim, c.measured) for c in found])]),
        Section("Interpretability", [TableBlock(table1(results)), TableBlock(table2(results)), plots["table2"],
                                     Details("EmbedSim of each group", [TableBlock(group_table(results))])]),
        Section("Features", _galleries(shown, hero, results)),
        Section("Masking", [Prose(MASKED), Prose(MASK_CODE, "code"), plots["masking"], TableBlock(mask_table(results))]),
        Section("How it was made", _made(results)),
    ]  # fmt: skip
    return Page(
        "Which features of CLIP belong to pictures, to texts, to both?",
        sections,
        f"Section 2 of “The Multi-Faceted Monosemanticity in Multimodal Representations”, run on `{data['model']}` and "
        f"{data['n']:,} pairs of {data['name']}. Every number carries its n and an interval.",
        "mmhooks · modality study",
        [f"Pictures and texts: {data['name']}; licence: {data['licence']}.",
         f"mmhooks {env['mmhooks']}, torch {env['torch']}, seed {results['settings']['seed']}. Apache-2.0."],
    )  # fmt: skip


COMPARED = (
    "Each statement of the paper's Section 2 that these models can speak to. “Differs” means that the 95 % interval "
    "lies wholly on the other side; where it holds zero, the statement is undecided."
)
MASKED = "The group is set to zero inside the live model, in both towers, and held-out pictures look for their texts."
MASK_CODE = "with model.hooks(mask=imgd):\n    image = model.encode_image(pixels)"


def _galleries(shown: Sequence[Shown], hero: str, results: Mapping[str, Any]) -> list[Block]:
    settings = results["settings"]
    how = (
        f"Features drawn at random (seed {settings['seed']}) among those of each group that are active on enough samples, "
        "not picked for their looks; pictures and texts by activation, strongest first (the paper's Figures 2–4 and "
        "Tables 3–5). A picture's tooltip is its text."
    )
    blocks: list[Block] = [Prose(how)]
    for group in ("ImgD", "CrossD", "TextD"):
        cards = [card(s) for s in shown if s.model == hero and s.group == group]
        blocks.append(Gallery(cards, f"{group} features of {hero}:"))
    for model in measured_models(results):
        if model != hero:
            cards = [card(s) for s in shown if s.model == model]
            blocks.append(Details(f"The same for {model}", [Gallery(cards)]))
    return blocks


def card(s: Shown) -> FeatureCard:
    group: Any = s.group
    return FeatureCard(
        f"Feature {s.feature} · {s.group}",
        group,
        s.facts,
        [Picture.of(image, text) for image, text in s.top_images],
        [(text, fixed(value, 2)) for text, value in s.top_texts],
        "No sample of this modality activates it.",
    )


def _made(results: Mapping[str, Any]) -> list[Block]:
    data, env, settings = results["data"], results["environment"], results["settings"]
    steps = [[name, _minutes(seconds)] for name, seconds in env["steps"].items()]
    facts = [
        ["Command", settings["command"]],
        ["Model", data["model"]],
        ["Data", f"{data['name']}, {data['n']:,} pairs, fingerprint {data['fingerprint']}"],
        ["Skipped pairs", f"{data['skipped']:,}"],
        ["Heads", "; ".join(f"{m}: {r['head']}" for m, r in results["models"].items() if r["head"])],
        ["Raw features", "CLIP and DeCLIP: |x| of the embedding's coordinates (signed values make the ratio unstable)"],
        ["Embedders", f"pictures {settings['image_embedder']}, texts {settings['text_embedder']}"],
        ["Top samples", f"m = {settings['top_m']}"],
        ["Versions", ", ".join(f"{k} {env[k]}" for k in ("python", "mmhooks", "torch", "open_clip"))],
    ]
    return [
        TableBlock(Table(["", ""], facts, "Settings", text_columns=(0, 1))),
        Details("Seconds of each step", [TableBlock(Table(["Step", "Time"], steps))]),
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def markdown(results: Mapping[str, Any], found: Sequence[Claim]) -> str:
    """``tables.md``: all tables and every statement, in Markdown."""
    data, env = results["data"], results["environment"]
    head = (
        f"# Modality study of {data['model']}\n\n{data['n']:,} pairs of {data['name']} ({data['heldout']:,} held out), "
        f"licence: {data['licence']}. {_minutes(env['seconds'])}, {env['peak_memory_gb']:.1f} GB at most.\n"
    )
    made = [table1, table2, group_table, control_table, mask_table]
    body = "\n\n".join(make(results).markdown() for make in made)
    lines = "\n".join(f"- {c.sentence()}" for c in found)
    return f"{head}\n{body}\n\n## Against the paper\n\n{lines}\n"


def save_all(
    results: Mapping[str, Any], found: Sequence[Claim], shown: Sequence[Shown], out: Path, hero: str
) -> list[Path]:
    """Writes the PNGs, ``tables.md`` and ``index.html``; returns the paths."""
    plots = figures(results, shown, hero)
    paths = []
    for name, plot in plots.items():
        path = out / f"{name}.png"
        path.write_bytes(plot.light.data)
        paths.append(path)
    (out / "tables.md").write_text(markdown(results, found), encoding="utf-8")
    return [*paths, out / "tables.md", page(results, found, shown, plots, hero).save(out / "index.html")]
