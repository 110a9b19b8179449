"""Where in a picture an embedding's likeness to a text comes from: token contributions, and four baselines.

All read the engine's own sites, take a picture's text as a direction of its own, and give one map of the patches,
``[b rows columns]``: larger is more the text's. Their scales differ; compare ranks, or thresholds of each map's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mmhooks.analysis.decompose import decompose
from mmhooks.errors import ShapeMismatch
from mmhooks.hooks.cache import ActivationCache
from mmhooks.models.clip import HookedCLIP
from mmhooks.models.readout import Readout, image_readout

Maps = Callable[[HookedCLIP, Tensor, Tensor], Tensor]


def token_contributions(
    model: HookedCLIP, pixels: Float[Tensor, "b c h w"], directions: Float[Tensor, "b2 e"]
) -> Float[Tensor, "b r s"]:
    """Contributions of the patches through all attention heads along each picture's direction (Gandelsman et al.
    2024, Section 5). For their segmentation a direction is the class's unit text embedding less the mean of all."""
    check(pixels, directions)
    scores = decompose(model, pixels, against=directions, batch_size=len(pixels)).scores  # type: ignore[union-attr]
    assert scores is not None
    own = torch.arange(len(pixels), device=scores.device)
    return as_grid(scores.sum((1, 2))[own, :, own])


@torch.no_grad()
def raw_attention(
    model: HookedCLIP, pixels: Float[Tensor, "b c h w"], directions: Float[Tensor, "b2 e"]
) -> Float[Tensor, "b r s"]:
    """Attention of the tokens that are read, in the last block, mean over attention heads. Knows no text."""
    check(pixels, directions)
    patterns, reading, _ = _patterns(model, pixels)
    return as_grid(torch.einsum("bq,bqt->bt", reading, patterns[-1].mean(1)))


@torch.no_grad()
def rollout(
    model: HookedCLIP, pixels: Float[Tensor, "b c h w"], directions: Float[Tensor, "b2 e"]
) -> Float[Tensor, "b r s"]:
    """Attention rollout (Abnar, Zuidema 2020): the product of all blocks' ``(A + I) / 2``. Knows no text."""
    check(pixels, directions)
    patterns, reading, _ = _patterns(model, pixels)
    for pattern in reversed(patterns):  # from the last block back to the patches
        reading = (reading + torch.einsum("bq,bqt->bt", reading, pattern.mean(1))) / 2
    return as_grid(reading)


@torch.enable_grad()
def gradient_attention(
    model: HookedCLIP, pixels: Float[Tensor, "b c h w"], directions: Float[Tensor, "b2 e"]
) -> Float[Tensor, "b r s"]:
    """Chefer, Gur, Wolf 2021: ``R ← R + mean_h (∇A ⊙ A)⁺ R`` through all blocks, ∇ of the cosine with the direction."""
    check(pixels, directions)
    patterns, reading, cache = _patterns(model, pixels, grad=True)
    similarity = cosine_similarity(cache["image.embed"], directions.to(model.device), dim=1).sum()
    with torch.no_grad():
        for pattern, slope in zip(
            reversed(patterns), reversed(torch.autograd.grad(similarity, patterns)), strict=True
        ):
            reading = reading + torch.einsum("bq,bqt->bt", reading, (pattern * slope).clamp_min(0).mean(1))
        return as_grid(reading)


@torch.enable_grad()
def legrad(
    model: HookedCLIP, pixels: Float[Tensor, "b c h w"], directions: Float[Tensor, "b2 e"]
) -> Float[Tensor, "b r s"]:
    """LeGrad (Bousselham et al. 2024): of every block, the gradient of *its own* output's likeness to the text by its
    attention map, positive part, mean over attention heads and queries; mean over blocks."""
    check(pixels, directions)
    patterns, _, cache = _patterns(model, pixels, grad=True)
    readout = image_readout(model.model)
    total = 0.0
    for n, pattern in enumerate(patterns):
        stream = _read(readout, cache[f"image.blocks.{n}.resid_post"], pixels)
        embedding = readout.freeze(stream.float())(stream.float())
        similarity = cosine_similarity(embedding, directions.to(model.device), dim=1).sum()
        (slope,) = torch.autograd.grad(similarity, pattern, retain_graph=n + 1 < len(patterns))
        total = total + slope.clamp_min(0).mean((1, 2))
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
    return tokens[:, tokens.shape[1] - side * side :].reshape(-1, side, side).float()


def check(pixels: Tensor, directions: Tensor) -> None:
    """Raises ShapeMismatch unless every picture has its direction and the pictures are square."""
    if len(pixels) != len(directions) or pixels.shape[-1] != pixels.shape[-2]:
        raise ShapeMismatch(
            f"{len(directions)} directions for pictures {tuple(pixels.shape)}: give one a picture, and square pictures"
        )


def _patterns(
    model: HookedCLIP, pixels: Tensor, *, grad: bool = False
) -> tuple[list[Tensor], Float[Tensor, "b q"], ActivationCache]:
    """Attention maps of all blocks, what share of the embedding's reading each token has, and the cache."""
    readout = image_readout(model.model)
    depth = len(readout.blocks)
    sites = [f"image.blocks.{n}.{leaf}" for n in range(depth) for leaf in ("attn.pattern", "resid_post")]
    given = pixels.to(model.device, model.dtype)
    if grad:
        given = given.requires_grad_()  # so that patterns have a graph even where weights are frozen
    with model.caching([*sites, "image.embed"], detach=not grad) as cache:
        model.encode_image(given)
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


def _read(readout: Readout, stream: Float[Tensor, "b t d"], pixels: Tensor) -> Float[Tensor, "b u d"]:
    if readout.positions is None:
        return stream
    return stream[torch.arange(len(stream)), readout.positions(pixels)][:, None]
