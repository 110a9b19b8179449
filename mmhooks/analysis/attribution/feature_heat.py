"""Where a head's feature is active in an image: its activation at every patch, with the patch's place in the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.hooks.sites import Site
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.encoder_tokens import encoder_token_mask, patch_grid, patch_size
from mmhooks.models.hooked import HookedModel
from mmhooks.models.pair_inputs import required_part
from mmhooks.models.pixel_map import PixelMap, pixel_map
from mmhooks.models.vision.model import HookedVision
from mmhooks.utils.indexing import as_choice, as_indices
from mmhooks.utils.modes import evaluating
from mmhooks.utils.overlay import overlay


@dataclass(frozen=True, eq=False)
class Heat:
    """A feature's activation over one image.

    Attributes:
        values: at each cell of the site's grid.
        tops_bottoms, lefts_rights: the edges of the cells in the original image, in its pixels; beyond its edges where the
            preprocessing pads.
        image: the original.
        feature, site, head: whose activation it is.
    """

    values: Float[Tensor, "rows columns"]
    tops_bottoms: Float[Tensor, "rows 2"] = field(repr=False)
    lefts_rights: Float[Tensor, "columns 2"] = field(repr=False)
    image: Any
    feature: int
    site: str
    head: str

    @property
    def boxes(self) -> Float[Tensor, "rows columns 4"]:
        """Left, top, right and bottom of every cell."""
        rows, columns = self.values.shape
        across = self.lefts_rights[None].expand(rows, columns, 2)
        down = self.tops_bottoms[:, None].expand(rows, columns, 2)
        return torch.stack([across[..., 0], down[..., 0], across[..., 1], down[..., 1]], -1)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the whole grid: what the model sees of the image, and its padding."""
        across, down = self.lefts_rights, self.tops_bottoms
        return float(across.min()), float(down.min()), float(across.max()), float(down.max())

    @property
    def peak(self) -> tuple[float, float]:
        """The middle (x, y) of the cell with the highest activation, the first of several."""
        row, column = divmod(int(self.values.argmax()), self.values.shape[1])
        return float(self.lefts_rights[column].mean()), float(self.tops_bottoms[row].mean())

    @property
    def seen(self) -> Bool[Tensor, "h w"]:
        """Which pixels of the original lie in a cell."""
        width, height = self.image.size
        return _within(self.tops_bottoms, height)[:, None] & _within(self.lefts_rights, width)[None]

    def at_pixels(self, *, smooth: bool = False) -> Float[Tensor, "h w"]:
        """The activation at every pixel of the original: that of the cell whose middle is closest, 0 where there is none.

        Args:
            smooth: between the middles of cells, interpolate linearly.
        """
        width, height = self.image.size
        down = _weights(self.tops_bottoms, height, smooth)
        across = _weights(self.lefts_rights, width, smooth)
        return (down @ self.values.double() @ across.T).float()

    def on_image(
        self,
        *,
        smooth: bool = False,
        strength: float = 0.6,
        colours: str = "inferno",
        span: tuple[float, float] | None = None,
    ) -> Image.Image:
        """The original with the heat over it; what the model does not see of it stays as it is.

        Args:
            smooth: as in :meth:`at_pixels`.
            strength, colours: how much of the heat's colour, and a colour map of matplotlib.
            span: the activations with the first and the last colour; default: from 0 (or below) to the image's own highest.
        """
        heat = self.at_pixels(smooth=smooth)
        low, high = min(0.0, float(self.values.min())), float(self.values.max())
        shaded = overlay(self.image, heat, strength=strength, colours=colours, span=span or (low, high))
        seen = Image.fromarray(self.seen.numpy())
        return Image.composite(shaded, self.image.convert("RGB"), seen)


@overload
def heat(
    head: Head | str,
    model: HookedModel,
    image: Image.Image,
    feature: int,
    site: str | None = None,
    *,
    batch: int = 32,
) -> Heat: ...
@overload
def heat(
    head: Head | str,
    model: HookedModel,
    image: Sequence[Image.Image],
    feature: int,
    site: str | None = None,
    *,
    batch: int = 32,
) -> list[Heat]: ...
@overload
def heat(
    head: Head | str,
    model: HookedModel,
    image: Image.Image,
    feature: Sequence[int],
    site: str | None = None,
    *,
    batch: int = 32,
) -> dict[int, Heat]: ...
@overload
def heat(
    head: Head | str,
    model: HookedModel,
    image: Sequence[Image.Image],
    feature: Sequence[int],
    site: str | None = None,
    *,
    batch: int = 32,
) -> dict[int, list[Heat]]: ...
def heat(
    head: Head | str,
    model: HookedModel,
    image: Any,
    feature: Any,
    site: str | None = None,
    *,
    batch: int = 32,
) -> Heat | list[Heat] | dict[int, Heat] | dict[int, list[Heat]]:
    """The activation of a head's feature at each patch of an image, with the place of each patch in the original image.

    Open contexts of the model apply. A feature that is active nowhere gives a grid of zeros.

    Args:
        head: the head, or the name of an attached one.
        model: with ``preprocess``, through which the image goes.
        image: a PIL image of any size, or several.
        feature: its number, or several: they share one pass of the model.
        site: a site with patches or a feature map, such as ``image.blocks.3.resid_post``; by default where the head is attached.
        batch: images at a time.

    Returns:
        The heat of the image, a list for several images; for several features a dict of these by number.

    Raises:
        MMHooksError: a model without an image tower of its own or without ``preprocess``, a head that is attached nowhere or at
            several sites and no ``site=``, or a preprocessing that is no scaling, cropping and padding.
        ShapeMismatch: a site without patches, of another width than the head's, or no such feature.

    >>> import mmhooks as mm, torch
    >>> model, head = mm.load("mini"), mm.TopKSAE(192, 64, k=4)
    >>> found = mm.heat(head, model, Image.new("RGB", (96, 48), "red"), 3, "image.blocks.3.resid_post")
    >>> found.values.shape, [round(edge) for edge in found.boxes[0, 0].tolist()]
    (torch.Size([8, 8]), [0, 0, 12, 6])
    """
    if not isinstance(model, (HookedCLIP, HookedVision)) or model.family.medium != "image":
        raise MMHooksError(
            f"heat: expected a mm.HookedCLIP or mm.HookedVision of images, got {model!r}: its images have no one grid; cache the "
            'site with tokens="patch" and encode that'
        )
    reader = _reader(head, model, site)
    images = [image] if isinstance(image, Image.Image) else list(image)
    wrong = next((one for one in images if not isinstance(one, Image.Image)), None)
    if wrong is not None or not images:
        raise MMHooksError(f"heat: expected PIL images, got {type(wrong).__name__ if images else 'none'}")
    what = f"features of head {reader.head.name!r}"
    one_feature = as_choice(feature, what).dim() == 0
    numbers = list(dict.fromkeys(as_indices(feature, reader.head.n_features, what).tolist()))
    if not numbers:
        raise ShapeMismatch(f"{what}: expected at least one, got none")
    preprocess = required_part(model, "preprocess", "image")
    maps: dict[tuple[int, int], PixelMap] = {}
    found: dict[int, list[Heat]] = {number: [] for number in numbers}
    for begin in range(0, len(images), batch):
        part = images[begin : begin + batch]
        pixels = torch.stack([preprocess(one) for one in part])
        grids = _activations(model, reader, pixels, numbers)
        for one, grid in zip(part, grids, strict=True):
            if one.size not in maps:
                maps[one.size] = pixel_map(preprocess, one.size)
            shape = (pixels.shape[2], pixels.shape[3])
            down, across = _cells(model, reader.site, maps[one.size], grid[..., 0], shape)
            for number, values in zip(numbers, grid.unbind(-1), strict=True):
                found[number].append(
                    Heat(values, down, across, one, number, reader.site.name, reader.head.name)
                )
    if isinstance(image, Image.Image):
        single = {number: heats[0] for number, heats in found.items()}
        return single[numbers[0]] if one_feature else single
    return found[numbers[0]] if one_feature else found


class _Reader(NamedTuple):
    """A head, and the site that it reads."""

    head: Any
    site: Site


def _reader(head: Head | str, model: HookedModel, site: str | None) -> _Reader:
    attached = model.places.attachments
    if isinstance(head, str):
        fit = [a for key, a in attached.items() if head in (key, a.name)]
    else:
        fit = [a for a in attached.values() if a.head is head]
    if isinstance(head, str) and not fit:
        raise MMHooksError(
            f"heat: expected a head or the name of an attached one ({', '.join(attached) or 'none'}), got {head!r}"
        )
    if site is None:
        if len(fit) != 1:
            where = ", ".join(a.site.name for a in fit) or "nowhere"
            raise MMHooksError(
                f'heat: expected a head attached at one site, got one attached {where}; give site="..."'
            )
        reader = _Reader(fit[0].head, fit[0].site)
    else:
        places = model.places.find(site)
        if len(places) != 1 or not isinstance(places[0], Site):
            raise MMHooksError(f"heat: expected the name of one site of the model, got {site!r}")
        reader = _Reader(fit[0].head if isinstance(head, str) else head, places[0])
    kinds = reader.site.kinds
    if reader.site.tower != "image" or kinds is None or "patch" not in kinds.kinds:
        raise ShapeMismatch(
            f"heat: expected a site with patches or a feature map (docs/sites.md), got {reader.site.name!r} "
            f"({reader.site.layout}); "
            'give site="image.blocks.N.resid_post" and a head of its width'
        )
    return reader


@torch.no_grad()
def _activations(
    model: HookedCLIP | HookedVision, reader: _Reader, pixels: Float[Tensor, "b 3 h w"], features: list[int]
) -> Float[Tensor, "b rows columns m"]:
    head, site = reader
    with evaluating(model.model), model.caching(site.name, strict=False) as cache:
        model.encode_image(model.to_input(pixels))
    vectors = site.vectors_last(cache[site.name])
    if vectors.shape[-1] != head.d_in:
        raise ShapeMismatch(
            f"head {head.name!r} reads vectors of width {head.d_in}, site {site.name!r} carries {vectors.shape[-1]}"
        )
    if not site.is_map:
        rows, columns = patch_grid(model, (pixels.shape[2], pixels.shape[3]))
        vectors = vectors.flatten(1, -2)  # patches that are a map already
        patches = encoder_token_mask(model, site.name, "patch", vectors.shape[1])[0]
        if vectors.dim() != 3 or int(patches.sum()) != rows * columns:
            raise ShapeMismatch(
                f"heat: expected {rows} x {columns} patches at {site.name!r}, got shape {tuple(vectors.shape)}"
            )
        vectors = vectors[:, patches.to(vectors.device)].unflatten(1, (rows, columns))
    weight = next(iter(head.parameters()), vectors)
    with evaluating(head):
        return head.encode(vectors.to(weight.device, weight.dtype))[..., features].float().cpu()


def _cells(
    model: HookedModel, site: Site, where: PixelMap, values: Tensor, pixels: tuple[int, int]
) -> tuple[Float[Tensor, "rows 2"], Float[Tensor, "columns 2"]]:
    """The edges of a grid's cells in the original image. A map shares the pixels evenly; patches know their size."""
    if site.is_map:
        steps = [n / count for n, count in zip(pixels, values.shape, strict=True)]
        sizes = steps
    else:
        sizes, steps = patch_size(model)
    edges = []
    for axis, count, size, step in zip((where.rows, where.columns), values.shape, sizes, steps, strict=True):
        begins = torch.arange(count, dtype=torch.float64) * step
        edges.append(axis.back(torch.stack([begins, begins + size], 1)).float())
    return edges[0], edges[1]


def _within(edges: Float[Tensor, "m 2"], n: int) -> Bool[Tensor, " n"]:
    middles = torch.arange(n) + 0.5
    return (middles > edges.min()) & (middles < edges.max())


def _weights(edges: Float[Tensor, "m 2"], n: int, smooth: bool) -> Float[Tensor, "n m"]:
    """How much of each cell's activation each of ``n`` pixels gets."""
    middles = edges.double().mean(1)
    step = float(middles[1] - middles[0]) if len(middles) > 1 else float(edges[0, 1] - edges[0, 0])
    place = ((torch.arange(n, dtype=torch.float64) + 0.5 - middles[0]) / step).clamp(0, len(middles) - 1)
    cells = torch.arange(len(middles))
    if smooth:
        weights = (1 - (place[:, None] - cells).abs()).clamp_min(0)
    else:
        weights = ((place + 0.5).floor().clamp_max(len(middles) - 1)[:, None] == cells).double()
    return weights * _within(edges, n)[:, None]
