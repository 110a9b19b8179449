"""The direction that every image is searched for, and the heat maps of every method along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.attribution.saliency import METHODS, gradient_attention, legrad
from mmhooks.errors import MMHooksError
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.models.clip.zero_shot import imagenet_names, zero_shot_classifier
from mmhooks.studies.segmentation.options import Options
from mmhooks.utils.progress import track

CHOICES = ("true", "predicted", "imagenet")


@dataclass(frozen=True)
class Directions:
    """What is sought in every image.

    Attributes:
        own: per image, the unit text embedding of a class minus the mean of all classes'.
        classes: number of classes.
        right: share of images whose class is their own; None where their own may not be among the classes.
        what: a clause that says which class it is.
    """

    own: Float[Tensor, "n e"]
    classes: int
    right: float | None
    what: str


def directions(model: Any, pixels: Tensor, names: Sequence[str], options: Options) -> Directions:
    """Embeds the classes and chooses one per image, by ``options.classes``.

    Raises:
        MMHooksError: a choice that is none of the three.
    """
    if options.classes not in CHOICES:
        raise MMHooksError(f"--classes: expected {', '.join(CHOICES)}, got {options.classes!r}")
    if options.classes == "imagenet":
        texts = zero_shot_classifier(model, imagenet_names(), progress=not options.quiet)
        chosen = predicted(model, pixels, texts, options.batch)
        what = "the class predicted among ImageNet's 1,000, in 80 prompts"
        return Directions((texts - texts.mean(0))[chosen], len(texts), None, what)
    known = sorted(set(names))
    texts = embed_texts(model, known)
    true = torch.tensor([known.index(name) for name in names])
    if options.classes == "true":
        return Directions((texts - texts.mean(0))[true], len(known), 1.0, "its own class")
    chosen = predicted(model, pixels, texts, options.batch)
    right = float((chosen == true).float().mean())
    what = f"the class predicted among the data's {len(known)} ({100 * right:.0f} % are its own)"
    return Directions((texts - texts.mean(0))[chosen], len(known), right, what)


@torch.no_grad()
def predicted(model: Any, pixels: Tensor, texts: Float[Tensor, "c e"], batch: int) -> Tensor:
    """Returns the class of every image whose text is nearest."""
    parts = [model.encode_image(model.to_input(some)).float().cpu() for some in pixels.split(batch)]
    return (normalize(torch.cat(parts), dim=1) @ texts.T).argmax(1)


def methods(options: Options) -> dict[str, Callable[[Any, Tensor, Tensor], Tensor]]:
    """Returns the methods by name, with the options of the two that have any."""
    return METHODS | {
        "gradient attention": partial(gradient_attention, start=options.chefer_start),
        "LeGrad": partial(legrad, layers=options.legrad_layers),
    }


def heat_maps(model: Any, pixels: Tensor, along: Tensor, options: Options) -> dict[str, Tensor]:
    """Returns each method's heat maps of every image along its direction, ``[n h w]``."""
    maps = {}
    starts = range(0, len(pixels), options.batch)
    for name, method in methods(options).items():
        found = [
            method(model, pixels[i : i + options.batch], along[i : i + options.batch]).cpu()
            for i in track(starts, len(starts), name, show=not options.quiet)
        ]
        maps[name] = torch.cat(found)
    return maps
