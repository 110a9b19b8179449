"""Saliency maps: where in an image an embedding's similarity to a text comes from; token contributions, four baselines.

Each method reads mmhooks' own sites, takes one text direction per image, and returns one map of the patches, ``[b rows
columns]``; larger values belong more to the text. Their scales differ: compare ranks, or thresholds set per map.
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
    """Computes the patches' contributions through all attention heads along each image's direction (Gandelsman et al.
    2024, Section 5). For segmentation they use the class's unit text embedding minus the mean of all classes."""
    check(model, pixels, directions)
    maps = []
    # Scores are along the directions of all images of a batch, so memory grows with its square: use small ones.
    for images, own in zip(pixels.split(_SCORED), directions.split(_SCORED), strict=True):
        scores = decompose_batch(model, images, against=own).scores
        assert scores is not None
        each = torch.arange(len(images), device=scores.device)
        maps.append(scores.sum((1, 2))[each, :, each])
    return as_grid(torch.cat(maps))


@torch.no_grad()
def raw_attention(model: Model, pixels: Vectors, directions: Vectors) -> Float[Tensor, "b r s"]:
    """Attention of the tokens that are read, in the last block, mean over attention heads. Ignores the text."""
    check(model, pixels, directions)
    patterns, reading, _ = _patterns(model, pixels, directions)
    return as_grid(torch.einsum("bq,bqt->bt", reading, patterns[-1].float().mean(1)))


@torch.no_grad()
def rollout(model: Model, pixels: Vectors, directions: Vectors) -> Float[Tensor, "b r s"]:
    """Attention rollout (Abnar, Zuidema 2020): the product of all blocks' ``(A + I) / 2``. Ignores the text."""
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
    similarity = _similarity(cache["image.embed"], directions)
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
    """LeGrad (Bousselham et al. 2024): per block, the gradient of *its own* output's similarity to the text with respect to
    its attention map, positive part, mean over attention heads and queries; then the mean over blocks."""
    check(model, pixels, directions)
    patterns, _, cache = _patterns(model, pixels, directions, grad=True)
    readout = image_readout(model.model)
    total = 0.0
    for n, pattern in enumerate(patterns):
        stream = _read(readout, cache[f"image.blocks.{n}.resid_post"], pixels)
        embedding = readout.freeze(stream.float())(stream.float())
        similarity = _similarity(embedding, directions)
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
    """Reshapes the patch tokens of a row to their square grid; class and register tokens, which come first, are dropped.

    >>> as_grid(torch.arange(5.0)[None]).tolist()
    [[[1.0, 2.0], [3.0, 4.0]]]
    """
    side = int(tokens.shape[1] ** 0.5)
    return rearrange(tokens[:, tokens.shape[1] - side * side :], "b (r s) -> b r s", r=side).float()


def check(model: Model, pixels: Vectors, directions: Vectors) -> None:
    """Raises ShapeMismatch unless these are square images that the model reads, with one direction each; MMHooksError
    unless ``model`` is a hooked CLIP."""
    check_model(model)
    check_batch(model, pixels, "image")
    if not len(pixels):
        raise ShapeMismatch("expected at least one image, got none")
    check_directions(directions, None, "directions")
    if len(pixels) != len(directions) or pixels.shape[-1] != pixels.shape[-2]:
        raise ShapeMismatch(
            f"expected square images with one direction per image, got {tuple(pixels.shape)} and {len(directions)} directions"
        )


def _patterns(
    model: Model, pixels: Tensor, directions: Tensor, *, grad: bool = False
) -> tuple[list[Tensor], Float[Tensor, "b q"], ActivationCache]:
    """Returns the attention maps of all blocks, the weight with which the embedding reads each token, and the cache."""
    readout = image_readout(model.model)
    depth = len(readout.blocks)
    sites = [f"image.blocks.{n}.{leaf}" for n in range(depth) for leaf in ("attn.pattern", "resid_post")]
    given = model.to_input(pixels)
    if grad:  # patterns need a graph even if weights are frozen; on a copy, so that the caller's tensor stays as it is
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


def _similarity(embedding: Float[Tensor, "b e"], directions: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """Sums the cosines; directions are not part of the graph."""
    return cosine_similarity(embedding.float(), directions.detach().to(embedding.device).float(), dim=1).sum()


def _read(readout: Readout, stream: Float[Tensor, "b t d"], pixels: Tensor) -> Float[Tensor, "b u d"]:
    if readout.positions is None:
        return stream
    return stream[torch.arange(len(stream)), readout.positions(pixels)][:, None]
