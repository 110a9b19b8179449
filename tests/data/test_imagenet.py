"""ImageNet's validation folder, on a tiny copy of its layout."""

from __future__ import annotations

import pytest
from PIL import Image

from mmhooks.data.sources.imagenet import imagenet_folder
from mmhooks.errors import DataError
from mmhooks.models.clip.zero_shot import imagenet_names


def test_labels_are_places_among_all_classes(tmp_path):
    """Three of the classes, whose names open_clip lists at the labels."""
    named = {"n01443537": "goldfish", "n02123045": "tabby cat", "n07753592": "banana"}
    for i, wordnet in enumerate(named):
        (tmp_path / wordnet).mkdir()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / wordnet / f"ILSVRC2012_val_{i:08d}.png")
    images = imagenet_folder(tmp_path, lambda image: image.getpixel((0, 0))[0])
    assert [(red, imagenet_names()[label]) for red, label in images] == list(enumerate(named.values()))
    (tmp_path / "n02084071").mkdir()  # "dog" is a synset of WordNet, not one of the 1,000
    with pytest.raises(DataError, match="got n02084071"):
        imagenet_folder(tmp_path, lambda image: image)


def test_a_class_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        imagenet_folder(tmp_path, lambda image: image)
    (tmp_path / "n01443537").mkdir()
    with pytest.raises(DataError, match="n01443537"):
        imagenet_folder(tmp_path, lambda image: image)
    with pytest.raises(DataError, match="is not there"):
        imagenet_folder(tmp_path / "val", lambda image: image)
