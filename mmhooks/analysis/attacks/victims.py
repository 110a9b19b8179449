"""Models under attack, behind one protocol: an image and a request in, a text answer out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.attacks.align import pixel_scale
from mmhooks.analysis.attacks.chat_endpoint import Endpoint
from mmhooks.errors import DataError
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.utils.modes import evaluating


@runtime_checkable
class Victim(Protocol):
    """Anything that answers requests about images ``[n 3 h w]`` with values from 0 to 1."""

    name: str

    def answer(self, images: Tensor, requests: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True)
class ZeroShotVictim:
    """Answers by zero-shot classification, with the label whose prompt is nearest; the request is ignored.

    >>> import mmhooks as mm
    >>> victim = ZeroShotVictim(mm.load("mini"), ("cat", "dog"))
    >>> victim.answer(torch.rand(1, 3, 64, 64), ["What is it?"])[0] in ("cat", "dog")
    True
    """

    model: Any = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    template: str = "a drawing of a {}"
    name: str = "zero-shot CLIP"

    def __post_init__(self) -> None:
        if len(set(self.labels)) < 2:
            raise DataError(f"labels: expected at least two different ones for zero-shot, got {self.labels}")

    @cached_property
    def texts(self) -> Float[Tensor, "k d"]:
        return embed_texts(self.model, [self.template.format(label) for label in self.labels])

    def answer(
        self, images: Float[Tensor, "n 3 h w"], requests: Sequence[str], *, batch: int = 128
    ) -> list[str]:
        mean, std = pixel_scale(self.model)
        with torch.no_grad(), evaluating(self.model.model):
            parts = [
                self.model.encode_image(self.model.to_input((p - mean) / std), normalize=True).float().cpu()
                for p in images.cpu().split(batch)
            ]
        return [self.labels[i] for i in (torch.cat(parts) @ self.texts.T).argmax(1).tolist()]


@dataclass(frozen=True)
class LlavaVictim:
    """A LLaVA of transformers (:func:`mmhooks.models.vlm.llava.load_llava`).

    Attributes:
        max_new_tokens: how long an answer may be; None: the model's own (``llava.answer_tokens``).
        cut: whether the limit cut it, for every answer so far.
    """

    llava: Any = field(repr=False)
    max_new_tokens: int | None = None
    cut: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.llava.name

    @property
    def answer_tokens(self) -> int:
        return self.llava.answer_tokens if self.max_new_tokens is None else self.max_new_tokens

    def answer(self, images: Float[Tensor, "n 3 h w"], requests: Sequence[str]) -> list[str]:
        with evaluating(self.llava.model):
            found = self.llava.generate(images, requests, max_new_tokens=self.max_new_tokens)
        self.cut.extend(found.cut)
        return found.texts


@dataclass(frozen=True)
class EndpointVictim:
    """A vision model behind an OpenAI-compatible endpoint; images are sent as PNG data URIs.

    Attributes:
        cut: whether the limit of tokens cut it, for every answer so far.
    """

    endpoint: Endpoint
    cut: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.endpoint.model

    @property
    def answer_tokens(self) -> int | None:
        return self.endpoint.options.get("max_tokens")

    def answer(self, images: Float[Tensor, "n 3 h w"], requests: Sequence[str]) -> list[str]:
        found = [
            self.endpoint.complete(
                [{"role": "user", "content": [
                    {"type": "text", "text": request},
                    {"type": "image_url", "image_url": {"url": _png(image)}},
                ]}]
            )
            for image, request in zip(images, requests, strict=True)
        ]  # fmt: skip
        self.cut.extend(f.cut for f in found)
        return [f.text for f in found]


def _png(image: Float[Tensor, "3 h w"]) -> str:
    import base64
    import io

    from torchvision.transforms.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(image.detach().cpu().mul(255).round().clamp(0, 255).byte()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
