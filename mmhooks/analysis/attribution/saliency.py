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
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.cache import ActivationCache
from mmhooks.models.clip.inputs import Model, Vectors, check_batch, check_directions, check_model
from mmhooks.models.clip.readout import Readout
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
def gradient_attention(
    model: Model, pixels: Vectors, directions: Vectors, *, start: int = 0
) -> Float[Tensor, "b r s"]:
    """Chefer, Gur, Wolf 2021: ``R ← R + mean_h (∇A ⊙ A)⁺ R`` through the blocks, ∇ of the cosine with the direction.

    Args:
        start: the first block that counts; negative from the end. 0 is the paper's, -1 that of its notebook for CLIP.

    Raises:
        ShapeMismatch: the tower has no such block.
    """
    check(model, pixels, directions)
    return as_grid(_relevance(model, pixels, directions, "image", start))


def text_relevance(
    model: Model, tokens: Vectors, directions: Vectors, *, start: int = 0
) -> Float[Tensor, "b token"]:
    """How much each token of a text matters for its similarity to an image: :func:`gradient_attention` in the text tower.

    Args:
        tokens: as ``model.tokenizer`` makes them.
        directions: one embedding ``[b e]`` per text, such as its image's.
        start: as in :func:`gradient_attention`.

    Raises:
        ShapeMismatch: not one direction per text, or no such block.
    """
    check_model(model)
    check_batch(model, tokens, "text")
    check_directions(directions, None, "directions")
    if not len(tokens) or len(tokens) != len(directions):
        raise ShapeMismatch(
            f"expected one direction per text, got {len(tokens)} texts and {len(directions)} directions"
        )
    with torch.enable_grad():
        return _relevance(model, tokens, directions, "text", start)


@torch.enable_grad()
def legrad(
    model: Model, pixels: Vectors, directions: Vectors, *, layers: int | None = None
) -> Float[Tensor, "b r s"]:
    """LeGrad (Bousselham et al. 2024): per block, the gradient of *its own* output's similarity to the text with respect to
    its attention map, positive part, mean over attention heads and queries; then the mean over blocks.

    A block's output is the mean of all its tokens, through the final norm and projection, for towers that read the class
    token (as published); other towers pool it as they pool the last one.

    Args:
        layers: only this many last blocks count; default all, the paper's. The public code counts two.

    Raises:
        ShapeMismatch: the tower has fewer blocks.
    """
    check(model, pixels, directions)
    patterns, _, cache = _patterns(model, pixels, directions, grad=True)
    readout = model.readout("image")
    depth = len(patterns)
    if layers is not None and not 1 <= layers <= depth:
        raise ShapeMismatch(f"layers: expected 1 to {depth}, the blocks of this tower, got {layers}")
    total = 0.0
    for n in range(depth - (layers or depth), depth):
        stream = cache[f"image.blocks.{n}.resid_post"].float()
        if readout.positions is not None:
            stream = stream.mean(1, keepdim=True)
        similarity = _similarity(readout.freeze(stream)(stream), directions)
        (slope,) = torch.autograd.grad(similarity, patterns[n], retain_graph=n + 1 < depth)
        total = total + slope.float().clamp_min(0).mean((1, 2))
    return as_grid(total / (layers or depth))  # type: ignore[operator]


METHODS: dict[str, Maps] = {
    "token contributions": token_contributions,
    "raw attention": raw_attention,
    "rollout": rollout,
    "gradient attention": gradient_attention,
    "LeGrad": legrad,
}


def saliency(
    model: Model, pixels: Vectors, directions: Vectors, *, method: str = "token contributions"
) -> Float[Tensor, "b r s"]:
    """Maps where in each image its similarity to a direction comes from; see the method's own function for its options.

    Args:
        pixels: as ``model.preprocess`` makes them.
        directions: one ``[b e]`` per image, such as a class's text embedding minus the mean of all classes'.
        method: one of ``METHODS``.

    Raises:
        MMHooksError: no such method. ShapeMismatch: not square images that the model reads, with one direction each.

    >>> texts = mm.embed_texts(model, ["a dog", "a beach"])                        # doctest: +SKIP
    >>> mm.saliency(model, pixels, (texts - texts.mean(0))[[0, 0, 1]]).shape       # doctest: +SKIP
    torch.Size([3, 8, 8])
    """
    if method not in METHODS:
        raise MMHooksError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method](model, pixels, directions)


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


def _relevance(
    model: Model, inputs: Tensor, directions: Tensor, tower: str, start: int
) -> Float[Tensor, "b token"]:
    """Follows relevance from the tokens that are read back to those that enter block ``start``."""
    patterns, reading, cache = _patterns(model, inputs, directions, tower=tower, grad=True)
    if not -len(patterns) <= start < len(patterns):
        raise ShapeMismatch(f"start: expected a block of {len(patterns)}, got {start}")
    patterns = patterns[start:]
    slopes = torch.autograd.grad(_similarity(cache[f"{tower}.embed"], directions), patterns)
    with torch.no_grad():
        for pattern, slope in zip(reversed(patterns), reversed(slopes), strict=True):
            weighted = (pattern.float() * slope).clamp_min(0).mean(1)
            reading = reading + torch.einsum("bq,bqt->bt", reading, weighted)
    return reading


def _patterns(
    model: Model, inputs: Tensor, directions: Tensor, *, tower: str = "image", grad: bool = False
) -> tuple[list[Tensor], Float[Tensor, "b q"], ActivationCache]:
    """Returns the attention maps of all blocks, the weight with which the embedding reads each token, and the cache."""
    readout = model.readout(tower)
    encode = model.encode_image if tower == "image" else model.encode_text
    depth = len(readout.blocks)
    sites = [f"{tower}.blocks.{n}.{leaf}" for n in range(depth) for leaf in ("attn.pattern", "resid_post")]
    given = model.to_input(inputs)
    if grad:  # a copy, as autograd cannot save a tensor made in inference mode
        given = given.detach().clone()
    first = f"{tower}.blocks.0.resid_pre"
    # Patterns need a graph even if weights are frozen: it begins at what enters the first block.
    root = [(first, _as_leaf)] if grad else []
    with (
        evaluating(model.model),
        model.hooks(fwd_hooks=root),
        model.caching([*sites, f"{tower}.embed"], detach=not grad) as cache,
    ):
        check_directions(directions, encode(given).shape[1], "directions")
    last = cache[f"{tower}.blocks.{depth - 1}.resid_post"]
    with torch.no_grad():
        weights = readout.freeze(_read(readout, last.detach(), given).float()).weights.sum(1)
        reading = torch.zeros(last.shape[:2], device=last.device)
        if readout.positions is None:
            reading = weights
        else:
            reading[torch.arange(len(inputs)), readout.positions(given)] = 1.0
        reading = normalize(reading, p=1, dim=1)
    return [cache[f"{tower}.blocks.{n}.attn.pattern"] for n in range(depth)], reading, cache


def _as_leaf(stream: Tensor, *, hook: object) -> Tensor:
    return stream.detach().clone().requires_grad_()


def _similarity(embedding: Float[Tensor, "b e"], directions: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """Sums the cosines; directions are not part of the graph."""
    return cosine_similarity(embedding.float(), directions.detach().to(embedding.device).float(), dim=1).sum()


def _read(readout: Readout, stream: Float[Tensor, "b t d"], inputs: Tensor) -> Float[Tensor, "b u d"]:
    if readout.positions is None:
        return stream
    return stream[torch.arange(len(stream)), readout.positions(inputs)][:, None]
