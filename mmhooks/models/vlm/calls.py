"""Tracks a running vision-language model: the step of a generation, and what tokens its sequence holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.hooks import dispatch
from mmhooks.hooks.kinds import TokenSequence, running
from mmhooks.hooks.shadow import Shadow
from mmhooks.hooks.steps import moment
from mmhooks.hooks.taps import ShadowTap

# What reorders rows, runs another model between, or splits the prompt: steps would not be what they are said to be.
_REFUSED = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "prefill_chunk_size")


@dataclass(eq=False)
class _Run:
    """A generation: its tokens so far, and the number of calls of the model."""

    ends: Int[Tensor, " e"]
    calls: int = 0
    ids: Int[Tensor, "b t"] | None = None
    real: Bool[Tensor, "b t"] | None = None
    prompt: int = 0

    def extend(self, ids: Int[Tensor, "b n"], mask: Tensor | None) -> None:
        """Adds the tokens of a call: the prompt, then one, or without a KV cache the whole sequence again."""
        if self.ids is None or self.real is None:
            self.ids, self.real, self.prompt = ids, _real(ids, mask), ids.shape[1]
            return
        new = ids[:, self.ids.shape[1] :] if ids.shape[1] > self.ids.shape[1] else ids
        ended = torch.isin(self.ids[:, self.prompt :], self.ends.to(ids.device)).any(1, keepdim=True)
        self.ids = torch.cat([self.ids, new], 1)
        self.real = torch.cat([self.real, ~ended.expand_as(new)], 1)


_RUN: ContextVar[_Run | None] = ContextVar("mmhooks_generation", default=None)


class GenerationCalls(ShadowTap):
    """The calls of ``generate`` and of the model itself, each marked with its step and its tokens. Has no places."""

    def __init__(self, model: nn.Module, image_id: int) -> None:
        marks = Shadow("generate", self._mark_generate), Shadow("_call_impl", self._mark_calls)
        super().__init__(model, *marks)
        self._image_id = image_id

    def _mark_generate(self, module: Any, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not dispatch.current().contexts:
                return generate(*args, **kwargs)
            config = kwargs.get("generation_config") or module.generation_config
            _refuse(config, kwargs)
            ends = kwargs.get("eos_token_id", config.eos_token_id)
            token = _RUN.set(_Run(torch.as_tensor([] if ends is None else ends).flatten().long()))
            try:
                return generate(*args, **kwargs)
            finally:
                _RUN.reset(token)

        return wrapped

    def _mark_calls(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not dispatch.current().contexts:
                return call(*args, **kwargs)
            given = {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs}
            run, ids, mask = _RUN.get(), given.get("input_ids"), given.get("attention_mask")
            step, sequence = None, None
            if run is None and ids is not None:
                sequence = TokenSequence(ids, _real(ids, mask), self._image_id, ids.shape[1], generates=False)
            elif run is not None:
                step, run.calls = run.calls, run.calls + 1
                if ids is not None:
                    run.extend(ids, mask)
                if run.ids is not None and run.real is not None and ids is not None:
                    sequence = TokenSequence(run.ids, run.real, self._image_id, run.prompt, generates=True)
            with moment(step, None), running(sequence):
                return call(*args, **kwargs)

        return wrapped


class CallsOutside(ShadowTap):
    """The calls of a module that runs once a generation and sees no sequence: image tower, projector. Has no places."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, Shadow("_call_impl", self._mark_calls))

    def _mark_calls(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with moment(None, None), running(None):
                return call(*args, **kwargs)

        return wrapped


# How models and processors of transformers say it.
_MISMATCHES = ("image tokens do not match", "should be the same as the number of images passed")


@contextmanager
def matching_images(image_id: int) -> Iterator[None]:
    """Says what to do where transformers counts other images, or features of images, than places for them in the prompt.

    Raises:
        ShapeMismatch: it does.
    """
    try:
        yield
    except ValueError as fault:
        if not any(said in str(fault) for said in _MISMATCHES):
            raise
        raise ShapeMismatch(
            f"image tokens: expected as many as the images give features (token {image_id} in input_ids), got {fault}; "
            "requests hold no image tokens of their own, model.inputs(images, requests) adds them"
        ) from fault


def _real(ids: Int[Tensor, "b t"], mask: Any) -> Bool[Tensor, "b t"]:
    """Where tokens are no padding; a mask of four dimensions does not say."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, mask.shape[1] - ids.shape[1] :].to(ids.device).bool()


def _refuse(config: Any, options: dict[str, Any]) -> None:
    """Raises MMHooksError for ways of generating in which rows or steps are not those of the batch."""
    beams = options.get("num_beams", getattr(config, "num_beams", None)) or 1
    if beams > 1:
        raise MMHooksError(
            f"generate in a context: expected one beam, got num_beams={beams}: beams reorder the rows of a batch between "
            "steps, so that a step's rows are not the next one's; use greedy decoding or sampling (num_beams=1)"
        )
    for name in _REFUSED:
        if options.get(name, getattr(config, name, None)) is not None:
            raise MMHooksError(
                f"generate in a context: expected one call of the model a token, got {name}=, with which steps are not "
                "tokens; leave it out"
            )
