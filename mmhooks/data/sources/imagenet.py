"""ImageNet's validation images in their usual folders, with the labels of its 1,000 classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmhooks.errors import DataError


def imagenet_folder(folder: str | Path, preprocess: Callable[[Any], Any]) -> Any:
    """Returns a torchvision data set of images and labels, for a ``DataLoader``.

    Labels are places among the 1,000 classes, in which :func:`~mmhooks.models.clip.zero_shot.imagenet_names` has their
    names; so a folder may hold only some of the classes.

    Args:
        folder: with one folder per class, named by its WordNet id: ``val/n01440764/….JPEG``.
        preprocess: from an image to pixels, the model's own.

    Raises:
        DataError: no such folder, a class without images, or a folder that is no class of ImageNet.

    >>> images = imagenet_folder("imagenet/val", model.preprocess)                     # doctest: +SKIP
    >>> batches = torch.utils.data.DataLoader(images, batch_size=64, num_workers=8)     # doctest: +SKIP
    """
    from timm.data.imagenet_info import ImageNetInfo
    from torchvision.datasets import ImageFolder

    place = Path(folder).expanduser()
    if not place.is_dir():
        raise DataError(f"{place} is not there: expected a folder of ImageNet's classes, n01440764 and so on")
    order = {wordnet: i for i, wordnet in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    found = sorted(p.name for p in place.iterdir() if p.is_dir())
    unknown = [name for name in found if name not in order]
    if unknown or not found:
        raise DataError(
            f"{place}: expected one folder per class of ImageNet, n01440764 and so on, got "
            + (f"{', '.join(unknown[:3])}" if unknown else "no folder")
        )
    try:
        images = ImageFolder(str(place), transform=preprocess)
    except FileNotFoundError as error:
        raise DataError(f"{place}: {error}") from error
    labels = [order[name] for name in images.classes]
    images.target_transform = labels.__getitem__
    return images
