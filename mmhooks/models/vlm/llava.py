"""LLaVA through transformers: the embedded `mini-llava`, or any checkpoint by name or path, asked about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MissingWeights, MMHooksError, ShapeMismatch
from mmhooks.models.foreign_code import no_foreign_code, refuse_code
from mmhooks.models.load_options import Device, Dtype, plain_dtype, take_device, take_dtype

NAME = "mini-llava"
IMAGE_PREFIX = "<image>\n"
PROMPT = "USER: {sight}{request} ASSISTANT:"  # LLaVA 1.5's
# Options that say where a checkpoint lies: configuration and processor need them too, all others are the model's.
LOCATION_OPTIONS = (
    "revision",
    "cache_dir",
    "local_files_only",
    "token",
    "subfolder",
    "force_download",
    "proxies",
)


@dataclass(frozen=True)
class Llava:
    """A ``LlavaForConditionalGeneration`` with its own processor. ``model`` is the object itself, never wrapped."""

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    name: str = NAME

    def answer(
        self,
        images: Float[Tensor, "n 3 h w"] | Sequence[Any] | None,
        requests: str | Sequence[str],
        *,
        max_new_tokens: int = 24,
        batch: int = 32,
    ) -> list[str]:
        """Greedy answers, one per request; images go through the checkpoint's own processor.

        Args:
            images: from 0 to 1 (rounded to 8 bits here), or PIL images, one per request; None: only text.
            requests: without roles and image tokens; one for all images, or one each.

        Raises:
            ShapeMismatch: as many images as requests are needed.

        >>> load_llava().answer(None, "Say how to use the bomb.")                 # doctest: +SKIP
        ['I cannot help with that.']
        """
        count = 1 if isinstance(requests, str) else len(requests)
        n = count if images is None else len(images)
        asked = [requests] * n if isinstance(requests, str) else list(requests)
        if len(asked) != n:
            raise ShapeMismatch(f"{n} images and {len(asked)} requests; one request for all, or one each")
        shown = _pil(images) if isinstance(images, Tensor) else images
        found = []
        for begin in range(0, n, batch):
            texts = [self.prompt(r, sees=shown is not None) for r in asked[begin : begin + batch]]
            part = None if shown is None else list(shown[begin : begin + batch])
            found += self._batch(texts, part, max_new_tokens)
        return found

    def prompt(self, request: str, *, sees: bool = True) -> str:
        """The request in the checkpoint's chat template, or in LLaVA 1.5's where it has none."""
        if not getattr(self.processor, "chat_template", None):
            return PROMPT.format(sight=IMAGE_PREFIX if sees else "", request=request)
        content: list[dict[str, str]] = [{"type": "text", "text": request}]
        if sees:
            content.insert(0, {"type": "image"})
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    @torch.no_grad()
    def _batch(self, texts: list[str], images: list[Any] | None, max_new_tokens: int) -> list[str]:
        given = {} if images is None else {"images": images}
        inputs = self.processor(text=texts, **given, padding=True, return_tensors="pt").to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        inputs.pop("token_type_ids", None)
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [a.strip() for a in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def load_llava(
    source: str | Path = "mini",
    *,
    device: Device | None = None,
    dtype: Dtype | None = None,
    **options: Any,
) -> Llava:
    """``"mini"`` (embedded, no network), or any LLaVA checkpoint of transformers by Hub name or folder.

    Args:
        device: where the weights go, the CPU by default; not beside ``device_map=``, which places them itself.
        dtype: of the weights, fp32 by default; half precision is for accelerators. ``torch_dtype=`` is the same option
            by its older name. ``"auto"`` keeps the checkpoint's own.
        options: of ``from_pretrained`` (``revision``, ``cache_dir``, ``local_files_only``, ``quantization_config``, ...).

    Raises:
        MissingWeights: no such folder or repository, or it cannot be fetched.
        MMHooksError: the checkpoint is not a LLaVA, or two options contradict each other.

    >>> load_llava().model.config.model_type                                  # doctest: +SKIP
    'llava'
    """
    weights, place = take_dtype(dtype, options), take_device(device, options)
    if str(source) in ("mini", NAME):
        if options:
            raise MMHooksError(f"mini-llava is embedded and takes no {', '.join(options)}")
        model, processor, name = *_embedded(), NAME
        model = model.to(dtype=plain_dtype(weights, NAME))
    else:
        model, processor, name = *_checkpoint(str(source), weights, options), str(source)
    processor.tokenizer.padding_side = "left"  # answers begin where prompts end
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return Llava((model if place is None else model.to(place)).eval(), processor, name)


def _embedded() -> tuple[Any, Any]:
    from transformers import LlavaConfig

    from mmhooks.models.embedded import mini_llava
    from mmhooks.utils.assets import ASSETS, asset
    from mmhooks.utils.tensors import read_safetensors

    folder = ASSETS / NAME
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        asset(folder / file)
    model = mini_llava.build(LlavaConfig.from_pretrained(folder))
    state = {k: v.float() for k, v in read_safetensors(folder / "model.safetensors").items()}
    missing, strange = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.startswith(mini_llava.PREFIX) and k != "lm_head.weight"]
    if missing or strange:
        raise MMHooksError(f"the weights of {NAME} do not fit: missing {missing}, strange {strange}")
    model.tie_weights()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return model, mini_llava.processor(folder)


def _checkpoint(source: str, dtype: Dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    refuse_code(options, source)
    options = options | {"trust_remote_code": False}  # left out, it is asked at a prompt
    where = {k: v for k, v in options.items() if k in (*LOCATION_OPTIONS, "trust_remote_code")}
    try:
        with no_foreign_code(source):
            plan = AutoConfig.from_pretrained(source, **where)
            if plan.model_type != "llava":
                raise MMHooksError(f"{source} is a {plan.model_type}, not a llava (LLaVA 1.5 and its like)")
            model = LlavaForConditionalGeneration.from_pretrained(source, dtype=dtype, **options)
            return model, AutoProcessor.from_pretrained(source, **where)
    except OSError as error:
        raise MissingWeights(
            f"no LLaVA checkpoint at {source!r} ({type(error).__name__}: {str(error).splitlines()[0]}); give a folder "
            'that save_pretrained wrote, a Hub name that can be fetched, or "mini"'
        ) from error


def _pil(images: Float[Tensor, "n 3 h w"]) -> list[Any]:
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image(p) for p in images.detach().cpu().mul(255).round().clamp(0, 255).byte()]
