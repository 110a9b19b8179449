"""Where in a picture an embedding's likeness to a text comes from: token contributions, and four baselines.

All read the engine's own sites, take a picture's text as a direction of its own, and give one map of the patches,
``[b rows columns]``: larger is more the text's. Their scales differ; compare ranks, or thresholds of each map's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mmhooks.analysis.decomposition.contributions import decompose_batch
from mmhooks.errors import ShapeMismatch
from mmhooks.hooks.cache import ActivationCache
from mmhooks.models.clip.inputs import Model, Vectors, check_batch, check_directions, check_model
from mmhooks.models.clip.readout import Readout, image_readout
from mmhooks.utils.modes import evaluating

Maps = Callable[[Model, Tensor, Tensor], Tensor]
_SCORED = 8  # images whose tokens are scored together


def token_contributions(model: Model, pixels: Vectors, directions: Vectors) -> Float[Tensor, "b r s"]:
    """Contributions of the patches through all attention heads along each picture's direction (Gandelsman et al.
    2024, Section 5). For their segmentation a direction is the class's unit text embedding less the mean of all."""
    check(model, pixels, directions)
    maps = []
    # A batch's scores are along the directions of all its images: few at a time, or memory grows with their square.
    for images, own in zip(pixels.split(_SCORED), directions.split(_SCORED), strict=True):
        scores = decompose_batch(model, images, against=own).scores
        assert scores is not None
        each = torch.arange(len(images), device=scores.device)
        maps.append(scores.sum((1, 2))[each, :, each])
    return as_grid(torch.cat(maps))


@torch.no_grad()
def raw_attention(model: Model, pixels: Vectors, directions: Vectors) -> Float[Tensor, "b r s"]:
    """Attention of the tokens that are read, in the last block, mean over attention heads. Knows no text."""
    check(model, pixels, directions)
    patterns, reading, _ = _patterns(model, pixels, directions)
    return as_grid(torch.einsum("bq,bqt->bt", reading, patterns[-1].float().mean(1)))


@torch.no_grad()
def rollout(model: Model, pixels: Vectors, directions: Vectors) -> Float[Tensor, "b r s"]:
    """Attention rollout (Abnar, Zuidema 2020): the product of all blocks' ``(A + I) / 2``. Knows no text."""
    check(model, pixels, directions)
    patterns, reading, _ = _patterns(model, pixels, directions)
    for pattern in reversed(patterns):  # from the last block back to the patches
        reading = (reading + torch.einsum("bq,bqt->bt", reading, pattern.float().mean(1))) / 2
    return as_grid(reading)


@torch.enable_grad()
def gradient_attention(model: Model, pixels: Vectors, directions: Vectors) -> Float[Tensor, "b r s"]:
    """Chefer, Gur, Wolf 2021: ``R ← R + mean_h (∇A ⊙ A)⁺ R`` through all blocks, ∇ of the cosine with the direction."""
    check(model, pixels, directions)
    patterns, reading, cache = _patterns(model, pixels, directions, grad=True)
    similarity = _likeness(cache["image.embed"], directions)
    with torch.no_grad():
        for pattern, slope in zip(
            reversed(patterns), reversed(torch.autograd.grad(similarity, patterns)), strict=True
        ):
            reading = reading + torch.einsum(
                "bq,bqt->bt", reading, (pattern.float() * slope).clamp_min(0).mean(1)
            )
        return as_grid(reading)


@torch.enable_grad()
def legrad(model: Model, pixels: Vectors, directions: Vectors) -> Float[Tensor, "b r s"]:
    """LeGrad (Bousselham et al. 2024): of every block, the gradient of *its own* output's likeness to the text by its
    attention map, positive part, mean over attention heads and queries; mean over blocks."""
    check(model, pixels, directions)
    patterns, _, cache = _patterns(model, pixels, directions, grad=True)
    readout = image_readout(model.model)
    total = 0.0
    for n, pattern in enumerate(patterns):
        stream = _read(readout, cache[f"image.blocks.{n}.resid_post"], pixels)
        embedding = readout.freeze(stream.float())(stream.float())
        similarity = _likeness(embedding, directions)
        (slope,) = torch.autograd.grad(similarity, pattern, retain_graph=n + 1 < len(patterns))
        total = total + slope.float().clamp_min(0).mean((1, 2))
    return as_grid(total / len(patterns))  # type: ignore[operator]


METHODS: dict[str, Maps] = {
    "token contributions": token_contributions,
    "raw attention": raw_attention,
    "rollout": rollout,
    "gradient attention": gradient_attention,
    "LeGrad": legrad,
}


def as_grid(tokens: Float[Tensor, "b t"]) -> Float[Tensor, "b r s"]:
    """The patches' part of a row of tokens, as the square that they lie in; class and register tokens come first.

    >>> as_grid(torch.arange(5.0)[None]).tolist()
    [[[1.0, 2.0], [3.0, 4.0]]]
    """
    side = int(tokens.shape[1] ** 0.5)
    return rearrange(tokens[:, tokens.shape[1] - side * side :], "b (r s) -> b r s", r=side).float()


def check(model: Model, pixels: Vectors, directions: Vectors) -> None:
    """Raises ShapeMismatch unless these are images that the model reads, square, each with its direction; MMHooksError
    unless it is a hooked CLIP."""
    check_model(model)
    check_batch(model, pixels, "image")
    if not len(pixels):
        raise ShapeMismatch("expected at least one image, got none")
    check_directions(directions, None, "directions")
    if len(pixels) != len(directions) or pixels.shape[-1] != pixels.shape[-2]:
        raise ShapeMismatch(
            f"{len(directions)} directions for pictures {tuple(pixels.shape)}: give one a picture, and square pictures"
        )


def _patterns(
    model: Model, pixels: Tensor, directions: Tensor, *, grad: bool = False
) -> tuple[list[Tensor], Float[Tensor, "b q"], ActivationCache]:
    """Attention maps of all blocks, what share of the embedding's reading each token has, and the cache."""
    readout = image_readout(model.model)
    depth = len(readout.blocks)
    sites = [f"image.blocks.{n}.{leaf}" for n in range(depth) for leaf in ("attn.pattern", "resid_post")]
    given = model.to_input(pixels)
    if (
        grad
    ):  # so that patterns have a graph even where weights are frozen; of a copy: the caller's stays as it is
        given = given.detach().clone().requires_grad_()
    with evaluating(model.model), model.caching([*sites, "image.embed"], detach=not grad) as cache:
        check_directions(directions, model.encode_image(given).shape[1], "directions")
    last = cache[f"image.blocks.{depth - 1}.resid_post"]
    with torch.no_grad():
        weights = readout.freeze(_read(readout, last.detach(), pixels).float()).weights.sum(1)
        reading = torch.zeros(last.shape[:2], device=last.device)
        if readout.positions is None:
            reading = weights
        else:
            reading[torch.arange(len(pixels)), readout.positions(given)] = 1.0
        reading = normalize(reading, p=1, dim=1)
    return [cache[f"image.blocks.{n}.attn.pattern"] for n in range(depth)], reading, cache


def _likeness(embedding: Float[Tensor, "b e"], directions: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """Sum of the cosines; directions are no part of the graph."""
    return cosine_similarity(embedding.float(), directions.detach().to(embedding.device).float(), dim=1).sum()


def _read(readout: Readout, stream: Float[Tensor, "b t d"], pixels: Tensor) -> Float[Tensor, "b u d"]:
    if readout.positions is None:
        return stream
    return stream[torch.arange(len(stream)), readout.positions(pixels)][:, None]
