"""The tables of the modality study, from the numbers of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.report import Cell, Estimate, Table, fixed, percent
from mmhooks.studies.common.claims import agreement
from mmhooks.studies.modality.paper import (
    MODELS,
    MONOSEMANTICITY,
    SIMILARITY,
    WIN_GAP,
    WIN_RATE,
    table1_differs,
)


def estimate(results: Mapping[str, Any], model: str, *path: str) -> Estimate:
    value: Any = results["models"][model]
    for key in path:
        value = value[key]
    return Estimate.from_json(value)


def measured_models(results: Mapping[str, Any]) -> list[str]:
    return [m for m in MODELS if m in results["models"]]


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
        [
            "Model",
            "EmbedSim image",
            "EmbedSim text",
            "WinRate image",
            "WinRate text",
            "Δ image − text",
            "n image / text",
        ],
        rows,
        "Table 1. Similarity of the samples that activate one feature",
        f"Mean over n features, 95 % interval over features and {_families(results)} families of pairs (a list of top samples "
        "holds one sample per family), the paper's value in brackets; ≠ where a "
        "model lies on the other side of CLIP than in the paper. Chance: EmbedSim 0, WinRate .5. The paper uses another "
        "model, other data and another image embedder, so directions can be compared, sizes cannot.",
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
        control += [
            Cell.of(estimate(results, m, "monosemanticity", f"random_{modality}"), plus=True) for m in models
        ]
        rows.append(control)
    return Table(
        ["Modality", *models],
        rows,
        "Table 2. Visual and textual monosemanticity",
        "Visual: EmbedSim(ImgD) − EmbedSim(TextD) over images; textual: EmbedSim(TextD) − EmbedSim(ImgD) over texts. "
        "≠ where the sign is decided and differs from the paper's. Intervals over features and families, with the groups "
        "formed anew; n counts features. Controls: mean and 95 % range over random groups.",
    )


def _families(results: Mapping[str, Any]) -> str:
    return f"{results['models'][measured_models(results)[0]]['families']:,}"


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


def forms_table(results: Mapping[str, Any]) -> Table:
    found = [
        (m, results["models"][m]["embed_sim"], k) for m in measured_models(results) for k in ("image", "text")
    ]
    rows: list[list[str | Cell]] = [
        [
            m, k, fixed(sim["s_minus"][k]), Cell.of(Estimate.from_json(sim["difference"][k])),
            Cell.of(Estimate.from_json(sim[k])), Cell.of(Estimate.from_json(sim["paper"][k])),
            f"{sim['excluded'][k]:,} of {sim['compared'][k]:,}",
        ]
        for m, sim, k in found
    ]  # fmt: skip
    return Table(
        ["Model", "Samples", "S−", "S+ − S−", "(S+ − S−) / |S−|", "paper's form", "excluded pairs"],
        rows,
        "Three forms of EmbedSim",
        "Tables 1 and 2 use the ratio of means. The paper's mean of element-wise ratios is heavy-tailed where random "
        "cosines come near zero; pairs whose random cosine is below .001 in size are excluded from it.",
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
        "that MDS is a statistic of the two marginals and hardly of the pairing. r, held-out pairs: correlation of the scores of "
        "pairs that training may have seen with those of pairs that it did not. Excluded: pairs of samples that the paper's "
        "form of EmbedSim must exclude, "
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
                    _effect_against_random(g),
                ]
            )  # fmt: skip
    return Table(
        [
            "Model",
            "Masked",
            "features",
            "R@1 before",
            "R@1 after",
            "change",
            "random masks, same size",
            "effect",
        ],
        rows,
        "Effect of masking a group on image→text retrieval",
        mask_note(results),
        text_columns=(0, 1, 7),
    )


def _effect_against_random(group: Mapping[str, Any]) -> str:
    if not group["size"]:
        return "nothing to mask"
    return {"less": "less than random", "more": "more than random", "": "like random"}[group["beyond"]]


def mask_note(results: Mapping[str, Any]) -> str:
    first = results["models"][measured_models(results)[0]]["masking"]
    clean = all(results["models"][m]["masking"]["bit_equal_after"] for m in measured_models(results))
    worst = max(results["models"][m]["masking"]["by_hand"] for m in measured_models(results))
    return (
        f"n = {first['n']:,} held-out pairs, R@1 in percent with 95 % Wilson intervals, chance "
        f"{percent(first['chance']['R@1'], 2)} %. Each group was masked live with `with model.hooks(mask=group)` on both "
        f"towers; the largest difference from recomputing by hand was {worst:.1e}, and outputs after the context were "
        f"{'bit-equal' if clean else 'NOT equal'} to those before it. "
        f"Random masks: {first['draws']:,} sets of as many alive features, mean and 95 % "
        "range. CLIP+NCL has no decoder: it is masked, and retrieval measured, in its own latent space."
    )


def _percent_cell(value: Mapping[str, Any]) -> Cell:
    e = Estimate.from_json(dict(value))
    return Cell(percent(e.value), f"[{percent(e.low)}, {percent(e.high)}]")
