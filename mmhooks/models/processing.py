"""A processor of transformers as the two functions that hooked models keep: texts to tokens, and an image to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mmhooks.errors import MMHooksError

Scale = tuple[list[float], list[float]]
_REMEDY = "load it from the model's own checkpoint, transformers.AutoProcessor.from_pretrained(...)"


@dataclass(frozen=True, eq=False)
class Tokenize:
    """Texts to tokens ``[n length]``, padded to one length, so that a text's tokens do not depend on its neighbours."""

    tokenizer: Any
    length: int

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "n l"]:
        given = [texts] if isinstance(texts, str) else list(texts)
        options = {"padding": "max_length", "truncation": True, "max_length": self.length}
        return self.tokenizer(given, **options, return_tensors="pt")["input_ids"]


@dataclass(frozen=True, eq=False)
class Preprocess:
    """An image to pixels ``[3 h w]``, by an image processor of transformers."""

    processor: Any

    @property
    def scale(self) -> Scale:
        """Mean and standard deviation by which values from 0 to 1 are normalised."""
        return scale_of(self.processor)

    def __call__(self, image: Any) -> Float[Tensor, "3 h w"]:
        return torch.as_tensor(self.processor(images=image, return_tensors="pt")["pixel_values"][0])


@dataclass(frozen=True, eq=False)
class SquarePreprocess:
    """An image to pixels ``[3 side side]`` for SigLIP 2, whose processor gives patches of images of any shape.

    Images of a batch need one shape here, so they are squeezed to a square of as many patches as the processor allows.
    """

    processor: Any

    @property
    def scale(self) -> Scale:
        """Mean and standard deviation by which values from 0 to 1 are normalised."""
        return scale_of(self.processor)

    @property
    def side(self) -> int:
        """Of the square, in pixels."""
        return int(self.processor.max_num_patches**0.5) * self.processor.patch_size

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        size = self.processor.patch_size
        square = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR)
        patches = torch.as_tensor(self.processor(images=square, return_tensors="pt")["pixel_values"][0])
        n = self.side // size
        return patches.reshape(n, n, size, size, 3).permute(4, 0, 2, 1, 3).reshape(3, self.side, self.side)


@dataclass(frozen=True, eq=False)
class VideoPreprocess:
    """A video, its frames in order, to pixels ``[frame 3 h w]``, by a video processor of transformers."""

    processor: Any

    def __call__(self, frames: Sequence[Any]) -> Float[Tensor, "f 3 h w"]:
        shown = [torch.as_tensor(np.array(_rgb(frame))).permute(2, 0, 1) for frame in frames]
        made = self.processor(torch.stack(shown), return_tensors="pt", do_sample_frames=False)
        return next(v for k, v in made.items() if k.startswith("pixel_values"))[0]


def video_preprocess_of(processor: Any, size: tuple[int, int]) -> VideoPreprocess | None:
    """The video processor in a processor, or the processor if it is one; None: it has none.

    Raises:
        MMHooksError: it makes frames of another size than the model reads.
    """
    found = getattr(processor, "video_processor", processor)
    if not type(found).__name__.endswith("VideoProcessor"):
        return None
    made = VideoPreprocess(found)
    shape = tuple(made([Image.new("RGB", (64, 48))] * 2).shape)
    if shape[2:] != size:
        raise MMHooksError(
            f"processor: expected one that makes frames of {size[0]}x{size[1]} pixels, which this model reads, got "
            f"{type(found).__name__} that makes {' x '.join(map(str, shape[2:]))}: it is another model's; {_REMEDY}"
        )
    return made


def _rgb(image: Any) -> Any:
    return image.convert("RGB") if isinstance(image, Image.Image) else image


def scale_of(processor: Any) -> Scale:
    """Mean and standard deviation by which an image processor normalises values from 0 to 1.

    >>> from types import SimpleNamespace
    >>> scale_of(SimpleNamespace(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5], image_std=[0.2]))
    ([0.5], [0.2])
    """
    unit = (
        255 * processor.rescale_factor if processor.do_rescale else 255.0
    )  # what white is before it is normalised
    mean, std = (
        (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    )
    return [v / unit for v in mean], [v / unit for v in std]


def tokenizer_of(processor: Any, length: int, vocabulary: int) -> Tokenize | None:
    """The tokenizer in a processor, or the processor if it is one; None: it has none.

    Raises:
        MMHooksError: more tokens than the model embeds.
    """
    found = getattr(processor, "tokenizer", processor)
    if not hasattr(found, "convert_ids_to_tokens"):
        return None
    if len(found) > vocabulary:
        raise MMHooksError(
            f"processor: expected a tokenizer of at most {vocabulary} tokens, which this model embeds, got "
            f"{type(found).__name__} with {len(found)}: it is another model's; {_REMEDY}"
        )
    return Tokenize(found, min(length, int(min(found.model_max_length, 2**31))))


def preprocess_of(processor: Any, size: tuple[int, int] | None) -> Preprocess | SquarePreprocess | Any | None:
    """The image processor in a processor, or the processor if it is one; None: it has none.

    Raises:
        MMHooksError: it makes images of another size than ``size``, that which the model reads.
    """
    found = getattr(processor, "image_processor", processor)
    if not hasattr(found, "image_mean"):
        is_transform = callable(found) and not hasattr(found, "convert_ids_to_tokens")
        return found if is_transform and found is processor and not hasattr(found, "tokenizer") else None
    made = SquarePreprocess(found) if hasattr(found, "max_num_patches") else Preprocess(found)
    shape = tuple(made(Image.new("RGB", (64, 48))).shape)
    if size is not None and shape[1:] != size:
        raise MMHooksError(
            f"processor: expected one that makes images of {size[0]}x{size[1]} pixels, which this model reads, got "
            f"{type(found).__name__} that makes {' x '.join(map(str, shape[1:]))}: it is another model's; {_REMEDY}"
        )
    return made


def check_parts(processor: Any, **parts: Any) -> None:
    """Raises MMHooksError if a processor has none of the parts that a model needs."""
    if processor is not None and all(part is None for part in parts.values()):
        raise MMHooksError(
            f"processor: expected one with {' and '.join(parts)}, got {type(processor).__name__}; {_REMEDY}"
        )
