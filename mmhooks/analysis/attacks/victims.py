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
    """A LLaVA of transformers (:func:`mmhooks.models.vlm.llava.load_llava`)."""

    llava: Any = field(repr=False)
    max_new_tokens: int = 24

    @property
    def name(self) -> str:
        return self.llava.name

    def answer(self, images: Float[Tensor, "n 3 h w"], requests: Sequence[str]) -> list[str]:
        with evaluating(self.llava.model):
            return self.llava.answer(images, requests, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class EndpointVictim:
    """A vision model behind an OpenAI-compatible endpoint; images are sent as PNG data URIs."""

    endpoint: Endpoint

    @property
    def name(self) -> str:
        return self.endpoint.model

    def answer(self, images: Float[Tensor, "n 3 h w"], requests: Sequence[str]) -> list[str]:
        return [
            self.endpoint.ask(
                [{"role": "user", "content": [
                    {"type": "text", "text": request},
                    {"type": "image_url", "image_url": {"url": _png(image)}},
                ]}]
            )
            for image, request in zip(images, requests, strict=True)
        ]  # fmt: skip


def _png(image: Float[Tensor, "3 h w"]) -> str:
    import base64
    import io

    from torchvision.transforms.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(image.detach().cpu().mul(255).round().clamp(0, 255).byte()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
