"""Figures: correct bars and colours, no formulas parsed in captions, matplotlib settings restored."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from mmhooks.analysis.results import Estimate
from mmhooks.errors import ShapeMismatch
from mmhooks.report.figures import (
    GROUPS,
    Effect,
    Histogram,
    Strip,
    beside_paper,
    image_strips,
    mask_effects,
    mds_histograms,
)
from mmhooks.report.style import DARK, LIGHT, draw

RNG = np.random.default_rng(0)
SQUARES = [Image.fromarray(RNG.integers(0, 255, (12, 12, 3), dtype=np.uint8)) for _ in range(8)]


def panel(scores: np.ndarray) -> Histogram:
    mu, sigma = float(np.nanmean(scores)), float(np.nanstd(scores))
    return Histogram("CLIP", scores.tolist(), mu, sigma, {"ImgD": 1, "TextD": 2, "CrossD": 3})


def test_histogram_bars_count_each_group_once() -> None:
    scores = np.append(np.clip(RNG.normal(0.5, 0.3, 500), 0, 1), np.nan)
    shown = panel(scores)
    axis = mds_histograms([shown]).axes[0]
    counts: dict[str, float] = {}
    for bar in axis.patches:
        colour = to_hex(bar.get_facecolor())
        counts[colour] = counts.get(colour, 0) + bar.get_height()  # type: ignore[attr-defined]
    alive = scores[:-1]
    assert counts[LIGHT.img] == (alive > shown.mu + shown.sigma).sum()
    assert counts[LIGHT.text] == (alive < shown.mu - shown.sigma).sum()
    assert sum(counts.values()) == 500


def test_every_figure_draws_in_both_themes() -> None:
    strips = [Strip("f 1", "ImgD", SQUARES, ["$\\frac{broken", "中文 $x$"]), Strip("f 2", "TextD", [], [])]
    effects = [Effect(g, g, 0.01, RNG.normal(0, 0.01, 20).tolist(), 5) for g in GROUPS] + [
        Effect("none", "ImgD", 0.0, [])
    ]
    rows = [("CLIP", Estimate(0.1, 0.0, 0.2), 0.3), ("NCL", Estimate(float("nan")), None)]
    makers = (
        lambda p: mds_histograms([panel(RNG.random(50)), panel(RNG.random(50))], p),
        lambda p: image_strips(strips, p),
        lambda p: mask_effects({"CLIP": effects}, p),
        lambda p: beside_paper({"Pictures": rows, "Texts": rows}, p),
    )
    for make in makers:
        light, dark = draw(make, alt="x")
        assert dark is not None
        for dressed, palette in ((light, LIGHT), (dark, DARK)):
            image = Image.open(io.BytesIO(dressed.data)).convert("RGB")
            corner = "#{:02x}{:02x}{:02x}".format(*image.getpixel((1, 1)))  # type: ignore[misc]
            assert corner == palette.ground
            assert len(set(image.resize((64, 64)).getdata())) > 10, "an empty figure"


def test_images_are_shown_in_order() -> None:
    figure = image_strips([Strip("f", "ImgD", SQUARES)])
    for axis, square in zip(figure.axes, SQUARES, strict=True):
        assert np.array_equal(np.asarray(axis.images[0].get_array()), np.asarray(square))


def test_callers_settings_are_left_alone() -> None:
    before = dict(mpl.rcParams)
    draw(lambda p: mds_histograms([panel(RNG.random(9))], p), alt="")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("make", [mds_histograms, image_strips])
def test_empty_input_is_refused(make: object) -> None:
    with pytest.raises(ShapeMismatch, match="at least one"):
        make([])  # type: ignore[operator]
