"""How a hooked model is run for its verification: its inputs, its outputs, and which of its sites nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.diffusion.model import HookedDiffusion
from mmhooks.models.hooked import HookedModel
from mmhooks.models.vision.model import HookedVision
from mmhooks.models.vlm.model import HookedVLM

TEXTS = ("a photo of two cats on a sofa", "a diagram")
PROMPT = "a cat"
QUESTION = "What is in the picture?"
_LARGEST_LATENT = 32  # of a pipeline: 256 pixels where a latent is 8
_STEPS = 2


@dataclass(frozen=True, eq=False)
class Subject:
    """A hooked model with fixed inputs.

    Attributes:
        run: outputs by name, the same at every call.
        given: the inputs by tower; none of a pipeline.
        inputs: in words, for the report.
        separate: outputs are of towers of their own, so that an edit of one leaves the others alone.
        unread: beginnings of sites behind which nothing reads on: LLaVA leaves out the last layers of its image tower.
    """

    model: HookedModel
    run: Callable[[], dict[str, Tensor]]
    given: dict[str, Tensor]
    inputs: dict[str, str]
    separate: bool
    unread: tuple[str, ...] = ()

    def concerned(self, site: str, output: str) -> bool:
        """Whether an edit of a site must change an output."""
        if site.startswith(self.unread):
            return False
        return not self.separate or site.partition(".")[0] == output


def subject_of(model: Any, inputs: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> Subject:
    """A model with random images and fixed texts, or with ``inputs`` by tower.

    Raises:
        MMHooksError: a model without canonical sites, or one whose inputs are not known.
    """
    if isinstance(model, HookedDiffusion):
        return _pipeline(model, seed)
    if isinstance(model, HookedVLM):
        return _speaker(model, inputs, seed)
    if not isinstance(model, (HookedCLIP, HookedVision)):
        raise MMHooksError(
            f"verify: expected a dual encoder, a vision encoder, a vision-language model or a diffusion pipeline, got "
            f"{type(model).__name__}; hook it with mm.hook(model), or load it by name"
        )
    given = dict(inputs) if inputs is not None else _inputs(model, seed)
    given = {tower: model.to_input(value) for tower, value in given.items()}

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            return {tower: getattr(model, f"encode_{tower}")(value) for tower, value in given.items()}

    return Subject(model, run, given, {tower: _said(value) for tower, value in given.items()}, True)


def _inputs(model: HookedCLIP | HookedVision, seed: int) -> dict[str, Tensor]:
    medium = model.family.medium if isinstance(model, HookedCLIP) else "image"
    if medium != "image":
        raise MMHooksError(
            f"verify: expected inputs={{{medium!r}: a tensor, 'text': tokens}} for {type(model.model).__name__}, whose "
            f"{medium} has no size that is known here, got none"
        )
    draw = torch.Generator().manual_seed(seed)
    size = model.image_size or (224, 224)
    if model.preprocess is not None:
        size = tuple(model.preprocess(Image.new("RGB", (64, 64))).shape[1:])
    found = {"image": torch.randn(2, 3, *size, generator=draw)}
    if isinstance(model, HookedCLIP):
        if model.tokenizer is None:
            raise MMHooksError(
                "verify: expected a model with a tokenizer, or inputs={'image': pixels, 'text': tokens}, got neither"
            )
        found["text"] = model.tokenizer(list(TEXTS))
    return found


def _pipeline(model: HookedDiffusion, seed: int) -> Subject:
    pipe, unet = model.pipe, model.unet
    latent = min(int(unet.config.sample_size), _LARGEST_LATENT)  # type: ignore[union-attr]
    side = latent * pipe.vae_scale_factor
    prompt = PROMPT
    options = {
        "height": side,
        "width": side,
        "num_inference_steps": _STEPS,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }

    def run() -> dict[str, Tensor]:
        pipe.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return {"latents": pipe(prompt, generator=draw, **options).images}

    said = f"{prompt!r}, {_STEPS} steps at {side}x{side} pixels without guidance"
    return Subject(model, run, {}, {"prompt": said}, False)


def _speaker(model: HookedVLM, inputs: Mapping[str, Tensor] | None, seed: int) -> Subject:
    """One forward of a vision-language model that reads an image and a question."""
    if inputs is None:
        noise = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        inputs = model.inputs(noise, QUESTION)
    given = dict(inputs)

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model.forward(**given).logits}

    said = {name: _said(value) for name, value in given.items() if isinstance(value, Tensor)}
    return Subject(model, run, given, said, False, _unread(model))


def _unread(model: HookedVLM) -> tuple[str, ...]:
    """Of a LLaVA, whose configuration names the layers of the image tower that are read, before its last norm."""
    layers = getattr(model.model.config, "vision_feature_layer", None)
    if layers is None:
        return ()
    depth = len({site.split(".")[2] for site in model.sites("image.blocks.*")})
    chosen = [layers] if isinstance(layers, int) else layers
    last = max(layer if layer >= 0 else depth + 1 + layer for layer in chosen)  # 0: before the first block
    return ("image.ln_post", *(f"image.blocks.{n}." for n in range(last, depth)))


def _said(value: Shaped[Tensor, "..."]) -> str:
    return f"{list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
