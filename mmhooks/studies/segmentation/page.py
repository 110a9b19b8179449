"""Claims, table and figure of the segmentation study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmhooks.report import Cell, Plot, Table
from mmhooks.report.style import draw
from mmhooks.studies.segmentation.samples import Sample
from mmhooks.utils.escape import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SCORES = {  # of results.json, with their columns
    "pixel_accuracy": "Pixel accuracy",
    "miou": "mIoU",
    "pooled_miou": "Pooled mIoU",
    "map": "mAP",
    "public_map": "Public mAP",
}


def left_out(n: int) -> list[str]:
    """Returns a note on the images that the crop makes unusable, if there are any."""
    return [f"{n} images are left out: the model's crop shows only object, or only background."] if n else []


def compared(scores: Sequence[Any]) -> list[tuple[Any, str, str]]:
    """Compares token contributions with every baseline: paired difference of mIoU."""
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


def table(kind: str, scores: Sequence[Any]) -> Table:
    """Returns the scores of every method, over the images with one kind of background."""
    found = [{score: getattr(s, score) for score in SCORES} for s in scores]
    best = {score: max(own[score].value for own in found) for score in SCORES}
    rows = [
        [s.name, *(Cell.of(own[w], best=own[w].value == best[w]) for w in SCORES)]
        for s, own in zip(scores, found, strict=True)
    ]
    caption = f"Segmentation of {len(scores[0].ious)} images" + (
        "" if kind == "all" else f", {kind} backgrounds"
    )
    return Table(["Method", *SCORES.values()], rows, caption)


def image_plot(samples: Sequence[Sample], masks: Any, maps: dict[str, Any], scores: Sequence[Any]) -> Plot:
    """Shows six images, evenly spaced by the mIoU of token contributions, from the worst to the best."""
    from matplotlib.figure import Figure

    order = scores[0].ious.argsort().tolist()
    shown = [order[round(i * (len(order) - 1) / 5)] for i in range(min(6, len(order)))]

    def make(palette: Any) -> Figure:
        figure = Figure(figsize=(1.35 * (len(maps) + 2), 1.5 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), len(maps) + 2, squeeze=False)
        for number, (row, i) in enumerate(zip(axes, shown, strict=True)):
            row[0].imshow(samples[i].image)
            row[0].set_ylabel(one_line(samples[i].name[:18]), fontsize=8)
            row[1].imshow(masks[i], cmap="gray")
            for axis, (name, found) in zip(row[2:], maps.items(), strict=True):
                axis.imshow(found[i], cmap="magma", interpolation="bilinear")
                if number == 0:
                    axis.set_title(name, fontsize=8)
            for axis in row:
                axis.set(xticks=[], yticks=[])
        axes[0][0].set_title("image", fontsize=8)
        axes[0][1].set_title("mask", fontsize=8)
        return figure

    light, dark = draw(make, alt="Images, their masks and the maps of every method")
    return Plot(
        light, dark, "Images evenly spaced by mIoU of token contributions: the worst first, the best last."
    )
