"""Zero-shot segmentation by the tokens' contributions along a class's text, against four attention baselines.

Section 5 of "Interpreting CLIP's Image Representation via Text-Based Decomposition". By default on drawings whose
exact masks are known, laid on photograph-like and patterned grounds; or on ImageNet-Segmentation's own file, or a folder.

    python recipes/segmentation.py --out runs/segmentation
    python recipes/segmentation.py --model ViT-B-16 --pretrained laion2b_s34b_b88k --data gtsegs_ijcv.mat
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from segmentation_data import Sample, prepared, samples_of

from mmhooks.cli.clear_errors import clear_errors
from mmhooks.utils.escape import one_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="mini, or any open_clip name of a ViT.")] = "mini",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag, or a checkpoint file.")] = None,
    data: Annotated[
        str,
        typer.Option(
            help="mini; ImageNet-Segmentation's file gtsegs_ijcv.mat; or a folder with images/NAME.jpg, "
            "masks/NAME.png and classes.csv (file,class)."
        ),
    ] = "mini",
    limit: Annotated[int, typer.Option(min=2, help="At most so many pictures.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the choice, the grounds and the bootstrap.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
    out: Annotated[Path, typer.Option(help="Where results, tables, figures and index.html go.")] = Path(
        "runs/segmentation"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="No bar and no tables on the screen.")] = False,
) -> None:
    """Zero-shot segmentation: token contributions against raw attention, rollout, gradient attention and LeGrad."""
    with clear_errors("segmentation"):
        study(model, pretrained, data, limit=limit, seed=seed, batch=batch, out=out, quiet=quiet)


def study(
    model: str = "mini",
    pretrained: str | None = None,
    data: str = "mini",
    *,
    limit: int = 400,
    seed: int = 0,
    batch: int = 16,
    out: str | Path = "runs/segmentation",
    quiet: bool = False,
) -> dict[str, Any]:
    """The whole study; writes everything under ``out`` and returns the results."""
    start = time.perf_counter()
    import torch
    from study_page import environment, show, write_study

    import mmhooks as mm
    from mmhooks.analysis.embed_texts import embed_texts
    from mmhooks.analysis.saliency import METHODS
    from mmhooks.analysis.segmentation import segmentation_scores
    from mmhooks.data.progress import track

    torch.manual_seed(seed)
    hooked = mm.load(model, pretrained=pretrained)
    found, attribution = samples_of(data, limit, seed)
    samples, pixels, masks = prepared(hooked.preprocess, found)
    names = sorted({s.name for s in samples})
    texts = embed_texts(hooked, names)
    directions = texts - texts.mean(0)
    rows = [names.index(s.name) for s in samples]
    maps: dict[str, Any] = {}
    for name, method in METHODS.items():
        parts = range(0, len(samples), batch)
        own = [
            method(hooked, pixels[i : i + batch], directions[rows[i : i + batch]])
            for i in track(parts, len(parts), name, show=not quiet)
        ]
        maps[name] = torch.cat(own)
    kinds = list(dict.fromkeys(s.ground for s in samples))
    kinds = ["all", *kinds] if len(kinds) > 1 else ["all"]
    scores: dict[str, list[Any]] = {}
    for kind in kinds:
        of = torch.tensor([kind in ("all", s.ground) for s in samples])
        scores[kind] = [segmentation_scores(maps[m][of], masks[of], name=m, seed=seed) for m in METHODS]
    claims = compared(scores["all"])
    results = {
        "settings": {
            "model": model,
            "pretrained": pretrained or "",
            "data": data,
            "limit": limit,
            "seed": seed,
        },
        "n": len(samples),
        "left_out": len(found) - len(samples),
        "classes": len(names),
        "scores": {
            kind: {s.name: {"pixel_accuracy": s.pixel_accuracy, "miou": s.miou, "map": s.map} for s in own}
            for kind, own in scores.items()
        },
        "claims": [list(claim) for claim in claims],
        "environment": environment(start),
    }
    tables = [table(kind, own) for kind, own in scores.items()]
    paths = write_study(
        Path(out),
        results,
        title="Where in the picture is it? Zero-shot segmentation by token contributions",
        lead=f"{len(samples)} pictures of {len(names)} things, model {model}. Every map is cut at its own mean; mIoU is the mean "
        "over pictures of the IoU of object and ground; intervals are 95 % bootstrap over pictures.",
        claims=claims,
        tables=tables,
        plots={"maps": picture_plot(samples, masks, maps, scores["all"])},
        notes=[
            "A picture's direction is its class's unit text embedding less the mean of all classes'. Raw attention and "
            "rollout know no text. All methods read the same sites of the same model; none is tuned.",
            *left_out(len(found) - len(samples)),
        ],
        attribution=attribution,
    )
    if not quiet:
        show(results, tables, claims, paths)
    return results


def left_out(n: int) -> list[str]:
    return [f"{n} pictures are left out: the model's crop shows only object, or only ground."] if n else []


def compared(scores: Sequence[Any]) -> list[tuple[Any, str, str]]:
    """Token contributions against every baseline: paired difference of mIoU."""
    ours, rest = scores[0], scores[1:]
    claims = []
    for other in rest:
        d = ours.beyond(other)
        verdict = "same" if d.low > 0 else "differs" if d.high < 0 else "open"
        claims.append(
            (verdict, f"token contributions beat {other.name} on mIoU",
             f"{ours.miou.value:.3f} against {other.miou.value:.3f}, difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], "
             f"n = {d.n}")
        )  # fmt: skip
    return claims


def table(kind: str, scores: Sequence[Any]) -> Any:
    from mmhooks.report import Cell, Estimate, Table

    best = {what: max(getattr(s, what).value for s in scores) for what in ("pixel_accuracy", "miou", "map")}
    rows = [
        [s.name, *(Cell.of(Estimate.of(e := getattr(s, w)), best=e.value == best[w]) for w in best)]
        for s in scores
    ]
    caption = f"Segmentation of {len(scores[0].ious)} pictures" + (
        "" if kind == "all" else f", {kind} grounds"
    )
    return Table(["Method", "Pixel accuracy", "mIoU", "mAP"], rows, caption)


def picture_plot(samples: Sequence[Sample], masks: Any, maps: dict[str, Any], scores: Sequence[Any]) -> Any:
    """Six pictures, evenly spaced by our own mIoU, from the worst to the best."""
    from matplotlib.figure import Figure

    from mmhooks.report import Plot
    from mmhooks.report.style import draw

    order = scores[0].ious.argsort().tolist()
    shown = [order[round(i * (len(order) - 1) / 5)] for i in range(min(6, len(order)))]

    def make(palette: Any) -> Figure:
        figure = Figure(figsize=(1.35 * (len(maps) + 2), 1.5 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), len(maps) + 2, squeeze=False)
        for number, (row, i) in enumerate(zip(axes, shown, strict=True)):
            row[0].imshow(samples[i].picture)
            row[0].set_ylabel(one_line(samples[i].name[:18]), fontsize=8)
            row[1].imshow(masks[i], cmap="gray")
            for axis, (name, found) in zip(row[2:], maps.items(), strict=True):
                axis.imshow(found[i], cmap="magma", interpolation="bilinear")
                if number == 0:
                    axis.set_title(name, fontsize=8)
            for axis in row:
                axis.set(xticks=[], yticks=[])
        axes[0][0].set_title("picture", fontsize=8)
        axes[0][1].set_title("mask", fontsize=8)
        return figure

    light, dark = draw(make, alt="Pictures, their masks and the maps of every method")
    return Plot(
        light, dark, "Pictures evenly spaced by mIoU of token contributions: the worst first, the best last."
    )


if __name__ == "__main__":
    app()
