"""Where an encoder's tokens of one kind are, and the grid that its patches form."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.sites import Site
from mmhooks.models.hooked import HookedModel


def encoder_token_mask(
    model: HookedModel, site: str, kind: str, length: int, texts: Int[Tensor, "b l"] | None = None
) -> Bool[Tensor, "_ length"]:
    """Where the tokens of one kind are among ``length`` at a site: one row where they are the same for all samples, else one
    for each of ``texts``.

    Args:
        site: of an encoder's tower, or a place inside a head attached there. Of a feature map, ``length`` is height times
            width, and all of them are patches.
        kind: ``"cls"``, ``"register"`` or ``"patch"`` of images, ``"eot"`` or ``"text"`` of texts.
        texts: token ids, at sites of a tower of texts.

    Raises:
        ShapeMismatch: a kind that the tower does not have there, a site without tokens, or another length than the texts have.
        MMHooksError: a site outside an encoder's towers, or no texts.

    >>> import mmhooks as mm
    >>> model = mm.load("mini")
    >>> encoder_token_mask(model, "image.blocks.3.resid_post", "cls", 5)
    tensor([[ True, False, False, False, False]])
    """
    held = _site(model, site)
    if held.kinds is None:
        if held.tokens is None:
            raise ShapeMismatch(
                f"tokens={kind!r} at {site!r}: expected a site with a token dimension, got {held.layout}; leave it out"
            )
        raise MMHooksError(
            f"tokens={kind!r} at {site!r}: kinds of tokens are known at sites of towers of images and texts (docs/sites.md); "
            "give positions, a slice or a mask"
        )
    return held.kinds.mask(kind, length, texts, site)


def patch_grid(model: HookedModel, pixels: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches that a model's image tower makes of an image of ``pixels`` (height, width).

    Raises:
        ShapeMismatch: no image tower, or one without patches of one size (a ResNet: its sites are maps).

    >>> import mmhooks as mm
    >>> patch_grid(mm.load("mini"), (64, 64))
    (8, 8)
    """
    module = _patch_module(model)
    if hasattr(module, "dynamic_feat_size"):  # timm's, which may pad
        rows, columns = module.dynamic_feat_size(pixels)
        return int(rows), int(columns)
    kernel, stride = patch_size(model)
    return tuple((n - k) // s + 1 for n, k, s in zip(pixels, kernel, stride, strict=True))  # type: ignore[return-value]


def patch_size(model: HookedModel) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a patch in pixels, and the steps from one to the next.

    Raises:
        ShapeMismatch: as :func:`patch_grid`.

    >>> import mmhooks as mm
    >>> patch_size(mm.load("mini"))
    ((8, 8), (8, 8))
    """
    module = _patch_module(model)
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if len(convolutions) == 1 and not any(convolutions[0].padding):
        kernel, stride = convolutions[0].kernel_size, convolutions[0].stride
        return (kernel[0], kernel[1]), (stride[0], stride[1])
    config: Any = getattr(model.model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(module, "patch_size", None) or getattr(config, "patch_size", None)
    if len(convolutions) > 1 or size is None:
        raise ShapeMismatch(
            f"patches: expected an image tower whose patches are one convolution without padding, got {type(module).__name__}"
        )
    both = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return both, both


def _patch_module(model: HookedModel) -> Any:
    """The module that cuts an image into patches."""
    site = model.places.sites.canonical.get("image.patches")
    if site is None or site.is_map:
        got = "feature maps, each with a grid of its own" if site is not None else "no image.patches"
        raise ShapeMismatch(f"patches: expected a model whose image tower cuts patches, got {got}: {model!r}")
    return site.tap.owner


def _site(model: HookedModel, name: str) -> Site:
    """The site of a name, or the one where the head is attached in which the name lies."""
    places = model.places.find(name)
    if len(places) != 1:
        raise MMHooksError(f"site: expected the name of one site, got {name!r}, which selects {len(places)}")
    return places[0].site
