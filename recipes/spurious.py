"""Taking a spurious cue out of CLIP: attention heads that carry the background, ablated live.

Section 4 of "Interpreting CLIP's Image Representation via Text-Based Decomposition", on a Waterbirds-shaped task: land
and water animals before land and water. TextSpan names each attention head; those whose texts are places are set to
their mean. They are chosen on other pictures, of other animals, than they are judged on.

    python recipes/spurious.py --out runs/spurious
    python recipes/spurious.py --model ViT-L-14 --pretrained laion2b_s32b_b82k --data waterbirds/
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Bool, Float
from spurious_judge import Head, Runner, compared, measured, spread, worst_group
from spurious_page import accuracy_table, counted, groups_plot, heads_table, splits_table
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.cli.clear_errors import clear_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SIZES = (1, 2, 3, 4, 6, 8, 10)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="mini, or any open_clip name of a ViT.")] = "mini",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag, or a checkpoint file.")] = None,
    data: Annotated[
        str,
        typer.Option(
            help="mini, or what datasets loads: splits validation and test, columns image, y, place."
        ),
    ] = "mini",
    classes: Annotated[
        str, typer.Option(help="Texts of both classes, for --data: 'a landbird,a waterbird'.")
    ] = ("a landbird,a waterbird"),
    label: Annotated[str, typer.Option(help="Column of the class, 0 or 1, for --data.")] = "y",
    place: Annotated[str, typer.Option(help="Column of the background, 0 or 1, for --data.")] = "place",
    kinds: Annotated[
        str, typer.Option(help="Kinds of the text pool that are backgrounds.")
    ] = "place,weather",
    correlation: Annotated[
        float, typer.Option(help="Animals that stand where they live, where heads are chosen.")
    ] = 0.95,
    scale: Annotated[float, typer.Option(help="Width of an animal in its picture.")] = 0.5,
    layers: Annotated[
        int, typer.Option(min=1, help="Attention heads of so many last layers are looked at.")
    ] = 4,
    limit: Annotated[
        int, typer.Option(min=8, help="Pictures to choose on, and to judge by, in every split.")
    ] = 400,
    splits: Annotated[
        int,
        typer.Option(min=1, help="Splits of the drawn animals into those chosen on and judged by, pooled."),
    ] = 4,
    draws: Annotated[int, typer.Option(min=2, help="Random sets of attention heads, in every split.")] = 10,
    seed: Annotated[int, typer.Option(help="Of pictures, bootstrap and random attention heads.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    out: Annotated[Path, typer.Option(help="Where results, tables, figures and index.html go.")] = Path(
        "runs/spurious"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="No bar and no tables on the screen.")] = False,
) -> None:
    """Worst-group accuracy before and after attention heads that carry the background are mean-ablated."""
    options = {k: v for k, v in locals().items()}
    with clear_errors("spurious"):
        study(**options)


def study(
    model: str = "mini",
    pretrained: str | None = None,
    data: str = "mini",
    classes: str = "a landbird,a waterbird",
    *,
    label: str = "y",
    place: str = "place",
    pool: str = "general",
    kinds: str = "place,weather",
    correlation: float = 0.95,
    scale: float = 0.5,
    layers: int = 4,
    limit: int = 400,
    splits: int = 4,
    draws: int = 10,
    seed: int = 0,
    batch: int = 64,
    out: str | Path = "runs/spurious",
    quiet: bool = False,
) -> dict[str, Any]:
    """The whole study; writes everything under ``out`` and returns the results."""
    start = time.perf_counter()
    settings = {k: str(v) for k, v in locals().items() if k not in ("start", "quiet", "out")}
    from spurious_data import drawn, real
    from study_page import environment, show, write_study

    import mmhooks as mm
    from mmhooks.analysis.embed_texts import embed_texts

    torch.manual_seed(seed)
    hooked = mm.load(model, pretrained=pretrained)
    if data == "mini":
        found = [
            drawn(hooked.preprocess, n=limit, correlation=correlation, scale=scale, seed=seed + i)
            for i in range(splits)
        ]
    else:  # its own split is the only one
        one, other = (text.strip() for text in classes.split(",", 1))
        found = [
            real(
                hooked.preprocess, data, label=label, place=place, names=(one, other), limit=limit, seed=seed
            )
        ]
    texts = mm.data.text_pool(pool)
    embedded = embed_texts(hooked, texts.texts)
    trials = [
        trial(
            hooked, own, texts, embedded, kinds.split(","), layers=layers, draws=draws, seed=seed + i, batch=batch,
            quiet=quiet, title=f"split {i + 1} of {len(found)}",
        )
        for i, own in enumerate(found)
    ]  # fmt: skip
    groups = torch.cat([own.judge.groups for own in found])
    shares = torch.stack([own.shares for own in found]).mean(0)
    right = {name: torch.cat([t.right[name] for t in trials]) for name in trials[0].right}
    report = {name: measured(r, groups, shares, seed) for name, r in right.items()}
    claims, randoms = [], {}
    for name in trials[0].chosen:
        worst = [
            worst_group(torch.cat(parts), groups)
            for parts in zip(*(t.random[name] for t in trials), strict=True)
        ]
        randoms[name] = spread(torch.tensor(worst))
        counts = [len(t.chosen[name]) for t in trials]
        made = compared(name, counts, right, groups, randoms[name], seed)
        if name == "TextSpan":  # where it fails, this is why: the texts do not reach what the head carries
            reach = max(t.reach for t in trials)
            why = f"; texts of backgrounds span at most {100 * reach:.0f} % of any attention head's variance"
            made = [(v, claim, told if v == "same" else told + why) for v, claim, told in made]
        claims += made
    heads = {name: [[f"{n}.{h}" for n, h in t.chosen[name]] for t in trials] for name in trials[0].chosen}
    results = {
        "settings": settings,
        "n": {"choose": sum(len(own.choose.places) for own in found), "judge": len(groups)},
        "shares_where_chosen": shares,
        "heads": heads,
        "texts": [t.texts for t in trials],
        "accuracy": report,
        "random": randoms,
        "worst_by_split": {
            name: [worst_group(t.right[name], own.judge.groups) for t, own in zip(trials, found, strict=True)]
            for name in right
        },
        "claims": [list(claim) for claim in claims],
        "environment": environment(start),
    }
    tables = [
        accuracy_table(report, randoms),
        splits_table(results["worst_by_split"], heads),
        heads_table(heads, [t.texts for t in trials]),
    ]
    paths = write_study(
        Path(out),
        results,
        title="A background taken out of CLIP: attention heads against a spurious cue",
        lead=f"Land and water animals before land and water, model {model}. Attention heads of the last {layers} "
        f"layers are chosen on {results['n']['choose']} pictures and judged on {len(groups)} others, of other animals "
        f"where they are drawn; splits: {len(found)}. An attention head's output is set, live, to its mean over the former.",
        claims=claims,
        tables=tables,
        plots={"groups": groups_plot(report, randoms)},
        notes=[
            f"TextSpan's heads: by the variance along those of their twenty texts that are of the kinds {kinds}. "
            "Contrast: by how much an attention head moves "
            "along the difference of the class texts when the background changes, animals held fixed. How many of each: the "
            "number with the best worst group where they are chosen, in every split anew. Random: as many of the same layers, "
            f"{draws} draws. The average is weighted by the groups' shares where heads are chosen."
        ],
        attribution=found[0].attribution,
    )
    if not quiet:
        show(results, tables, claims, paths)
    return results


@dataclass(frozen=True)
class Trial:
    """What one split gave: the heads of every way of choosing, who is classified rightly without them, and as much for
    random ones; every head's texts and the largest share of a head's variance that texts of backgrounds span."""

    chosen: dict[str, list[Head]]
    right: dict[str, Bool[Tensor, " n"]]
    random: dict[str, list[Bool[Tensor, " n"]]]
    texts: dict[str, list[str]]
    reach: float


def trial(
    hooked: Any, found: Any, pool: Any, embedded: Float[Tensor, "t e"], kinds: Sequence[str], *, layers: int, draws: int,
    seed: int, batch: int, quiet: bool, title: str,
) -> Trial:  # fmt: skip
    """Attention heads chosen on one half of the animals and judged on the other."""
    from mmhooks.analysis.ablate import site_means
    from mmhooks.analysis.decompose_data import head_outputs
    from mmhooks.data.progress import track

    texts = class_texts(hooked, found.names)
    outputs = head_outputs(hooked, found.choose.pixels, normalize=True, batch_size=batch, progress=not quiet)
    depth, n_heads = outputs.shape[1:3]
    looked = list(range(max(0, depth - layers), depth))
    named, ranked, reach = by_text_span(pool, embedded, outputs[:, looked], looked, kinds)
    rankings = {"TextSpan": ranked, "contrast": by_contrast(outputs[:, looked], looked, found.choose, texts)}
    means = site_means(
        hooked, found.choose.pixels, [f"image.blocks.{n}.attn.head_out" for n in looked], batch_size=batch
    )
    run = Runner(hooked, means, texts, batch)
    # How many heads: by the worst group where they are chosen, never where they are judged.
    chosen: dict[str, list[Head]] = {}
    for name, order in rankings.items():
        sizes = [k for k in SIZES if k <= len(order)]
        worst = [worst_group(run(order[:k], found.choose), found.choose.groups) for k in sizes]
        chosen[name] = order[: sizes[worst.index(max(worst))]] if sizes else []
    right = {"plain": run([], found.judge)} | {name: run(own, found.judge) for name, own in chosen.items()}
    everything = [(n, h) for n in looked for h in range(n_heads)]
    random: dict[str, list[Tensor]] = {}
    for name, own in chosen.items():
        generator = torch.Generator().manual_seed(seed)
        random[name] = [
            run(
                [everything[i] for i in torch.randperm(len(everything), generator=generator)[: len(own)]],
                found.judge,
            )
            for _ in track(range(draws), draws, f"{title}: {counted([len(own)], 'random')}", show=not quiet)
        ]
    return Trial(chosen, right, random, named, reach)


# -- choosing ------------------------------------------------------------------------------------------------


def class_texts(hooked: Any, names: tuple[list[str], list[str]]) -> Float[Tensor, "2 e"]:
    """Each class as the mean of its names' unit embeddings."""
    from mmhooks.analysis.embed_texts import embed_texts

    return torch.stack([normalize(embed_texts(hooked, own).mean(0), dim=0) for own in names])


def by_text_span(
    pool: Any,
    embedded: Float[Tensor, "t e"],
    outputs: Float[Tensor, "n l h e"],
    layers: Sequence[int],
    kinds: Sequence[str],
) -> tuple[dict[str, list[str]], list[Head], float]:
    """Texts of every head, and the heads in the order of the variance that they write along those of their texts that
    name a background; heads without any are left out. Last, the largest share of a head's variance that these span.

    Raises:
        DataError: a pool without kinds.
    """
    from mmhooks.analysis.text_span import text_span
    from mmhooks.errors import DataError

    if pool.kinds is None:
        raise DataError(f"pool {pool.name!r} has no kinds: head each kind's texts with a line '# kind'")
    n_heads = outputs.shape[2]
    names = [f"{n}.{h}" for n in layers for h in range(n_heads)]
    rank = min(80, outputs.shape[-1], len(outputs) - 1)
    span = text_span(
        outputs.flatten(1, 2),
        embedded,
        pool.texts,
        heads=names,
        rank=rank,
        n_texts=min(20, rank, len(pool.texts)),
    )
    along: dict[str, float] = {}
    for name, own, explained, variance in zip(
        names, span.indices, span.explained, span.variance, strict=True
    ):
        more = [b - a for a, b in zip((0.0, *explained), explained, strict=False)]
        along[name] = variance * sum(m for i, m in zip(own, more, strict=True) if pool.kinds[i] in kinds)
    order = sorted((name for name in names if along[name] > 0), key=lambda name: -along[name])
    named = {name: list(texts) for name, texts in zip(names, span.texts, strict=True)}
    reach = max(along[name] / v for name, v in zip(names, span.variance, strict=True))
    return named, [(int(n), int(h)) for n, h in (name.split(".") for name in order)], reach


def by_contrast(
    outputs: Float[Tensor, "n l h e"], layers: Sequence[int], scenes: Any, texts: Float[Tensor, "2 e"]
) -> list[Head]:
    """Heads by how far water behind an animal, instead of land, moves them towards the text of water animals."""
    moved = outputs @ (texts[1] - texts[0])
    effect = torch.zeros(moved.shape[1:])
    kinds = [animal for animal in (0, 1) if len(set(scenes.places[scenes.animals == animal].tolist())) == 2]
    for animal in kinds:
        of, water = scenes.animals == animal, scenes.places == 1
        effect += moved[of & water].mean(0) - moved[of & ~water].mean(0)
    order = effect.flatten().argsort(descending=True).tolist()
    return [(layers[i // effect.shape[1]], i % effect.shape[1]) for i in order if effect.flatten()[i] > 0]


if __name__ == "__main__":
    app()
