"""Sounds, videos or images as the tensors that a model reads, each with its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from mmhooks.data.pair_set import Pairs, Row
from mmhooks.errors import DataError, ShapeMismatch
from mmhooks.utils.digest import digest
from mmhooks.utils.indexing import one_place


class TensorPairs(Pairs):
    """Pairs whose ``image`` is a tensor: features of a sound, frames of a video, pixels of an image.

    :func:`mmhooks.extract` gives them to the model as they are, without its preprocessing.
    """

    def image(self, index: Any) -> Any:
        """The tensor of a pair, as the model reads it."""
        return self._images.open(self._rows[one_place(index, len(self), "pairs")].image_key)

    def _open(self, index: Any) -> Image.Image:
        raise DataError(
            f"{self.name}: expected an image to open, got a tensor of a {type(self).__name__}; .image(i) gives it"
        )


class _Tensors:
    """A source whose "images" are the rows of one sequence."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def open(self, image_key: int | str) -> Any:
        return self._tensors[int(image_key)]


def from_tensors(
    inputs: Shaped[Tensor, "n ..."] | Sequence[Shaped[Tensor, "..."]],
    texts: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    name: str = "tensors",
    licence: str = "",
    attribution: str = "",
) -> TensorPairs:
    """Pairs of what a processor made of sounds, videos or images, and texts, for :func:`mmhooks.extract`.

    Args:
        inputs: one row a pair, as the model's entry point reads a batch of them: features ``[channel time frequency]``
            (CLAP), frames ``[frame 3 h w]`` (X-CLIP, V-JEPA 2, VideoMAE), pixels ``[3 h w]``.
        texts: as many; for an encoder without texts, what describes the rows.
        ids: default: the numbers of the rows.

    Raises:
        ShapeMismatch: rows of different shapes, whole numbers, or another number of texts.
        DataError: an empty text, an id twice, or no pair.

    >>> import torch
    >>> from_tensors(torch.zeros(2, 4, 3, 32, 32), ["a dog runs", "a cat sleeps"]).image(1).shape
    torch.Size([4, 3, 32, 32])
    """
    if len(inputs) != len(texts) or (ids is not None and len(ids) != len(texts)):
        counts = f"{len(inputs)} tensors, {len(texts)} texts" + (
            "" if ids is None else f" and {len(ids)} ids"
        )
        raise ShapeMismatch(f"from_tensors: expected as many tensors as texts and ids, got {counts}")
    shapes = {tuple(row.shape) for row in inputs}
    if len(shapes) > 1:
        first, other = sorted(shapes)[:2]
        raise ShapeMismatch(
            f"from_tensors: expected tensors of one shape, which fit into a batch, got {first} and {other}; pad or cut them"
        )
    whole = next((row for row in inputs if not row.is_floating_point()), None)
    if whole is not None:
        raise ShapeMismatch(
            f"from_tensors: expected floating-point tensors, as a processor makes them, got {whole.dtype}; pass sounds and "
            "frames through the model's processor"
        )
    keys = [str(i) for i in range(len(texts))] if ids is None else list(ids)
    rows = [Row(key, text, i) for i, (key, text) in enumerate(zip(keys, texts, strict=True))]
    tensors = list(inputs)
    content = digest(tensors, what="tensors")
    return TensorPairs(
        rows, _Tensors(tensors), name=name, content=content, licence=licence, attribution=attribution
    )
