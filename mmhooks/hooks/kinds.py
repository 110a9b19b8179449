"""Kinds of tokens in the sequence that a generative model is running: ``image``, ``text``, ``prompt``, ``generated``, ``last``.

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
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch

KINDS = ("image", "text", "prompt", "generated", "last")


class Found(NamedTuple):
    """The tokens of one kind among those that a module sees."""

    mask: Bool[Tensor, "b l"]
    any: bool


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
    _found: dict[tuple[str, int, torch.device], Found] = field(default_factory=dict, repr=False)

    @cached_property
    def masks(self) -> dict[str, Bool[Tensor, "b t"]]:
        """Where the tokens of each kind are, on the CPU: computed at the first question of a step."""
        ids, real = self.ids.cpu(), self.real.cpu()
        image = real & (ids == self.image_id)
        prompt = real & (torch.arange(ids.shape[1]) < self.prompt)
        behind = real.long().flip(1).cumsum(1).flip(1)  # real tokens from here on
        kinds = (image, real & ~image, prompt, real & ~prompt, real & (behind == 1))
        return dict(zip(KINDS, kinds, strict=True))

    def counts(self) -> str:
        """For messages."""
        held = ", ".join(f"{int(self.masks[kind].sum())} {kind}" for kind in KINDS[:4])
        return f"{held} tokens in {len(self.ids)} rows"

    def find(self, kind: str, length: int, device: torch.device, where: str) -> Found:
        """The tokens of one kind among the last ``length`` of the sequence.

        Raises:
            ShapeMismatch: the batch holds none, and none can follow; or earlier tokens are not known.
        """
        key = (kind, length, device)
        if key not in self._found:
            if length > self.ids.shape[1]:
                raise ShapeMismatch(
                    f"tokens={kind!r} at {where!r}: expected at most the {self.ids.shape[1]} tokens that this call was "
                    f"given, got {length}, as it continues an earlier one; use generate(), which knows them all"
                )
            whole = self.masks[kind]
            if not bool(whole.any()) and not (kind == "generated" and self.generates):
                raise ShapeMismatch(
                    f"tokens={kind!r} at {where!r}: the batch holds none of that kind: {self.counts()}"
                )
            mask = whole[:, whole.shape[1] - length :]
            self._found[key] = Found(mask.to(device), bool(mask.any()))
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


def tokens_of_kind(kind: str, length: int, device: torch.device, where: str) -> Found:
    """The tokens of one kind among the ``length`` that the site ``where`` sees now.

    Raises:
        MMHooksError: no sequence is known there.
        ShapeMismatch: as :meth:`TokenSequence.find`.
    """
    sequence = _NOW.get()
    if sequence is None:
        raise MMHooksError(
            f"tokens={kind!r} at {where!r}: kinds of tokens are known in the language model of a HookedVLM whose call gets "
            "input_ids; elsewhere give positions, a slice or a mask"
        )
    return sequence.find(kind, length, device, where)
