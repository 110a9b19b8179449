"""Checks the inputs of functions that run a CLIP, with errors that say how to convert them.

Static checkers see the types; at run time these functions check them instead of beartype, whose errors would come
first and not say what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.models.clip.model import HookedCLIP, dual_encoder_of

if TYPE_CHECKING:
    Model = HookedCLIP
    Vectors = Tensor
    Texts = Sequence[str]
else:
    Model = Vectors = Texts = Any


def check_model(model: Any) -> None:
    """Raises MMHooksError unless ``model`` is a hooked CLIP."""
    if not isinstance(model, HookedCLIP):
        hint = (
            "mm.HookedCLIP(model, tokenizer=..., preprocess=...)"
            if dual_encoder_of(model) is not None
            else "mm.load(...)"
        )
        raise MMHooksError(f"expected a mm.HookedCLIP, got {_describe(model)}: create one with {hint}")


def check_tower(tower: str) -> None:
    """Raises MMHooksError unless it is one of the two."""
    if tower not in ("image", "text"):
        raise MMHooksError(f'tower: expected "image" or "text", got {tower!r}')


def check_batch(model: HookedCLIP, inputs: Any, tower: str) -> None:
    """Raises ShapeMismatch unless ``inputs`` are pixels or tokens that this tower of the model reads."""
    check_tower(tower)
    wanted = "pixels [n 3 h w]" if tower == "image" else "tokens [n l]"
    if not isinstance(inputs, Tensor):
        raise ShapeMismatch(f"expected {wanted}, got {_describe(inputs)}: {_remedy(inputs, tower)}")
    if tower == "text":
        if inputs.ndim != 2 or inputs.is_floating_point() or inputs.dtype == torch.bool:
            raise ShapeMismatch(
                f"expected tokens [n l] of integers, got {_describe_tensor(inputs)}: model.tokenizer(list of texts) makes them"
            )
        return
    if inputs.ndim != 4 or not inputs.is_floating_point():
        hint = "add the batch axis, image[None]" if inputs.ndim == 3 else "model.preprocess(image) makes each"
        raise ShapeMismatch(
            f"expected floating-point pixels [n 3 h w], got {_describe_tensor(inputs)}: {hint}"
        )
    size, channels = model.image_size, 3
    if inputs.shape[1] != channels or (size is not None and tuple(inputs.shape[2:]) != size):
        reads = "[n 3 h w]" if size is None else f"[n 3 {size[0]} {size[1]}]"
        raise ShapeMismatch(
            f"expected pixels {reads}, which this model reads, got {_describe_tensor(inputs)}: model.preprocess(image) brings "
            "an image to its size"
        )


def check_directions(directions: Any, width: int | None, what: str) -> None:
    """Raises ShapeMismatch unless ``directions`` are vectors ``[m width]``; of any width if that is None."""
    wanted = f"vectors [m {width or 'd'}]"
    if not isinstance(directions, Tensor):
        raise ShapeMismatch(
            f"{what}: expected {wanted}, got {_describe(directions)}: "
            "mmhooks.models.clip.embed_texts.embed_texts(model, texts) makes them of texts"
        )
    if directions.ndim != 2 or not directions.is_floating_point():
        raise ShapeMismatch(
            f"{what}: expected {wanted}, got {_describe_tensor(directions)}: one vector a row"
        )
    if width is not None and directions.shape[1] != width:
        raise ShapeMismatch(
            f"{what}: expected {wanted}, got vectors of width {directions.shape[1]}: give embeddings of the same model"
        )


def _remedy(inputs: Any, tower: str) -> str:
    if tower == "text":
        return "model.tokenizer(list of texts) makes them"
    return "model.preprocess(image)[None] makes them of one image, torch.stack of several"


def _describe(value: Any) -> str:
    """A value's type for messages: "a list of str", "a PIL image", "a CLIP"."""
    if type(value).__module__.startswith("PIL."):
        return "a PIL image"
    if isinstance(value, (list, tuple)):
        return (
            f"a {type(value).__name__} of {type(value[0]).__name__}"
            if value
            else f"an empty {type(value).__name__}"
        )
    return f"a {type(value).__name__}"


def _describe_tensor(value: Tensor) -> str:
    return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
