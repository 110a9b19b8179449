"""Page of the gender study: figures, ``tables.md``, ``index.html``, and the summary printed at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mmhooks as mm
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.report import (
    Block,
    Details,
    Estimate,
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
    fixed,
    interval,
    percent,
)
from mmhooks.report.figures import Effect, image_strips, mask_effects
from mmhooks.report.style import LIGHT, Palette, draw
from mmhooks.studies.common.cards import FeatureExample, card, distinct_top_texts, format_duration, top_rows
from mmhooks.studies.common.cards import strip as feature_strip
from mmhooks.studies.common.claims import Claim
from mmhooks.studies.common.encode import Encoded
from mmhooks.studies.common.paper_report import paper_markdown, paper_sections, print_paper
from mmhooks.studies.common.write import save_plots
from mmhooks.studies.gender.masking import MAIN, SIDES, Setting
from mmhooks.studies.gender.samples import CLASSES
from mmhooks.studies.gender.tables import (
    audit_table,
    effect_table,
    feature_table,
    live_note,
    readings_table,
    separation_table,
    table6,
    table7,
    tone_table,
)
from mmhooks.utils.escape import markdown as escaped
from mmhooks.utils.escape import rich_text
from mmhooks.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAREFUL = (
    "“Woman” and “man” are the two labels of the paper. Here they come from a drawing's code points, a label column, or a "
    "classifier; there is no third label, so nothing here describes people who are neither, and nothing says who a person "
    "is. Drawings follow conventions: long hair and pink are their designers' choice, and a model that reads them has "
    "learned the convention. A gap between groups is a finding about this model and these images; no gap, on a few dozen "
    "drawings, is no proof of fairness. Do not use such a probability to decide anything about anybody."
)
AUDIT = (
    "All samples of the data, including those that the model was trained on (“seen”). Figures for one profession rest on "
    "a few drawings that differ only in skin tone, so they have no interval; the rows “all of” have one, over families of "
    "drawings. “Of unstated gender” are drawings and texts such as “farmer”: there is no right answer, and the column "
    "shows which of the two words the model leans to."
)
CODE = """model.attach(sae, at=["image.embed", "text.embed"], error_term=False)
with model.hooks(mask=imgd):
    z = model.encode_image(pixels)"""


# -- figures ---------------------------------------------------------------------------------------------------


def share_strip(rows: Sequence[tuple[str, Sequence[tuple[Any, float]]]], palette: Palette = LIGHT) -> Figure:
    """Draws Figure 5: a row of images per gender, ordered by the share of ImgD among their most active features."""
    from matplotlib.figure import Figure

    columns, side, left = max(len(images) for _, images in rows), 1.15, 0.9
    width, height = left + columns * side + 0.1, len(rows) * (side + 0.3) + 0.1
    figure = Figure(figsize=(width, height))
    for r, (name, images) in enumerate(rows):
        top = height - 0.05 - r * (side + 0.3)
        figure.text(
            0.1 / width, (top - side / 2) / height, name, fontsize=11, fontweight="bold", color=palette.ink
        )
        for c, (image, share) in enumerate(images):
            box = (left + c * side, top - side + 0.05, side - 0.1, side - 0.1)
            axis = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            axis.imshow(np.asarray(image.convert("RGB")), interpolation="lanczos")
            axis.set_axis_off()
            at = (left + c * side + (side - 0.1) / 2) / width, (top - side - 0.12) / height
            figure.text(*at, fixed(share, 2), fontsize=10, ha="center", color=palette.img)
    return figure


def figures(
    results: Mapping[str, Any], pairs: Any, shown: Mapping[str, Sequence[FeatureExample]]
) -> dict[str, Plot]:
    rows = [
        (name, [(pairs.image(p["row"]), p["share"]) for p in results["figure5"][name]["pictures"]])
        for name in CLASSES
    ]
    out = {
        "fig5_share": _plot(
            lambda p: share_strip(rows, p),
            "Images ordered by their share of ImgD features",
            "Figure 5. Images of women and of men by the share of ImgD among their 16 most active features, from the "
            "smallest to the largest share, evenly spaced by rank; not selected by hand.",
        )
    }
    effects = {
        {"image": "images", "text": "texts"}[side]: [
            Effect(g, g, cell["change"]["difference"]["value"], cell["random"]["draws"], cell["size"])
            for g in GROUPS
            for cell in [results["masking"][MAIN][side]["prompt"]["groups"][g]]
        ]
        for side in SIDES
    }
    out["masking"] = _plot(
        lambda p: mask_effects(effects, p, label="change of the own gender's probability, points"),
        "Change of probability when a group is masked, compared with random masks",
        "Change of the mean probability of the own gender when a group is masked (dot; number of features in brackets), "
        "compared with random masks of the same size (ticks; band: 95 %). Prompt labels, decoded.",
    )
    for side in SIDES:
        strips = [feature_strip(s) for s in shown[side][:6]]
        if strips:
            out[f"features_{side}"] = _plot(
                lambda p, strips=strips: image_strips(strips, p),
                f"Features that move the probability of {side}s most",
                f"The features whose single ablation moves the probability of {side}s most: top images and texts of all data.",
            )
    return out


def _plot(make: Any, alt: str, caption: str) -> Plot:
    light, dark = draw(make, alt=alt)
    return Plot(light, dark, caption)


def show(
    results: Mapping[str, Any], pairs: Any, setting: Setting, encoded: Encoded
) -> dict[str, list[FeatureExample]]:
    """Returns the strongest features with the images and texts, of all data, that activate them most."""
    latents = {}
    for side in SIDES:
        x = encoded.vectors(side)
        latents[side] = setting.head.encode(setting.head.prepare(x)).detach()
    best = {side: mm.top_activating(latents[side], m=8) for side in SIDES}
    counts = {side: (latents[side] > 0).sum(0) for side in SIDES}
    out: dict[str, list[FeatureExample]] = {}
    for side in SIDES:
        out[side] = []
        for row in results["features"][side]:
            k = row["feature"]
            score = float("nan") if row["score"] is None else row["score"]
            out[side].append(
                FeatureExample(
                    MAIN,
                    k,
                    row["group"],
                    score,
                    int(counts["image"][k]),
                    int(counts["text"][k]),
                    [(pairs.image(i), pairs.texts[i]) for i in top_rows(best["image"], k)],
                    [(pairs.texts[i], v) for i, v in distinct_top_texts(best["text"], k, pairs.texts)],
                )
            )
    return out


# -- the page --------------------------------------------------------------------------------------------------


def page(
    results: Mapping[str, Any],
    found: Sequence[Claim],
    plots: Mapping[str, Plot],
    shown: Mapping[str, Sequence[FeatureExample]],
) -> Page:
    data, env = results["data"], results["environment"]
    base = {side: results["masking"][MAIN][side]["prompt"]["base"] for side in SIDES}
    tiles = [
        Tile(
            f"Woman or man, {word}, by prompt",
            f"{percent(base[side]['accuracy']['value'])} %",
            f"{_interval(base[side]['accuracy'])}, n = {base[side]['accuracy']['n']:,}, chance 50 %",
        )
        for side, word in (("image", "images"), ("text", "texts"))
    ]
    tally = {v: sum(c.verdict == v for c in found) for v in ("same", "differs", "open")}
    tiles += [
        Tile("Claims of the paper", f"{tally['same']} of {len(found)} hold",
             f"{tally['differs']} differ, {tally['open']} undecided"),
        Tile("This run", format_duration(env["seconds"]), f"{env['threads']} threads, {env['peak_memory_gb']:.1f} GB at most"),
    ]  # fmt: skip
    r = {name: results["figure5"][name]["correlation"] for name in CLASSES}
    ranks = "; ".join(
        f"{n} {fixed(v['value'], plus=True)} {_interval(v, 1.0, 3)}".rstrip() for n, v in r.items()
    )
    galleries: list[Block] = [
        Gallery([card(s) for s in shown[side]], f"Top images and texts of those features, {side}s:")
        for side in SIDES
    ]
    tone: list[Block] = [TableBlock(tone_table(results))] if results["tones"] else []
    sections = [
        Section("At a glance", [Tiles(tiles), Prose(CAREFUL, "note"), plots["masking"]]),
        Section("Against the paper", [Listing([(c.verdict, c.claim, c.measured) for c in found]),
                                      Prose("The paper's Tables 6 and 7 are inconsistent.", "warn"),
                                      *[Prose(line) for line in results["conflict"]]]),
        Section("Masking", [Prose("A group is set to zero inside the live model; labels are never masked."), Prose(CODE, "code"),
                            TableBlock(table6(results)), TableBlock(table7(results)), TableBlock(effect_table(results)),
                            Details("Every reading: three kinds of labels, three spaces, two heads",
                                    [TableBlock(readings_table(results))])]),
        Section("Separation and drift", [TableBlock(separation_table(results))]),
        Section("Figure 5", [plots["fig5_share"],
                             Prose(f"Rank correlation of the share with the probability of the own gender: {ranks}.")]),
        Section("Which features carry it", [TableBlock(feature_table(results)), *galleries]),
        Section("Audit by skin tone and profession", [Prose(AUDIT), TableBlock(audit_table(results)), *tone]),
        *paper_sections(results),
        Section("How it was made", _settings(results)),
    ]  # fmt: skip
    return Page(
        "Which features say “woman” and “man”, in images and in texts?",
        sections,
        f"Case study 1 of “The Multi-Faceted Monosemanticity in Multimodal Representations”, run on `{data['model']}` and "
        f"{data['judged']['women']:,} women and {data['judged']['men']:,} men of {data['name']} in "
        f"{data['judged']['families']:,} families, none of which was fitted on.",
        "mmhooks · gender study",
        [
            f"Images and texts: {data['name']}; licence: {data['licence']}. {data['attribution']}",
            f"mmhooks {env['mmhooks']}, torch {env['torch']}, seed {results['settings']['seed']}. Apache-2.0.",
        ],
    )


def _interval(d: Mapping[str, Any], factor: float = 100.0, digits: int = 1) -> str:
    e = Estimate.from_json({k: (None if d[k] is None else factor * d[k]) for k in ("value", "low", "high")})
    return interval(e, digits)


def _settings(results: Mapping[str, Any]) -> list[Block]:
    data, env, o = results["data"], results["environment"], results["settings"]
    words = results["prompts"]
    facts = [
        ["Command", o["command"]],
        ["Model", data["model"]],
        ["Data", f"{data['name']}, {data['n']:,} pairs, fingerprint {data['fingerprint']}"],
        ["Fitted on", "{women:,} women, {men:,} men".format(**data["fitted"]) + " (centroids, probes, the choice of features)"],
        ["Judged", "{women:,} women, {men:,} men, {families:,} families".format(**data["judged"])],
        ["Judged texts that name a gender", f"{data['judged_texts_naming_a_gender']:,}"],
        ["Prompts", f"{words['template']}; " + "; ".join(f"{k}: {', '.join(v)}" for k, v in words["words"].items())],
        ["Scale of the cosine", f"{words['scale']:.2f} (the model's own)"],
        ["Groups", "; ".join(f"{k}: " + ", ".join(f"{g} {v[g]}" for g in GROUPS) for k, v in results["groups"].items())],
        ["Heads", "; ".join(f"{k}: {v['head']}" for k, v in results["groups"].items())],
        ["Live masks", live_note(results)],
    ]  # fmt: skip
    if data["confidence"]:
        facts.append(
            ["Classifier", f"{o['classifier']}; mean confidence {fixed(data['confidence']['mean'])}"]
        )
    if data["person_filter"]:
        facts.append(["Images of a person", person_sentence(data["person_filter"])])
    steps = [[name, format_duration(seconds)] for name, seconds in env["steps"].items()]
    return [
        TableBlock(Table(["", ""], facts, "Settings", text_columns=(0, 1))),
        Details("Seconds of each step", [TableBlock(Table(["Step", "Time"], steps))]),
    ]


def person_sentence(found: Mapping[str, Any]) -> str:
    """Returns how many samples the person filter left, and by which prompts."""
    person, *others = found["prompts"]
    before, after = found["before"], found["after"]
    kept = f"{after['woman']:,} of {before['woman']:,} women, {after['man']:,} of {before['man']:,} men"
    return f"kept {kept}: probability of “{person}” at least {found['least']:g} among {', '.join(others)}"


def markdown(results: Mapping[str, Any], found: Sequence[Claim]) -> str:
    data, env = results["data"], results["environment"]
    made = [table6, table7, separation_table, effect_table, feature_table, audit_table]
    made += [tone_table] if results["tones"] else []
    body = "\n\n".join(make(results).markdown() for make in (*made, readings_table))
    lines = "\n".join(f"- {escaped(c.sentence(), code=True)}" for c in found)
    against = "\n".join(f"- {escaped(line, code=True)}" for line in results["conflict"])
    return (
        f"# Gender study of {escaped(data['model'])}\n\n{CAREFUL}\n\n"
        f"{data['judged']['women']:,} women and {data['judged']['men']:,} men "
        f"judged, of {escaped(data['name'])}, licence: {escaped(data['licence'])}. "
        f"{format_duration(env['seconds'])}.\n\n{body}\n\n"
        f"## Against the paper\n\n{lines}\n\n## The paper's two tables\n\n{against}\n{paper_markdown(results)}"
    )


def save_all(
    results: Mapping[str, Any],
    found: Sequence[Claim],
    pairs: Any,
    setting: Setting,
    encoded: Encoded,
    out: Path,
) -> list[Path]:
    """Writes the PNGs, ``tables.md`` and ``index.html``; returns the paths."""
    shown = show(results, pairs, setting, encoded)
    plots = figures(results, pairs, shown)
    paths = save_plots(plots, out)
    write_text(out / "tables.md", markdown(results, found))
    return [*paths, out / "tables.md", page(results, found, plots, shown).save(out / "index.html")]


def report(console: Any, results: Mapping[str, Any], found: Sequence[Claim], paths: Sequence[Path]) -> None:
    """Prints the main tables and statements, then the paths of all files."""
    for made in (table6, table7, effect_table):
        console.print(rich_text(made(results).markdown(), lines=True), soft_wrap=True)
        console.print()
    for claim in found:
        console.print(rich_text(claim.sentence()))
    for line in results["conflict"]:
        console.print(rich_text(line))
    if results["data"]["person_filter"]:
        console.print(rich_text(person_sentence(results["data"]["person_filter"])))
    print_paper(console, results)
    env = results["environment"]
    console.print()
    console.print(rich_text(f"{env['seconds']:.0f} s, {env['peak_memory_gb']:.2f} GB at most"))
    for path in paths:
        console.print(rich_text(f"  {path}"))
