"""Which tokens of each input become rows, and their values at a site as a table of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mmhooks.errors import ShapeMismatch
from mmhooks.hooks.kinds import TokenSequence, is_kind
from mmhooks.hooks.places import Place
from mmhooks.hooks.selection import ChosenTokens, Tokens, chosen_tokens, token_mask
from mmhooks.hooks.splice import HeadSite
from mmhooks.models.encoder_tokens import encoder_token_mask
from mmhooks.models.hooked import HookedModel


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The chosen tokens of a batch at one site.

    Attributes:
        values: the tokens of the first input, then of the second.
        counts: how many each input has.
    """

    values: Float[Tensor, "rows ..."]
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TokenChoice:
    """The tokens that become rows: a kind, positions, a slice or a mask of positions, the same at every site."""

    tokens: ChosenTokens

    @classmethod
    def of(cls, tokens: Tokens) -> TokenChoice:
        """Reads ``tokens=``.

        Raises:
            ShapeMismatch: no kind of tokens, or a mask that differs between inputs.
        """
        chosen = chosen_tokens(tokens)
        if chosen is None or (isinstance(chosen, Tensor) and chosen.dim() > 1):
            raise ShapeMismatch(
                f"tokens: expected a kind such as 'patch', positions, a slice or a mask [L], got {tokens!r}"
            )
        return cls(chosen)

    @property
    def is_ragged(self) -> bool:
        """Whether inputs can hold different numbers of them."""
        return is_kind(self.tokens) and self.tokens not in ("patch", "cls", "register", "eot", "last")

    def to_json(self) -> Any:
        """For the manifest of a store."""
        if isinstance(self.tokens, slice):
            return {"slice": [self.tokens.start, self.tokens.stop, self.tokens.step]}
        if isinstance(self.tokens, Tensor):
            return self.tokens.nonzero().flatten().tolist()
        return self.tokens if isinstance(self.tokens, str) else list(self.tokens)

    def rows(
        self,
        model: HookedModel,
        place: Place,
        value: Float[Tensor, "b ..."],
        inputs: Mapping[str, Shaped[Tensor, "..."]],
    ) -> TokenRows:
        """The chosen tokens of what flowed at a site when the model ran ``inputs``.

        Raises:
            ShapeMismatch: a site without tokens, a position outside of it, or a kind that it does not hold.
        """
        tokens = _tokens_second(place, value)
        mask = self._mask(model, place, tokens, inputs).to(value.device)
        if len(mask) == 1:
            index = mask[0].nonzero().flatten()
            whole = len(index) == tokens.shape[1]
            kept = tokens if whole else tokens.index_select(1, index)
            return TokenRows(kept.flatten(0, 1), (len(index),) * len(value))
        counts = mask.sum(1).tolist()
        if 0 in counts:
            raise ShapeMismatch(
                f"tokens={self.tokens!r} at {place.name!r}: input {counts.index(0)} of {len(counts)} of a batch holds none"
            )
        return TokenRows(tokens[mask], tuple(counts))

    def _mask(
        self, model: HookedModel, place: Place, tokens: Tensor, inputs: Mapping[str, Tensor]
    ) -> Bool[Tensor, "_ length"]:
        length = tokens.shape[1]
        if not is_kind(self.tokens):
            mask = token_mask(self.tokens, tokens, 1, place.name)
            return mask.reshape(mask.shape[0], length)
        if "input_ids" in inputs and place.site.tower == "lm":
            ids = inputs["input_ids"]
            image = model.model.config.image_token_id  # type: ignore[union-attr]
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            sequence = TokenSequence(ids, real, int(image), ids.shape[1], generates=False)  # type: ignore[arg-type]
            return sequence.find(self.tokens, length, tokens.device, place.name).mask
        kind = self.tokens
        if not isinstance(kind, str):
            raise ShapeMismatch(
                f"tokens={kind!r} at {place.name!r}: runs of image tokens are known at lm.* sites"
            )
        return encoder_token_mask(model, place.site.name, kind, length, inputs.get("text"))


def _tokens_second(place: Place, value: Tensor) -> Float[Tensor, "b length ..."]:
    """A value with its tokens along the second dimension; a map's positions row by row."""
    if place.site.is_map:
        last = value if isinstance(place, HeadSite) else place.site.vectors_last(value)
        return rearrange(last, "b ... d -> b (...) d")
    axis = place.site.tokens
    if axis is None or value.dim() < axis + 2:
        raise ShapeMismatch(
            f"tokens= at {place.name!r}: expected a site with tokens, got shape {tuple(value.shape)}; leave tokens= out"
        )
    return value.movedim(axis, 1)


def grid_of(place: Place, value: Float[Tensor, "b ..."]) -> tuple[int, int] | None:
    """Rows and columns of a feature map; None at other sites."""
    if not place.site.is_map:
        return None
    last = value if isinstance(place, HeadSite) else place.site.vectors_last(value)
    return (int(last.shape[-3]), int(last.shape[-2]))


def same_counts(found: Mapping[str, TokenRows]) -> Sequence[int]:
    """How many rows each input has, at every site.

    Raises:
        ShapeMismatch: sites with different numbers of tokens.
    """
    first, *others = found
    for name in others:
        if found[name].counts != found[first].counts:
            raise ShapeMismatch(
                f"expected sites with as many tokens of each pair, got {found[first].counts[:4]} … at {first!r} and "
                f"{found[name].counts[:4]} … at {name!r}; write a store for each"
            )
    return found[first].counts
