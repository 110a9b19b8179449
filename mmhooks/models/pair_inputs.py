"""What turns pairs into a model's input: its preprocessing and tokenizer, or nothing where pairs are tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmhooks.data.pair_set import Pairs
from mmhooks.data.pair_stream import PairStream
from mmhooks.data.tensor_pairs import TensorPairs
from mmhooks.errors import MMHooksError
from mmhooks.models.hooked import HookedModel


def as_given(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The preprocessing of tensors that are the model's input already."""
    return tensor


def preprocess_for(model: HookedModel, medium: str, pairs: Pairs | PairStream) -> Callable[..., Any]:
    """From what the pairs hold to one row of the input of a model's tower ``medium``.

    Raises:
        MMHooksError: images for a model of sounds or videos, or a model without its preprocessing.
    """
    if isinstance(pairs, TensorPairs):
        return as_given
    if medium != "image":
        raise MMHooksError(
            f"sites of the {medium} tower: expected mm.data.from_tensors(inputs, texts), what the model's processor makes of "
            f"each {'sound' if medium == 'audio' else medium}, got pairs of images ({pairs.name})"
        )
    return required_part(model, "preprocess", "image")


def check_texts(pairs: Pairs | PairStream) -> None:
    """Raises MMHooksError if a model that reads texts is given images alone."""
    if not pairs.has_texts:
        raise MMHooksError(
            f"{pairs.name}: expected pairs with texts for sites of the text tower, or for a model that reads both together, "
            "got images without; extract sites of the image tower only, or give captions to the images"
        )


def required_part(model: HookedModel, what: str, tower: str) -> Callable[..., Any]:
    """The model's ``preprocess`` or ``tokenizer``.

    Raises:
        MMHooksError: it has none.
    """
    found = getattr(model, what, None)
    if found is None:
        raise MMHooksError(
            f"sites of the {tower} tower need the model's {what}, and {model!r} has none: give it to "
            f"mm.hook(..., {what}=...)"
        )
    return found
