"""Tracks a running pipeline: the denoising step of the U-Net, and which rows it and the text encoders process.

The pipeline itself is not changed. While a context is open, ``__call__`` and ``encode_prompt`` of the
pipeline and the calls of its U-Net and text encoders are wrapped, for threads with a context only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.hooks import dispatch
from mmhooks.hooks.shadow import Shadow
from mmhooks.hooks.steps import Guidance, moment
from mmhooks.hooks.taps import ShadowTap, Tap

CONDITIONING = "encoder_hidden_states"


class _Run:
    """One call of a pipeline: counts the calls of its U-Net."""

    def __init__(self, pipe: Any, guidance_scale: float | None) -> None:
        self.pipe, self.calls = pipe, 0
        self.beside: dict[str, Any] = {}  # what ControlNets were given at this step, where it is edited
        self._scale = guidance_scale

    def next(self) -> tuple[int, Guidance]:
        number, half = self.step()
        self.calls += 1
        return number, half

    def step(self) -> tuple[int, Guidance]:
        """The step that the U-Net's next call belongs to, and the halves in its batch."""
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            raise MMHooksError("perturbed-attention guidance puts a third part into the batch: not supported")
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if guided is None:  # StableUnCLIP keeps it in a local variable
            guided = self._scale is not None and self._scale > 1.0
        return self.calls, "both" if guided else "cond"


_RUN: ContextVar[_Run | None] = ContextVar("mmhooks_run", default=None)
# The halves that the calls of each text encoder are for, in their order, while encode_prompt runs.
_TEXTS: ContextVar[tuple[tuple[Guidance, ...], dict[int, int]] | None] = ContextVar(
    "mmhooks_texts", default=None
)


class PipelineCalls(ShadowTap):
    """Tracks when the pipeline runs, and which half ``encode_prompt`` encodes in each call. Has no places."""

    def __init__(self, pipe: Any) -> None:
        shadows = [Shadow("__call__", self._track_run)]
        if hasattr(pipe, "encode_prompt"):
            shadows.append(Shadow("encode_prompt", self._track_halves))
        super().__init__(pipe, *shadows)

    def _track_run(self, pipe: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not dispatch.current().contexts:
                return call(*args, **kwargs)
            token = _RUN.set(_Run(pipe, _argument(call, "guidance_scale", args, kwargs)))
            try:
                return call(*args, **kwargs)
            finally:
                _RUN.reset(token)

        return wrapped

    def _track_halves(self, pipe: Any, encode: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not dispatch.current().contexts:
                return encode(*args, **kwargs)
            given = [
                _argument(encode, f"{which}prompt_embeds", args, kwargs) is None
                for which in ("", "negative_")
            ]
            order: tuple[Guidance, ...] = (
                *(("cond",) if given[0] else ()),
                *(("uncond",) if given[1] else ()),
            )
            token = _TEXTS.set((order, {}))
            try:
                return encode(*args, **kwargs)
            finally:
                _TEXTS.reset(token)

        return wrapped


class ModuleCalls(ShadowTap):
    """The calls of a U-Net (``denoises``) or text encoder, each marked with its step and half. Has no places."""

    def __init__(self, module: nn.Module, *, denoises: bool) -> None:
        super().__init__(module, Shadow("_call_impl", self._mark_calls))
        self._denoises = denoises

    def _mark_calls(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not dispatch.current().contexts:
                return call(*args, **kwargs)
            with _step() if self._denoises else _half(module):
                return call(*args, **kwargs)

        return wrapped


class ConsumerCalls(ShadowTap):
    """The calls of a module that receives the U-Net's conditioning before the U-Net, such as a ControlNet. Has no places.

    They are marked with the step and half of the U-Net's call that follows. With ``guess_mode`` a ControlNet gets
    the conditional rows alone.
    """

    def __init__(self, module: nn.Module, name: str, taps: Sequence[Tap]) -> None:
        super().__init__(module, Shadow("_call_impl", self._mark_calls))
        self._name, self._taps = name, tuple(taps)  # at the taps its conditioning may be edited

    def _mark_calls(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            run = _RUN.get()
            if not dispatch.current().contexts or run is None:
                return call(*args, **kwargs)
            step, half = run.step()
            if half == "both" and _argument(module.forward, "guess_mode", args, kwargs):
                half = "cond"
            if any(dispatch.programs_at(tap) for tap in self._taps):
                run.beside[self._name] = _argument(module.forward, CONDITIONING, args, kwargs)
            with moment(step, half):
                return call(*args, **kwargs)

        return wrapped


class ConditioningCompared(ShadowTap):
    """Checks that the U-Net receives the same conditioning as its ControlNets if that is edited. Has no places."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__(unet, Shadow("_call_impl", self._compare))

    def _compare(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            run = _RUN.get()
            while run is not None and run.beside:
                name, seen = run.beside.popitem()
                if not _same_values(seen, _argument(module.forward, CONDITIONING, args, kwargs)):
                    raise MMHooksError(
                        f"{name!r} of this pipeline does not receive the U-Net's text conditioning but a different one, so "
                        "an edit at 'text.cond' would not be meant for it; edit a site of the text encoder"
                    )
            return call(*args, **kwargs)

        return wrapped


class ImageEmbeds(ShadowTap):
    """The image embedding of a Stable unCLIP pipeline, before noise is added to it: of the conditional rows alone."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, Shadow("noise_image_embeddings", self._tap_embeds))

    def _tap_embeds(self, pipe: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            program = dispatch.programs_at(self)
            if program is None:
                return call(*args, **kwargs)
            bound = signature(call).bind(*args, **kwargs)
            with moment(None, "cond"):
                bound.arguments["image_embeds"] = program(bound.arguments["image_embeds"])
            return call(*bound.args, **bound.kwargs)

        return wrapped


def _same_values(given: Tensor, whole: Tensor) -> bool:
    """Whether ``given`` is ``whole``, or its last rows: compared by memory, else by value."""
    if given.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
        return True
    return given.shape[1:] == whole.shape[1:] and torch.equal(given, whole[-len(given) :])


def _step() -> Any:
    run = _RUN.get()
    return nullcontext() if run is None else moment(*run.next())


def _half(module: nn.Module) -> Any:
    texts = _TEXTS.get()
    if texts is None:
        return nullcontext()
    order, calls = texts
    number = calls[id(module)] = calls.get(id(module), -1) + 1
    return moment(None, order[number]) if number < len(order) else nullcontext()


def _argument(function: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    bound = signature(function).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments.get(name)
