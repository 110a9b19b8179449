"""Kinds of tokens in encoders: ``cls``, ``register`` and ``patch`` in towers of images; ``eot``, ``text`` (and ``cls``) in those
of texts.

Where an image's tokens are is a property of its tower: class tokens, registers, then patches. Where a text ends depends on
the text, so the entry points that get its ids (``encode_text``, ``forward``) say for the time of the run what they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks.kinds import Found, Kind, check_kind


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of a tower of images: first class tokens, then registers, then patches row by row.

    Attributes:
        cls: class tokens; two in a distilled ViT.
        registers: tokens that belong to no place of the image (DINOv2 with registers, DINOv3).

    >>> ImageTokens(cls=1, registers=2).mask("patch", 5)
    tensor([[False, False, False,  True,  True]])
    """

    cls: int = 0
    registers: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that the tower has."""
        counts = {"cls": self.cls, "register": self.registers, "patch": 1}
        return tuple(kind for kind, n in counts.items() if n)

    def mask(
        self, kind: str, length: int, texts: Int[Tensor, "b l"] | None = None, where: str = ""
    ) -> Bool[Tensor, "1 length"]:
        """Where the tokens of one kind are among ``length``.

        Raises:
            ShapeMismatch: the tower does not have that kind, or has no patch among so few tokens.
        """
        check_kind(self, kind, where)
        front = self.cls + self.registers
        if length <= front:
            raise ShapeMismatch(
                f"tokens={kind!r} at {where!r}: expected more than the tower's {front} class and register tokens, got {length}"
            )
        begin, end = {"cls": (0, self.cls), "register": (self.cls, front), "patch": (front, length)}[kind]
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[:, begin:end] = True
        return mask

    def find(self, kind: Kind, length: int, device: torch.device, where: str) -> Found:
        """As :meth:`mask`, on a device."""
        check_kind(self, kind, where)
        return Found(self.mask(str(kind), length, where=where).to(device), True, kind)


@dataclass(frozen=True)
class TextTokens:
    """Tokens of a tower of texts.

    A text ends at the first ``end`` token; without one, at the last token that is no ``pad``; else it fills its row. Its end
    is of the kinds ``eot`` and ``text``, all that is behind it is padding, of no kind.

    Attributes:
        end: the token that ends a text; ``"highest"``: the highest of each row, as in OpenAI's CLIP.
        pad: the token that fills rows.
        cls: whether the tower appends a class token to the embedded text (CoCa).

    >>> TextTokens(end=9).mask("text", 5, torch.tensor([[1, 4, 9, 0, 0]]))
    tensor([[ True,  True,  True, False, False]])
    """

    end: int | str | None = None
    pad: int | None = None
    cls: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that the tower has."""
        return ("eot", "text", "cls") if self.cls else ("eot", "text")

    def ends(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """The position of each text's last token."""
        if self.end == "highest":
            return ids.argmax(1)
        positions = torch.arange(ids.shape[1], device=ids.device)
        real = torch.ones_like(ids, dtype=torch.bool) if self.pad is None else ids != self.pad
        last = (positions * real).amax(1)
        if self.end is None:
            return last
        stop = ids.eq(int(self.end))
        return torch.where(stop.any(1), stop.int().argmax(1), last)

    def mask(
        self, kind: str, length: int, texts: Int[Tensor, "b l"] | None = None, where: str = ""
    ) -> Bool[Tensor, "b length"]:
        """Where the tokens of one kind are among ``length`` in each of ``texts``.

        Raises:
            ShapeMismatch: the tower does not have that kind, or sees another number of tokens than the texts have.
            MMHooksError: no texts.
        """
        check_kind(self, kind, where)
        if texts is None:
            raise MMHooksError(
                f"tokens={kind!r} at {where!r}: where texts end is known while encode_text, forward or run_with_cache of a "
                "hooked model run them; call one of these, or give positions or a mask"
            )
        seen = length - texts.shape[1]
        if seen != 0 and not (self.cls and seen == 1):
            raise ShapeMismatch(
                f"tokens={kind!r} at {where!r}: expected the {texts.shape[1]} tokens of the texts, got {length}"
            )
        if kind == "cls":
            if not seen:
                raise ShapeMismatch(
                    f"tokens='cls' at {where!r}: the class token is appended behind this site; take one of the blocks"
                )
            mask = torch.zeros(len(texts), length, dtype=torch.bool, device=texts.device)
            mask[:, -1] = True
            return mask
        positions = torch.arange(texts.shape[1], device=texts.device)
        ends = self.ends(texts)[:, None]
        mask = positions == ends if kind == "eot" else positions <= ends
        return torch.nn.functional.pad(mask, (0, seen))

    def find(self, kind: Kind, length: int, device: torch.device, where: str) -> Found:
        """As :meth:`mask`, of the texts that run now."""
        check_kind(self, kind, where)
        now = _TEXTS.get()
        if now is None:
            return self.mask(str(kind), length, None, where)  # type: ignore[return-value]  # raises
        key = (self, str(kind), length, device)
        if key not in now.found:
            mask = self.mask(str(kind), length, now.ids, where)
            now.found[key] = Found(mask.to(device), True, kind, "eot")
        return now.found[key]


EncoderTokens = ImageTokens | TextTokens


@dataclass(frozen=True, eq=False)
class _Texts:
    """A running batch of texts, and what was found in it."""

    ids: Int[Tensor, "b l"]
    found: dict[tuple[TextTokens, str, int, torch.device], Found] = field(default_factory=dict)


_TEXTS: ContextVar[_Texts | None] = ContextVar("mmhooks_texts", default=None)


@contextmanager
def running_texts(ids: Int[Tensor, "b l"]) -> Iterator[None]:
    """Sets the texts that a tower runs inside the block."""
    token = _TEXTS.set(_Texts(ids))
    try:
        yield
    finally:
        _TEXTS.reset(token)
