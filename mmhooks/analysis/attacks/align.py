"""Alignment defence: moves an image until chosen features see a benign one (seed paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.analysis.attacks.pixels import Optimised, check_images, optimise_pixels
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.features import FeatureSet, as_feature_set
from mmhooks.utils.indexing import as_choice
from mmhooks.utils.modes import evaluating

SITE = "image.embed.sae.pre"


def pixel_scale(model: Any) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Reads the mean and standard deviation with which the model's own preprocessing normalises pixels.

    Raises:
        MMHooksError: the preprocessing does not contain them; give ``scale=``.

    >>> import mmhooks as mm
    >>> [v.flatten().tolist() for v in pixel_scale(mm.load("mini"))]
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    from mmhooks.models.embedded import mini

    steps = getattr(model.preprocess, "transforms", [])
    found = next(((s.mean, s.std) for s in steps if type(s).__name__ == "Normalize"), None)
    if found is None:  # of a processor of transformers
        found = getattr(model.preprocess, "scale", None)
    if found is None and model.preprocess is mini.preprocess:
        found = mini.MEAN, mini.STD
    if found is None:
        raise MMHooksError(
            f"scale: expected a preprocessing with Normalize, got that of {model!r} without; give scale=(mean, std)"
        )
    mean, std = (torch.as_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in found)
    return mean, std


def features_of(
    model: Any,
    images: Float[Tensor, "b 3 h w"],
    *,
    site: str = SITE,
    scale: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "b n"]:
    """Computes the activations at ``site`` for images with values from 0 to 1, in evaluation mode, at least in fp32 and on
    the images' device; differentiable with respect to the pixels, through the normalisation."""
    mean, std = (v.to(images) for v in scale or pixel_scale(model))
    with evaluating(model.model), model.caching([site], detach=False) as cache:
        model.encode_image(model.to_input((images - mean) / std))
    found = cache[site]
    return found.to(images.device, torch.promote_types(found.dtype, torch.float32))


def align(
    model: Any,
    images: Float[Tensor, "n 3 h w"],
    partners: Float[Tensor, "m 3 h2 w2"],
    features: Any = None,
    *,
    site: str = SITE,
    steps: int = 40,
    lr: float = 0.02,
    keep: Sequence[int] = (),
    batch: int = 64,
    scale: tuple[Tensor, Tensor] | None = None,
    progress: bool = True,
    label: str = "aligning",
) -> Optimised:
    """Moves each image's features I towards its partner's: minimises L = ||F_adv[:, I] - F_ben[:, I]||_2, not squared.

    Runs Adam on the pixels, which stay between 0 and 1; normalisation is part of the graph. Features are read before
    the sparsifying non-linearity (``.pre``), as a latent that TopK sets to 0 has no gradient.

    Args:
        model: a hooked CLIP with a head attached at ``image.embed``.
        images, partners: adversarial images, and a benign one for each, with values from 0 to 1.
        features: I, one set for all images (a FeatureSet, indices or a mask ``[f]``); or a mask per image ``[n f]``,
            such as an independent sample of a larger group for each (:func:`samples_of`). None: all features.
        site: where features are read; any site of width f.
        steps, lr, keep, batch, progress, label: as in :func:`~mmhooks.analysis.attacks.pixels.optimise_pixels`.

    Returns:
        :class:`~mmhooks.analysis.attacks.pixels.Optimised`; ``history`` is L of each image.

    Raises:
        ShapeMismatch: images and partners differ in shape, have values outside 0 to 1, or a mask has another shape.
        WrongHead: a FeatureSet belongs to another head.
        UnknownSite: there is no such site; attach the head first.

    >>> import mmhooks as mm
    >>> model = mm.load("mini"); _ = model.attach(mm.load_head("mini/sae"), at="image.embed")
    >>> made = align(model, torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64), steps=3, progress=False)
    >>> bool((made.history[-1] < made.history[0]).all())
    True
    """
    check_images(images)
    check_images(partners, "partners")
    if images.shape != partners.shape:
        raise ShapeMismatch(
            f"partners: expected one of the same size per image, {tuple(images.shape)}, got {tuple(partners.shape)}"
        )
    scale = scale or pixel_scale(model)
    with torch.no_grad():
        parts = [features_of(model, p, site=site, scale=scale) for p in partners.split(batch)]
    wanted = torch.cat(parts)
    chosen = _mask(features, len(images), wanted.shape[1], _head_id(model, site))

    def loss(x: Float[Tensor, "b 3 h w"], ids: Tensor) -> Float[Tensor, " b"]:
        difference = features_of(model, x, site=site, scale=scale) - wanted[ids]
        return length(difference * chosen[ids if len(chosen) > 1 else torch.zeros_like(ids)])

    return optimise_pixels(
        images, loss, steps=steps, lr=lr, keep=keep, batch=batch, progress=progress, label=label
    )


def length(difference: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Computes Euclidean norms; without gradient below 1e-5, which is rounding error that Adam would amplify."""
    return difference.square().sum(1).clamp_min(1e-10).sqrt()


def samples_of(group: FeatureSet, k: int, n: int, *, seed: int = 0) -> Bool[Tensor, "n f"]:
    """Draws ``n`` samples of ``k`` features of a group, one per row, for equal counts that do not depend on one draw.

    >>> samples_of(FeatureSet([1, 3, 5], 6), 2, 4).sum(1).tolist()
    [2, 2, 2, 2]
    """
    return torch.stack([group.sample(k, seed=seed * 1_000_003 + i).mask for i in range(n)])


def _mask(features: Any, n: int, width: int, head: str) -> Float[Tensor, "m f"]:
    """Converts the selection to a factor on features: one row for all images, or one row per image."""
    if features is None:
        return torch.ones(1, width)
    each = None if isinstance(features, FeatureSet) else as_choice(features, "features")
    if each is None or each.dim() < 2:
        chosen = as_feature_set(features if each is None else each, width, head=head)
        if not len(chosen):
            raise ShapeMismatch(f"features: expected at least one, got {chosen!r}, which is empty")
        return chosen.mask[None].float()
    if each.dtype != torch.bool or each.shape != (n, width) or not bool(each.any(1).all()):
        raise ShapeMismatch(
            f"features: expected a bool mask of shape {(n, width)} with a feature in every row, got {each.dtype} of shape "
            f"{tuple(each.shape)} with {int((each == 0).all(-1).sum())} empty rows"
        )
    return each.float()


def _head_id(model: Any, site: str) -> str:
    attachment = model.places.attachments.get(site.rpartition(".")[0])
    return getattr(getattr(attachment, "head", None), "id", "")
