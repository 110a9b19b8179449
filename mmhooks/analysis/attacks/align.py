"""Alignment on chosen features: a picture is moved until it looks benign to them (seed paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmhooks.analysis.attacks.pixels import Optimised, check_pictures, optimise_pixels
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.features import FeatureSet, as_feature_set
from mmhooks.utils.indexing import as_choice
from mmhooks.utils.modes import evaluating

SITE = "image.embed.sae.pre"


def pixel_scale(model: Any) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Mean and standard deviation with which the model's own preprocessing normalises pixels.

    Raises:
        MMHooksError: the preprocessing does not say; give ``scale=``.

    >>> import mmhooks as mm
    >>> [v.flatten().tolist() for v in pixel_scale(mm.load("mini"))]
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    from mmhooks.models.embedded import mini

    steps = getattr(model.preprocess, "transforms", [])
    found = next(((s.mean, s.std) for s in steps if type(s).__name__ == "Normalize"), None)
    if found is None and model.preprocess is mini.preprocess:
        found = mini.MEAN, mini.STD
    if found is None:
        raise MMHooksError(
            f"the preprocessing of {model!r} has no Normalize to read mean and std from; give scale=(mean, std)"
        )
    mean, std = (torch.as_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in found)
    return mean, std


def features_of(
    model: Any,
    pictures: Float[Tensor, "b 3 h w"],
    *,
    site: str = SITE,
    scale: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "b n"]:
    """What flows at ``site`` for pictures from 0 to 1, in evaluation mode and at least in fp32; differentiable to the pixels,
    normalisation included."""
    mean, std = (v.to(pictures) for v in scale or pixel_scale(model))
    with evaluating(model.model), model.caching([site], detach=False) as cache:
        model.encode_image(model.to_input((pictures - mean) / std))
    return cache[site].to(torch.promote_types(cache[site].dtype, torch.float32))


def align(
    model: Any,
    pictures: Float[Tensor, "n 3 h w"],
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
    """Moves each picture's features I towards its partner's: L = ||F_adv[:, I] - F_ben[:, I]||_2, not squared.

    Adam on the pixels, which stay between 0 and 1; mean and std are part of the graph. Features are read before the
    sparsifying non-linearity (``.pre``): a latent that TopK left out would carry no gradient.

    Args:
        model: a hooked CLIP with a head attached at ``image.embed``.
        pictures, partners: adversarial pictures and the benign one that belongs to each, from 0 to 1.
        features: I, one set for all pictures (a FeatureSet, indices or a mask ``[f]``); or a mask a picture ``[n f]``,
            for instance an equal sample of a larger group drawn anew for each (:func:`samples_of`); None: all features.
        site: where features are read; any site of width f.
        steps, lr, keep, batch, progress, label: of :func:`~mmhooks.analysis.attacks.pixels.optimise_pixels`.

    Returns:
        :class:`~mmhooks.analysis.attacks.pixels.Optimised`; ``history`` is L of each picture.

    Raises:
        ShapeMismatch: pictures and partners differ in shape, or are not from 0 to 1; a mask of another shape.
        WrongHead: a FeatureSet of another head.
        UnknownSite: no such site; attach the head first.

    >>> import mmhooks as mm
    >>> model = mm.load("mini"); _ = model.attach(mm.load_head("mini/sae"), at="image.embed")
    >>> made = align(model, torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64), steps=3, progress=False)
    >>> bool((made.history[-1] < made.history[0]).all())
    True
    """
    check_pictures(pictures)
    check_pictures(partners, "partners")
    if pictures.shape != partners.shape:
        raise ShapeMismatch(
            f"every picture has its partner of the same size; came {tuple(pictures.shape)} and {tuple(partners.shape)}"
        )
    scale = scale or pixel_scale(model)
    with torch.no_grad():
        parts = [features_of(model, p, site=site, scale=scale) for p in partners.split(batch)]
    wanted = torch.cat(parts)
    chosen = _mask(features, len(pictures), wanted.shape[1], _head_id(model, site))

    def loss(x: Float[Tensor, "b 3 h w"], ids: Tensor) -> Float[Tensor, " b"]:
        difference = features_of(model, x, site=site, scale=scale) - wanted[ids]
        return length(difference * chosen[ids if len(chosen) > 1 else torch.zeros_like(ids)])

    return optimise_pixels(
        pictures, loss, steps=steps, lr=lr, keep=keep, batch=batch, progress=progress, label=label
    )


def length(difference: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Euclidean norms; below 1e-5, which is rounding error, without gradient: Adam would make noise of it."""
    return difference.square().sum(1).clamp_min(1e-10).sqrt()


def samples_of(group: FeatureSet, k: int, n: int, *, seed: int = 0) -> Bool[Tensor, "n f"]:
    """``n`` samples of ``k`` features of a group, one a row: equal counts without one lucky draw.

    >>> samples_of(FeatureSet([1, 3, 5], 6), 2, 4).sum(1).tolist()
    [2, 2, 2, 2]
    """
    return torch.stack([group.sample(k, seed=seed * 1_000_003 + i).mask for i in range(n)])


def _mask(features: Any, n: int, width: int, head: str) -> Float[Tensor, "m f"]:
    """As a factor on features: one row for all pictures, or a row each."""
    if features is None:
        return torch.ones(1, width)
    each = None if isinstance(features, FeatureSet) else as_choice(features, "features")
    if each is None or each.dim() < 2:
        chosen = as_feature_set(features if each is None else each, width, head=head)
        if not len(chosen):
            raise ShapeMismatch(f"{chosen!r} is empty: there is nothing to align")
        return chosen.mask[None].float()
    if each.dtype != torch.bool or each.shape != (n, width) or not bool(each.any(1).all()):
        raise ShapeMismatch(
            f"a bool mask of [{n} {width}] with a feature in every row, came {each.dtype} of {tuple(each.shape)} with "
            f"{int((each == 0).all(-1).sum())} empty rows"
        )
    return each.float()


def _head_id(model: Any, site: str) -> str:
    attachment = model.places.attachments.get(site.rpartition(".")[0])
    return getattr(getattr(attachment, "head", None), "id", "")
