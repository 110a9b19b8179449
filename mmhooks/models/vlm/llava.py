"""LLaVA through transformers: the embedded `mini-llava`, or any checkpoint by name or path, asked about images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MissingWeights, MMHooksError, MMHooksWarning, ShapeMismatch
from mmhooks.models.foreign_code import no_foreign_code, refuse_code
from mmhooks.models.load_options import Device, Dtype, plain_dtype, take_device, take_dtype
from mmhooks.utils.faults import first_line

NAME = "mini-llava"
IMAGE_PREFIX = "<image>\n"
PROMPT = "USER: {sight}{request} ASSISTANT:"  # LLaVA 1.5's
MINI_TOKENS = 24  # mini-llava says one short sentence
ANSWER_TOKENS = 256  # a checkpoint's: a refusal or an instruction in full, which is what a judge has to see
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
class Answers:
    """Answers, and which of them were cut because they reached the limit of new tokens."""

    texts: list[str]
    cut: list[bool]


@dataclass(frozen=True)
class Llava:
    """A ``LlavaForConditionalGeneration`` with its own processor. ``model`` is the object itself, never wrapped.

    ``answer_tokens`` is how long an answer may be where the call does not say: 24 tokens for the embedded `mini-llava`,
    256 for checkpoints.
    """

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    name: str = NAME
    answer_tokens: int = MINI_TOKENS

    def answer(
        self,
        images: Float[Tensor, "n 3 h w"] | Sequence[Any] | None,
        requests: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        batch: int = 32,
    ) -> list[str]:
        """Greedy answers, one per request; images go through the checkpoint's own processor.

        Warns (:class:`~mmhooks.errors.MMHooksWarning`) of answers that were cut at the limit; :meth:`generate` returns
        which.

        Args:
            images: from 0 to 1 (rounded to 8 bits here), or PIL images, one per request; None: only text.
            requests: without roles and image tokens; one for all images, or one each.
            max_new_tokens: the limit; default: ``answer_tokens``.
            batch: requests at a time.

        Raises:
            ShapeMismatch: as many images as requests are needed.
            MMHooksError: a limit below 1.

        >>> load_llava().answer(None, "Say how to use the bomb.")                 # doctest: +SKIP
        ['I cannot help with that.']
        """
        found = self.generate(images, requests, max_new_tokens=max_new_tokens, batch=batch)
        if any(found.cut):
            limit = self.answer_tokens if max_new_tokens is None else max_new_tokens
            warnings.warn(
                f"{sum(found.cut)} of {len(found.cut)} answers of {self.name} were cut at {limit} new tokens; "
                "give a larger max_new_tokens=",
                MMHooksWarning,
                stacklevel=2,
            )
        return found.texts

    def generate(
        self,
        images: Float[Tensor, "n 3 h w"] | Sequence[Any] | None,
        requests: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        batch: int = 32,
    ) -> Answers:
        """:meth:`answer`, with a flag for each answer that was cut, instead of a warning."""
        limit = self.answer_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise MMHooksError(f"max_new_tokens: expected at least 1, got {limit}")
        count = 1 if isinstance(requests, str) else len(requests)
        n = count if images is None else len(images)
        asked = [requests] * n if isinstance(requests, str) else list(requests)
        if len(asked) != n:
            raise ShapeMismatch(f"{n} images and {len(asked)} requests; one request for all, or one each")
        shown = _pil(images) if isinstance(images, Tensor) else images
        found = Answers([], [])
        for begin in range(0, n, batch):
            texts = [self.prompt(r, sees=shown is not None) for r in asked[begin : begin + batch]]
            part = None if shown is None else list(shown[begin : begin + batch])
            made = self._batch(texts, part, limit)
            found.texts.extend(made.texts)
            found.cut.extend(made.cut)
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
    def _batch(self, texts: list[str], images: list[Any] | None, limit: int) -> Answers:
        given = {} if images is None else {"images": images}
        inputs = self.processor(text=texts, **given, padding=True, return_tensors="pt").to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        inputs.pop("token_type_ids", None)
        ids = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        ends = torch.tensor(self.model.generation_config.eos_token_id or [], device=new.device)
        # The batch goes on until every row has ended, so a row without an end has been cut.
        cut = ~torch.isin(new, ends).any(1)
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return Answers([text.strip() for text in texts], cut.tolist())


def load_llava(
    source: str | Path = "mini",
    *,
    device: Device | None = None,
    dtype: Dtype | None = None,
    **options: Any,
) -> Llava:
    """``"mini"`` (embedded, no network), or any LLaVA checkpoint of transformers by Hub name or folder.

    Args:
        device: where the loaded model is moved, the CPU by default. It is read into the CPU's memory first; not beside
            ``device_map=``.
        dtype: of the weights. Default: the checkpoint's own, as ``"auto"`` of transformers (the type that its
            configuration names, else that of its first weights); the published LLaVA-1.5-7b is fp16: 14 GB, where fp32
            takes 28. mini-llava: fp32. ``torch_dtype=`` is the same option by its older name. Half precision saves memory;
            a CPU without arithmetic of its own for it reads prompts several times slower than in fp32.
        options: of ``from_pretrained`` (``revision``, ``cache_dir``, ``local_files_only``, ``quantization_config``, ...).
            ``device_map={"": "cuda"}`` reads weights straight to where they run, ``device_map="auto"`` spreads them over
            all accelerators, then the CPU, then the disk (needs ``accelerate``); images and prompts go to the device of
            the first weights.

    Raises:
        MissingWeights: no such folder or repository, it cannot be fetched, or the checkpoint lacks weights.
        MMHooksError: the checkpoint is not a LLaVA, or two options contradict each other.

    >>> load_llava().model.config.model_type                                  # doctest: +SKIP
    'llava'
    """
    embedded = str(source) in ("mini", NAME)
    weights = take_dtype(dtype, options, default=torch.float32 if embedded else "auto")
    place = take_device(device, options)
    if embedded:
        if options:
            raise MMHooksError(f"mini-llava is embedded and takes no {', '.join(options)}")
        model, processor = _embedded()
        model = model.to(dtype=plain_dtype(weights, NAME))
    else:
        model, processor = _checkpoint(str(source), weights, options)
    processor.tokenizer.padding_side = "left"  # answers begin where prompts end
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    model = (model if place is None else model.to(place)).eval()
    if embedded:
        return Llava(model, processor)
    return Llava(model, processor, str(source), ANSWER_TOKENS)


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
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options
            )
            model, report = loaded
            processor = AutoProcessor.from_pretrained(source, **where)
    except OSError as error:
        raise MissingWeights(
            f"no LLaVA checkpoint at {source!r} ({type(error).__name__}: {first_line(error)}); give a folder "
            'that save_pretrained wrote, a Hub name that can be fetched, or "mini"'
        ) from error
    if missing := sorted(
        report["missing_keys"]
    ):  # transformers fills them with random numbers and only warns
        raise MissingWeights(
            f"{source} lacks {len(missing)} weights of its own configuration, such as {missing[0]}; expected a whole "
            "checkpoint: fetch its missing files again"
        )
    return model, processor


def _pil(images: Float[Tensor, "n 3 h w"]) -> list[Any]:
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image(p) for p in images.detach().cpu().mul(255).round().clamp(0, 255).byte()]
