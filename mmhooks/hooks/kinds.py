"""Kinds of tokens, and those of the sequence that a generative model is running: ``image``, ``text``, ``prompt``,
``generated``, ``last``, and ``("image", i)``: the i-th unbroken run of image tokens in each row, an image, or a tile where a
model parts tiles by other tokens (Idefics3, SmolVLM).

A running :class:`~mmhooks.models.vlm.model.HookedVLM` says what its sequence holds; edits and caches with ``tokens=`` read
it. A sequence is a prompt and the new tokens so far. A module sees its end: all of it at the prompt, one token while
decoding, and all of it again at keys and values, which include those kept from earlier steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch

# Of a value's tokens: the same in every row, or those of each row; None: all of them.
Positions = Int[Tensor, " m"] | Int[Tensor, "b m"] | None
KINDS = ("image", "text", "prompt", "generated", "last")
ENCODER_KINDS = ("cls", "patch", "register", "eot")  # beside "text": hooks/encoder_kinds.py
Kind = str | tuple[str, int]


def is_kind(tokens: Any) -> TypeGuard[Kind]:
    """Whether ``tokens=`` names a kind, known or not, rather than positions."""
    return isinstance(tokens, str) or (
        isinstance(tokens, tuple) and len(tokens) == 2 and isinstance(tokens[0], str)
    )


def known_kind(tokens: Any) -> bool:
    """Whether there is such a kind in some model."""
    return tokens in (*KINDS, *ENCODER_KINDS) or (
        is_kind(tokens) and tokens[0] == "image" and isinstance(tokens[1], int) and tokens[1] >= 0
    )


@dataclass(frozen=True, eq=False)
class Found:
    """The tokens of one kind among those that a module sees."""

    mask: Bool[Tensor, "b l"]
    any: bool
    kind: Kind
    single: str = "last"  # a kind of which every row holds one, for messages

    def positions(self, where: str) -> Positions:
        """Where they are, as many in every row; None if they are all that the module sees.

        A row that has ended holds no last token among new ones: there it is whatever runs last.

        Raises:
            ShapeMismatch: rows hold different numbers of them.
        """
        counts, positions = self._counted
        if len(set(counts)) > 1:
            raise ShapeMismatch(
                f"{where!r}: a cache keeps as many tokens of every row, got {counts} tokens of the kind {self.kind!r}; run "
                f'rows apart, or keep all tokens, or "{self.single}"'
            )
        return positions

    @cached_property
    def _counted(self) -> tuple[list[int], Positions]:
        """How many each row holds, and their positions where all hold as many; computed once for all sites of a step."""
        mask = self.mask.cpu()
        if self.kind == "last":
            behind = torch.zeros_like(mask)
            behind[:, -1] = ~mask.any(1)
            mask = mask | behind
        counts = mask.sum(1).tolist()
        if counts == [mask.shape[1]] * len(mask) or len(set(counts)) > 1:
            return counts, None
        found = mask.nonzero()[:, 1].view(len(mask), -1).to(self.mask.device)
        return counts, found[0] if bool((found == found[:1]).all()) else found


@runtime_checkable
class HeldKinds(Protocol):
    """What tells the kinds of tokens at a site of an encoder (hooks/encoder_kinds.py)."""

    @property
    def kinds(self) -> tuple[str, ...]: ...

    def find(self, kind: Kind, length: int, device: torch.device, where: str) -> Found: ...


def check_kind(held: HeldKinds, kind: Kind, where: str) -> None:
    """Raises ShapeMismatch if the site ``where`` has no tokens of a kind."""
    if kind not in held.kinds:
        raise ShapeMismatch(
            f"tokens={kind!r} at {where!r}: expected one of the kinds of tokens there, {', '.join(held.kinds)}"
        )


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """The tokens of a running batch.

    Attributes:
        ids: of the prompt and the new tokens so far.
        real: False at padding, which belongs to no kind, and behind the end of a row that has ended.
        image_id: the token in whose places images are.
        prompt: tokens of the prompt, padding included.
        generates: whether new tokens may follow.
    """

    ids: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    image_id: int
    prompt: int
    generates: bool
    _found: dict[tuple[Kind, int, torch.device], Found] = field(default_factory=dict, repr=False)

    @cached_property
    def masks(self) -> dict[str, Bool[Tensor, "b t"]]:
        """Where the tokens of each kind are, on the CPU: computed at the first question of a step."""
        ids, real = self.ids.cpu(), self.real.cpu()
        image = real & (ids == self.image_id)
        prompt = real & (torch.arange(ids.shape[1]) < self.prompt)
        behind = real.long().flip(1).cumsum(1).flip(1)  # real tokens from here on
        kinds = (image, real & ~image, prompt, real & ~prompt, real & (behind == 1))
        return dict(zip(KINDS, kinds, strict=True))

    def mask_of(self, kind: Kind) -> Bool[Tensor, "b t"]:
        """Where the tokens of a kind are."""
        if isinstance(kind, str):
            return self.masks[kind]
        image = self.masks["image"]
        begins = image.clone()
        begins[:, 1:] &= ~image[:, :-1]
        return image & (begins.cumsum(1) == kind[1] + 1)

    def counts(self) -> str:
        """For messages."""
        held = ", ".join(f"{int(self.masks[kind].sum())} {kind}" for kind in KINDS[:4])
        return f"{held} tokens in {len(self.ids)} rows"

    def find(self, kind: Kind, length: int, device: torch.device, where: str) -> Found:
        """The tokens of one kind among the last ``length`` of the sequence.

        Raises:
            ShapeMismatch: the batch holds none, and none can follow; or earlier tokens are not known.
        """
        if (kind if isinstance(kind, str) else kind[0]) not in KINDS:
            raise ShapeMismatch(
                f"tokens={kind!r} at {where!r}: expected one of the kinds of tokens there, {', '.join(KINDS)} or ('image', i)"
            )
        key = (kind, length, device)
        if key not in self._found:
            if length > self.ids.shape[1]:
                raise ShapeMismatch(
                    f"tokens={kind!r} at {where!r}: expected at most the {self.ids.shape[1]} tokens that this call was "
                    f"given, got {length}, as it continues an earlier one; use generate(), which knows them all"
                )
            whole = self.mask_of(kind)
            if not bool(whole.any()) and not (kind == "generated" and self.generates):
                raise ShapeMismatch(
                    f"tokens={kind!r} at {where!r}: the batch holds none of that kind: {self.counts()}"
                )
            mask = whole[:, whole.shape[1] - length :]
            self._found[key] = Found(mask.to(device), bool(mask.any()), kind)
        return self._found[key]


_NOW: ContextVar[TokenSequence | None] = ContextVar("mmhooks_sequence", default=None)


@contextmanager
def running(sequence: TokenSequence | None) -> Iterator[None]:
    """Sets the sequence for everything inside the block; None: modules that see no sequence, such as image towers."""
    token = _NOW.set(sequence)
    try:
        yield
    finally:
        _NOW.reset(token)


# How many tokens a value stands for whose other tokens were not even computed, since no one keeps them.
_WHOLE: ContextVar[int | None] = ContextVar("mmhooks_whole_length", default=None)


@contextmanager
def computed_for(length: int) -> Iterator[None]:
    """Values that caches get inside the block hold only the tokens that they keep, of ``length``."""
    token = _WHOLE.set(length)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def whole_length() -> int | None:
    """The ``length`` of :func:`computed_for`; None: values hold all their tokens."""
    return _WHOLE.get()


def tokens_of_kind(
    kind: Kind, length: int, device: torch.device, where: str, held: HeldKinds | None = None
) -> Found:
    """The tokens of one kind among the ``length`` that the site ``where`` sees now.

    Args:
        held: what tells them, at a site of an encoder; else the sequence that runs.

    Raises:
        MMHooksError: no sequence is known there.
        ShapeMismatch: as :meth:`TokenSequence.find`.
    """
    if held is not None:
        return held.find(kind, length, device, where)
    sequence = _NOW.get()
    if sequence is None:
        raise MMHooksError(
            f"tokens={kind!r} at {where!r}: kinds of tokens are known in the language model of a HookedVLM whose call gets "
            "input_ids, and at sites of towers of images and texts (docs/sites.md); elsewhere give positions, a slice or a mask"
        )
    return sequence.find(kind, length, device, where)
