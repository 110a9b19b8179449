"""Primary comparisons, table and figure of the segmentation study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from mmhooks.analysis.attribution.saliency import METHODS
from mmhooks.analysis.statistics.measured import over_clusters
from mmhooks.analysis.statistics.primaries import Decision, Primary, decide, verdict_text
from mmhooks.report import Cell, Plot, Table
from mmhooks.report.style import draw
from mmhooks.studies.common.claims import Verdict, verdict_of_outcome
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


OURS = "token contributions"
PRIMARIES = {
    name: Primary(f"token contributions beat {name} on mIoU", "greater") for name in METHODS if name != OURS
}


def decided(scores: Sequence[Any], clusters: Int[Tensor, " n"]) -> dict[str, Decision]:
    """Tests token contributions against every other method: paired differences of mIoU over kinds of objects, Holm."""
    own = {s.name: s.ious for s in scores}
    found = {p.name: over_clusters(p, own[OURS] - own[name], clusters) for name, p in PRIMARIES.items()}
    return decide(tuple(PRIMARIES.values()), found)


def claims_of(decisions: Mapping[str, Decision]) -> list[tuple[Verdict, str, str]]:
    """Returns verdict, claim and numbers of every primary, as a page lists them."""
    return [(verdict_of_outcome(d.outcome), d.name, verdict_text(d)) for d in decisions.values()]


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
