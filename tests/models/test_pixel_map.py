"""The map of preprocessings: what is computed against what is measured with brightness ramps, and against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.models.pixel_map import Axis, PixelMap, measured_map, pixel_map
from mmhooks.models.processing import Preprocess, SquarePreprocess

SCALED = T.Compose([T.ToTensor(), T.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.25])])


def open_clip(size=96, **options):
    from open_clip.transform import image_transform

    return image_transform(size, is_train=False, **options)


def timm(**options):
    from timm.data import create_transform  # type: ignore[attr-defined]

    return create_transform(96, is_training=False, **options)


def processor(kind, **options):
    import transformers

    return Preprocess(getattr(transformers, kind)(**options))


KNOWN = {
    "open_clip": open_clip,
    "open_clip, longest": lambda: open_clip(resize_mode="longest"),
    "open_clip, squash": lambda: open_clip(resize_mode="squash"),
    "open_clip, not square": lambda: open_clip((96, 64)),
    "timm": timm,
    "timm, border": lambda: timm(crop_mode="border", crop_pct=0.9),
    "timm, squash": lambda: timm(crop_mode="squash", crop_pct=0.9),
    "CLIP": lambda: processor("CLIPImageProcessor", size={"shortest_edge": 96}, crop_size=96),
    "SigLIP": lambda: processor("SiglipImageProcessor", size={"height": 96, "width": 64}),
    "DINOv2": lambda: processor("BitImageProcessor", size={"shortest_edge": 110}, crop_size=96),
    "DINOv3": lambda: processor("DINOv3ViTImageProcessor", size={"height": 96, "width": 96}),
}
MEASURED = {
    "ConvNeXt": lambda: processor("ConvNextImageProcessor", size={"shortest_edge": 96}),
    "padding first": lambda: T.Compose([T.Pad((10, 30, 20, 5)), T.Resize((96, 96)), SCALED]),
    "mini": lambda: mm.load("mini").preprocess,
}


@pytest.mark.parametrize("size", [(300, 200), (97, 333), (60, 50)])
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_computed_is_what_a_ramp_shows(name, size, monkeypatch):
    preprocess = KNOWN[name]()
    measured = measured_map(preprocess, size)
    monkeypatch.delattr("mmhooks.models.pixel_map.measured_map")  # none of these needs it
    computed = pixel_map(preprocess, size)
    for a, b in ((computed.rows, measured.rows), (computed.columns, measured.columns)):
        assert (a.before, a.after) == (b.before, b.after)
        begin, end = (
            max(0.0, a.offset),
            min(float(a.after), a.scale * a.before + a.offset),
        )  # what shows the image
        places = torch.tensor([begin, end])
        assert (
            a.back(places) - b.back(places)
        ).abs().max() * a.scale < 0.35  # of a pixel that the model reads


@pytest.mark.parametrize("name", MEASURED)
def test_the_bright_spot_lies_where_the_map_says(name):
    """Another witness, for those that are measured: a white square on black."""
    preprocess = MEASURED[name]()
    size, box = (240, 180), (90, 66, 130, 106)
    found = pixel_map(preprocess, size)
    image = Image.new("RGB", size)
    image.paste("white", box)
    pixels = preprocess(image) - preprocess(Image.new("RGB", size))
    for axis, dim, begin, end in ((found.columns, 1, box[0], box[2]), (found.rows, 2, box[1], box[3])):
        profile = pixels.mean(0).sum(dim - 1).double()
        middle = float((profile * (torch.arange(len(profile)) + 0.5)).sum() / profile.sum())
        assert float(axis.back(torch.tensor(middle))) == pytest.approx(
            (begin + end) / 2, abs=0.35 / axis.scale
        )


def test_by_hand():
    found = pixel_map(T.Compose([T.Resize(50), T.CenterCrop(40), T.ToTensor()]), (200, 100))
    assert found == PixelMap(Axis(100, 40, 0.5, -5.0), Axis(200, 40, 0.5, -30.0))
    assert found.columns.back(torch.tensor([0.0, 40.0])).tolist() == [60, 140]
    padded = pixel_map(open_clip(100, resize_mode="longest"), (200, 100))
    assert padded.columns == Axis(200, 100, 0.5) and padded.rows == Axis(100, 100, 0.5, 25.0)
    assert padded.rows.back(torch.tensor([0.0, 100.0])).tolist() == [-50, 150]  # beyond the image: padding
    assert pixel_map(mm.load("mini").preprocess, (320, 64)).columns == Axis(320, 64, 0.2)


def test_squares_of_siglip_2():
    from transformers import Siglip2ImageProcessor

    preprocess = SquarePreprocess(Siglip2ImageProcessor(patch_size=8, max_num_patches=36))
    size = (96, 72)
    assert pixel_map(preprocess, size).columns == Axis(96, 48, 0.5)
    assert measured_map(preprocess, size).rows == pixel_map(preprocess, size).rows == Axis(72, 48, 2 / 3)


def test_what_follows_no_such_map_is_refused():
    size = (120, 90)
    for name, change in {
        "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "sheared": lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0.3, 0, 0, 1, 0)),
    }.items():
        with pytest.raises(MMHooksError, match="expected one that scales, crops and pads"):
            print(name, pixel_map(lambda image, change=change: SCALED(change(image)), size))
    with pytest.raises(MMHooksError, match="the same pixels for both"):
        pixel_map(lambda image: torch.zeros(3, 8, 8), size)
    with pytest.raises(
        MMHooksError, match=r"expected one that makes pixels \[3 h w\] of an image, got ndarray"
    ):
        pixel_map(lambda image: np.asarray(image), size)
    with pytest.raises(MMHooksError, match="at least 2 pixels away from the image's edges"):
        pixel_map(lambda image: SCALED(image.resize((4, 4))), size)
