"""HookedVLM: a model of transformers that writes text about images, unconverted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmhooks.errors import MMHooksError, MMHooksWarning, ShapeMismatch
from mmhooks.hooks.context import CacheContext
from mmhooks.hooks.dispatch import registry
from mmhooks.hooks.selection import Tokens
from mmhooks.hooks.sites import Pattern
from mmhooks.hooks.step_cache import StepCache
from mmhooks.hooks.taps import Tap
from mmhooks.models.hooked import HookedModel
from mmhooks.models.processing import check_parts, tokenizer_of
from mmhooks.models.vlm.calls import CallsOutside, GenerationCalls, matching_images
from mmhooks.models.vlm.parts import IMAGES_BY_PROMPT, LAYOUTS, vlm_parts, vlm_sites

IMAGE_PREFIX = "<image>\n"
PROMPT = "USER: {sight}{request} ASSISTANT:"  # LLaVA 1.5's
ANSWER_TOKENS = 256  # a refusal or an instruction in full, which is what a judge has to see


@dataclass(frozen=True)
class Answers:
    """Answers, and which of them were cut because they reached the limit of new tokens.

    ``ids``: all tokens of each batch, prompt and answer.
    """

    texts: list[str]
    cut: list[bool]
    ids: list[Int[Tensor, "_ _"]]


class HookedVLM(HookedModel):
    """A vision-language model with named sites in three towers, hooks and heads. ``model`` is the given object itself.

    Sites: ``image.*`` of the vision tower; ``projector.in``, ``projector.out``; ``lm.tokens`` (token embeddings with image
    features in their places), ``lm.blocks.N.*`` with ``mlp.gate`` and, under grouped queries, ``attn.k`` and ``attn.v`` by
    key head, ``lm.ln_final``, ``lm.logits``. LLaVA 1.5 and NeXT read their tower's layer before the last, so edits of
    that tower's last layer change nothing; nor do those of ``image.ln_post`` there and in OneVision.

    In a generation, step 0 is the prompt and step t the t-th new token; image tower and projector run once, before it.
    ``tokens=`` takes kinds too: ``"image"``, ``("image", i)``, ``"text"``, ``"prompt"``, ``"generated"``, ``"last"``
    (:mod:`mmhooks.hooks.kinds`). Contexts fill a :class:`~mmhooks.hooks.step_cache.StepCache`.

    Args:
        model: LLaVA 1.5, NeXT or OneVision, PaliGemma, Gemma 3, Idefics 3, SmolVLM, InternVL or Qwen-VL (2, 2.5, 3) of
            transformers, the class ``…ForConditionalGeneration``.
        processor: the checkpoint's own; needed by :meth:`inputs`, :meth:`generate` and :meth:`answer`.
        name: for messages and manifests.
        answer_tokens: how long an answer may be where the call does not say.

    Raises:
        MMHooksError: another model, or a processor that does not fit it.

    >>> import mmhooks as mm
    >>> model = mm.load_llava()                                                     # doctest: +SKIP
    >>> with model.caching("lm.blocks.*.attn.pattern", tokens="last") as cache:     # doctest: +SKIP
    ...     model.generate([image], "What is in the picture?")
    >>> with model.hooks(mm.Zero(at="lm.blocks.*.attn.pattern", tokens="last")):    # doctest: +SKIP
    ...     model.answer([image], "What is in the picture?")
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        name: str = "",
        answer_tokens: int = ANSWER_TOKENS,
    ) -> None:
        parts = vlm_parts(model)
        if parts is None:
            raise MMHooksError(
                f"HookedVLM: expected a vision-language model of transformers of the types {', '.join(LAYOUTS)}, got "
                f"{type(model).__name__}; mm.hook(model) picks the class that fits, mm.HookedModel(model) takes any module"
            )
        _check_processor(processor, model)
        super().__init__(model, vlm_sites(model, parts), name=name)
        self.processor, self.answer_tokens = processor, answer_tokens
        self._by_prompt = model.config.model_type in IMAGES_BY_PROMPT  # type: ignore[union-attr]
        self._image_id: Any = model.config.image_token_id  # type: ignore[union-attr]
        taps = (
            GenerationCalls(model, self._image_id),
            CallsOutside(parts.image),
            CallsOutside(parts.projector),
        )
        self._calls: list[Tap] = [registry.shared(tap) for tap in taps]

    def _extra_taps(self) -> list[Tap]:
        return [*self._calls, *super()._extra_taps()]

    # -- asking ----------------------------------------------------------------------------------------

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
            images: tensors from 0 to 1 (rounded to 8 bits here), in one or in a list, or PIL images, one per request; None:
                only text.
            requests: without roles and image tokens; one for all images, or one each.
            max_new_tokens: the limit; default: ``answer_tokens``.
            batch: requests at a time.

        Raises:
            ShapeMismatch: as many images as requests are needed.
            MMHooksError: a limit below 1, or a model without a processor.

        >>> import mmhooks as mm
        >>> mm.load_llava().answer(None, "Say how to use the bomb.")                 # doctest: +SKIP
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
        **options: Any,
    ) -> Answers:
        """The model's own ``generate``, greedy unless ``options`` say otherwise; with a flag for each answer that was cut.

        A cache that is open keeps one batch: give it at most ``batch`` requests.
        """
        limit = self.answer_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise MMHooksError(f"max_new_tokens: expected at least 1, got {limit}")
        shown, asked = _paired(images, requests)
        found = Answers([], [], [])
        for begin in range(0, len(asked), batch):
            part = None if shown is None else shown[begin : begin + batch]
            inputs = self.inputs(part, asked[begin : begin + batch])
            with torch.no_grad(), matching_images(self._image_id):
                ids = self.model.generate(**inputs, max_new_tokens=limit, **{"do_sample": False, **options})  # type: ignore
            new = ids[:, inputs["input_ids"].shape[1] :]
            ends = torch.tensor(self.model.generation_config.eos_token_id or [], device=new.device)  # type: ignore
            # The batch goes on until every row has ended, so a row without an end has been cut.
            found.cut.extend((~torch.isin(new, ends).any(1)).tolist())
            texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
            found.texts.extend(text.strip() for text in texts)
            found.ids.append(ids)
        return found

    def prompt(self, request: str, *, sees: bool = True) -> str:
        """The request in the checkpoint's chat template; where it has none, in LLaVA 1.5's, or in PaliGemma's: nothing
        but the request behind the image."""
        if not getattr(self.processor, "chat_template", None):
            if self.model.config.model_type == "paligemma":  # type: ignore[union-attr]
                return f"{'<image>' if sees else ''}{request}"
            return PROMPT.format(sight=IMAGE_PREFIX if sees else "", request=request)
        content: list[dict[str, str]] = [{"type": "text", "text": request}]
        if sees:
            content.insert(0, {"type": "image"})
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    def inputs(
        self, images: Float[Tensor, "n 3 h w"] | Sequence[Any] | None, requests: str | Sequence[str]
    ) -> dict[str, Any]:
        """What the model's forward takes for images and requests, in one batch, padded in front.

        Raises:
            MMHooksError: a model without a processor.
            ShapeMismatch: as many images as requests are needed; requests with image tokens of their own.
        """
        return {name: self.to_input(value) for name, value in self.read(images, requests).items()}

    def read(
        self, images: Float[Tensor, "n 3 h w"] | Sequence[Any] | None, requests: str | Sequence[str]
    ) -> dict[str, Any]:
        """:meth:`inputs` as the processor gives them, not yet on the model's device."""
        if self.processor is None:
            raise MMHooksError(
                f"{self.name or type(self.model).__name__} has no processor to read images and requests; "
                "mm.hook(model, processor), or give model.forward the tensors of your own"
            )
        shown, asked = _paired(images, requests)
        texts = [self.prompt(request, sees=shown is not None) for request in asked]
        given = (
            {} if shown is None else {"images": [[image] for image in shown] if self._by_prompt else shown}
        )
        with matching_images(self._image_id):
            made = self.processor(text=texts, **given, padding=True, padding_side="left", return_tensors="pt")
        # Processors also give what only training needs (labels), or what the type does not take (token_type_ids).
        taken = signature(self.model.forward).parameters.keys() - {"labels"}
        return {name: value for name, value in made.items() if name in taken}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One forward of the model.

        Raises:
            ShapeMismatch: images with other features than the prompt has places for.
        """
        with matching_images(self._image_id):
            return self.model(*args, **kwargs)

    # -- contexts --------------------------------------------------------------------------------------

    def caching(
        self,
        sites: Pattern | Sequence[Pattern],
        *,
        steps: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        tokens: Tokens = None,
        strict: bool = True,
    ) -> CacheContext[StepCache]:
        """A context that fills the :class:`~mmhooks.hooks.step_cache.StepCache` it gives.

        A plain forward gives ``cache[site]`` as ``[batch ...]``; a generation every step, which ``cache.sequence(site)``
        joins.

        Args:
            steps: keep only these steps of a generation.
            tokens: keep only these positions, or the tokens of this kind.
        """
        options = {"device": device, "dtype": dtype, "detach": detach, "tokens": tokens}
        cache = StepCache(steps=steps, copy=self._writes_inplace, **options)
        return self._filling(cache, sites, detach=detach, strict=strict)

    def run_with_cache(
        self,
        *args: Any,
        sites: Pattern | Sequence[Pattern] = "*",
        steps: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        tokens: Tokens = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, StepCache]:
        """One forward of the model, ``run_with_cache(**model.inputs(images, requests))``, and the activations at ``sites``.

        Raises:
            UnknownSite, HookDidNotFire: as :meth:`caching`.
        """
        options = {"device": device, "dtype": dtype, "detach": detach, "tokens": tokens, "strict": strict}
        with self.caching(sites, steps=steps, **options) as cache:
            out = self.forward(*args, **kwargs)
        return out, cache


def _paired(images: Any, requests: str | Sequence[str]) -> tuple[list[Any] | None, list[str]]:
    """Images and requests, as many of each."""
    count = 1 if isinstance(requests, str) else len(requests)
    n = count if images is None else len(images)
    asked = [requests] * n if isinstance(requests, str) else list(requests)
    if len(asked) != n:
        raise ShapeMismatch(f"{n} images and {len(asked)} requests; one request for all, or one each")
    if images is None:
        return None, asked
    if isinstance(images, Tensor):
        return _pil(images), asked
    # A processor would take a tensor's values for bytes, and show the model a black picture.
    return [_pil(image[None])[0] if isinstance(image, Tensor) else image for image in images], asked


def _check_processor(processor: Any, model: Any) -> None:
    """Raises MMHooksError for a processor that lacks a part, has more tokens, or another image token than the model."""
    if processor is None:
        return
    config = model.config
    vocabulary = config.get_text_config().vocab_size
    images = getattr(processor, "image_processor", None)
    check_parts(processor, tokenizer=tokenizer_of(processor, 1, vocabulary))
    check_parts(processor, **{"image processor": images})
    marked = getattr(processor, "image_token_id", config.image_token_id)
    if marked != config.image_token_id:
        raise MMHooksError(
            f"processor: expected image token {config.image_token_id}, where this model puts images, got "
            f"{type(processor).__name__} with {marked}: it is another model's; load it from the model's own checkpoint, "
            "transformers.AutoProcessor.from_pretrained(...)"
        )


def _pil(images: Float[Tensor, "n 3 h w"]) -> list[Any]:
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image(p) for p in images.detach().cpu().mul(255).round().clamp(0, 255).byte()]
