"""Interpolation by modality in Stable Diffusion (Section 5.3 of the paper, Figures 7 and 8), with numbers.

Features of the conditioner that belong to pictures (ImgD), texts (TextD) or both (CrossD) are moved toward a
reference picture while a prompt is drawn. The paper's claim: TextD moves the concept and keeps the structure; ImgD
and CrossD break it.

    python recipes/generation.py --out runs/generation
    python recipes/generation.py --pipeline stabilityai/stable-diffusion-2-base --model ViT-H-14 \\
        --pretrained laion2b_s32b_b79k --data coco --limit 5000
    python recipes/generation.py --pipeline fusing/stable-unclip-2-1-l --model ViT-L-14 --pretrained openai \\
        --data coco --limit 5000
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from generation_study import STRENGTHS, Case, Painter, Setting, study, verdicts

import mmhooks as mm
from mmhooks.analysis.conditioner import conditioner_mds, conditioner_sides
from mmhooks.analysis.controls import size_matched
from mmhooks.analysis.groups import groups_of
from mmhooks.analysis.intervals import bootstrap
from mmhooks.analysis.results import plain
from mmhooks.cli.say import say, say_error
from mmhooks.errors import MMHooksError
from mmhooks.models.references import Mode

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def choose_cases(pairs: Any, known: set[str] | None, count: int, template: str, seed: int) -> list[Case]:
    """``count`` prompts and as many references from other pairs; of a pipeline that lists what it draws, from those.

    Raises:
        MMHooksError: too few pairs.
    """
    texts = list(pairs.texts)
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if known is None or text in known:
            first.setdefault(text, i)
    rows = list(first.values())
    if len(rows) < 2 * count:
        raise MMHooksError(
            f"{count} prompts and references need {2 * count} different texts that the pipeline draws; the data has "
            f"{len(rows)}: lower --pairs or raise --limit"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        Case(template.format(texts[rows[a]]), template.format(texts[rows[b]]), pairs[rows[b]].image)
        for a, b in zip(order[:count], order[count : 2 * count], strict=True)
    ]


def same_size(groups: dict[str, mm.FeatureSet], alive: mm.FeatureSet, *, whole: bool, seed: int):
    """The groups cut at random to the size of the smallest, and a random group as large (``whole``: as TextD)."""
    size = min(len(g) for g in groups.values())
    cut = (
        groups
        if whole
        else {k: g if len(g) == size else g.sample(size, seed=seed) for k, g in groups.items()}
    )
    return cut | {"random": size_matched(cut["TextD"], draws=1, seed=seed, alive=alive)[0]}


def modes_of(sd: Any) -> tuple[Mode, ...]:
    """The ways into a pipeline: its image embedding where it takes one, else its text conditioner."""
    return ("unclip",) if "image.embed" in sd.places.sites.canonical else ("projected", "naive")


def settings_of(sd: Any, clip: Any, pairs: Any, cases: list[Case], mode: Mode, *, whole: bool, features: int, k: int,
                epochs: int, seed: int, quiet: bool, impossible: dict[str, str]) -> list[Setting]:  # fmt: skip
    """The space's own dimensions (the paper's), and an SAE trained on them; scored where they are edited.

    A space that does not part into three groups goes to ``impossible``, with its scores.
    """
    sides = conditioner_sides(sd, pairs, mode=mode, clip=clip, progress=not quiet)
    toward = mm.reference(sd, [case.picture for case in cases], mode=mode, clip=clip)
    site = "image.embed" if mode == "unclip" else "text.cond"
    width = sides[0].shape[1]
    torch.manual_seed(seed)
    head = mm.TopKSAE(width, features or 4 * width, k)
    mm.train_head(head, *sides, epochs=epochs, seed=seed, progress=not quiet)
    head = head.to(sd.device).eval()
    with torch.no_grad():
        spaces = [("dimensions", None, toward), ("SAE", head, head.encode(head.prepare(toward)))]
    found = []
    for space, scorer, target in spaces:
        result = conditioner_mds(sides, head=scorer, data=pairs.name)
        try:
            groups, rule = groups_of(result)
        except MMHooksError as error:
            impossible[f"{mode}, {space}"] = f"{error}; scores are {result.mu:.3f} ± {result.sigma:.3f}"
            continue
        alive = mm.FeatureSet(~result.dead, len(result.R), head=result.groups[0].head)
        edited = same_size(groups, alive, whole=whole, seed=seed)
        sizes = {name: len(g) for name, g in groups.items()}
        found.append(Setting(space, site, edited, sizes, rule, target, result, scorer))
    return found


@app.command(help=__doc__)
def main(
    pipeline: Annotated[str, typer.Option(help='"mini", a directory, or a Hub repository')] = "mini",
    model: Annotated[str, typer.Option(help="CLIP of the conditioner: mini, or an open_clip name")] = "mini",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag, or a checkpoint")] = None,
    data: Annotated[str, typer.Option(help="mini, a folder with metadata.csv, coco, …")] = "mini",
    limit: Annotated[int | None, typer.Option(help="at most so many pairs", min=8)] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="projected, naive, unclip; repeatable; default: unclip for Stable unCLIP, else the others"
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(help="prompts, each with a reference", min=2)] = 20,
    seeds: Annotated[int, typer.Option(help="drawings of each", min=1)] = 2,
    strength: Annotated[list[float] | None, typer.Option(help="repeatable; 0 is always drawn")] = None,
    whole: Annotated[bool, typer.Option(help="whole groups instead of groups of one size")] = False,
    template: Annotated[str, typer.Option(help="prompt of a text; {} is the text")] = "{}",
    features: Annotated[int, typer.Option(help="of the SAE; 0: four times the width")] = 0,
    k: Annotated[int, typer.Option(help="active features of the SAE")] = 16,
    epochs: Annotated[int, typer.Option(help="of the SAE")] = 40,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 15,
    guidance: Annotated[float, typer.Option(help="guidance scale")] = 3.0,
    batch: Annotated[int, typer.Option(help="pictures at once")] = 20,
    shown: Annotated[
        int | None, typer.Option(help="which prompt the grid shows, from 0; default: the one that moved most")
    ] = None,
    image_embedder: Annotated[str, typer.Option(help="judge of pictures")] = "efficientnet-lite0",
    seed: Annotated[int, typer.Option(help="of cases, groups and the SAE")] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet")] = False,
    out: Annotated[Path, typer.Option(help="results.json, tables.md, PNG, index.html")] = Path(
        "runs/generation"
    ),
) -> None:
    from diffusers.utils import logging
    from generation_page import write

    logging.set_verbosity_error()  # a caption that is cut to the context is said once a caption
    start = time.perf_counter()
    strengths = tuple(sorted(s for s in strength or STRENGTHS if s > 0))
    modes: dict[str, Any] = {}
    impossible: dict[str, str] = {}
    try:
        for one in mode or ():
            if one not in get_args(Mode):
                raise MMHooksError(f"--mode is one of {', '.join(get_args(Mode))}; came {one!r}")
        if shown is not None and not 0 <= shown < pairs:
            raise MMHooksError(f"--shown is one of {pairs} prompts, from 0; came {shown}")
        sd, clip = (
            mm.load_diffusion(pipeline, device=device),
            mm.load(model, pretrained=pretrained, device=device),
        )
        corpus = mm.data.pairs(data, limit=limit, progress=not quiet)
        known = None
        if sd.name == "mini":
            from mmhooks.models.mini_sd import drawings

            known = {row["name"] for row in drawings()}
        cases = choose_cases(corpus, known, pairs, template, seed)
        painter = Painter(sd, steps, guidance, batch)
        for one in cast(list[Mode], mode) or modes_of(sd):
            try:
                found = settings_of(sd, clip, corpus, cases, one, whole=whole, features=features, k=k, epochs=epochs,
                                    seed=seed, quiet=quiet, impossible=impossible)  # fmt: skip
                if found:
                    modes[one] = (found, *study(painter, found, cases, image_embedder, strengths=strengths,
                                                seeds=seeds, shown=shown, quiet=quiet))  # fmt: skip
            except MMHooksError as error:  # widths or towers that do not fit; what other modes gave is kept
                impossible[one] = str(error)
        if not modes:
            raise MMHooksError(f"no mode is possible: {impossible}")
    except MMHooksError as error:
        say_error(error, "error")
        raise typer.Exit(1) from None
    results: dict[str, Any] = {
        "pipeline": pipeline, "model": model, "pretrained": pretrained, "data": corpus.name, "data_pairs": len(corpus),
        "licence": corpus.licence, "attribution": corpus.attribution, "command": shlex.join(sys.argv),
        "strengths": [0.0, *strengths], "seeds": seeds, "steps": steps, "guidance": guidance, "whole": whole,
        "cases": [{"prompt": c.prompt, "reference": c.reference} for c in cases],
        "chosen": shown is None, "impossible": impossible,
        "modes": {
            m: {s.name: {
                "rule": s.rule, "sizes": s.sizes, "edited": {g: len(f) for g, f in s.groups.items()}, "mu": s.mds.mu,
                "sigma": s.mds.sigma, "thresholds": s.mds.thresholds, "shuffled_r": s.mds.shuffled_r, "shown": at,
                "curves": {g: {q: [bootstrap(row) for row in v] for q, v in by.items()}
                           for g, by in curves[s.name].items()},
                "verdicts": verdicts(curves[s.name]),
            } for s in found}
            for m, (found, curves, _, at) in modes.items()
        },
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    results = plain(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    shows = {m: (strips, cases[at].picture) for m, (_, _, strips, at) in modes.items()}
    write(results, shows, out)
    for m, by in results["modes"].items():
        for space, found in by.items():
            say(f"{m}, {space}: groups by {found['rule']}")
            for verdict in found["verdicts"].values():
                say(f"{m}, {space}: {verdict['sentence']}")
    for m, why in impossible.items():
        say(f"{m}: not possible here: {why}")
    say(f"{out / 'index.html'}, {results['seconds']:.0f} s")


if __name__ == "__main__":
    app()
