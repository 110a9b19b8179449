"""HookedDiffusion: any diffusers text-to-image pipeline with a U-Net, unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.hooks.context import CacheContext
from mmhooks.hooks.dispatch import registry
from mmhooks.hooks.selection import Tokens
from mmhooks.hooks.sites import Pattern, Site, SiteMap
from mmhooks.hooks.step_cache import StepCache
from mmhooks.hooks.steps import Guidance, moment
from mmhooks.hooks.taps import ModuleArgument, Tap
from mmhooks.models.diffusion.denoising import (
    CONDITIONING,
    ConditioningCompared,
    ConsumerCalls,
    ImageEmbeds,
    ModuleCalls,
    PipelineCalls,
)
from mmhooks.models.diffusion.text_encoder import add_clip_text
from mmhooks.models.diffusion.unet_sites import add_cross_attention
from mmhooks.models.foreign_code import no_foreign_code, refuse_code
from mmhooks.models.hooked import HookedModel
from mmhooks.models.load_options import Device, Dtype, plain_dtype, take_device, take_dtype

# The pipeline's text encoders, and the towers that their sites are named by.
TEXT_ENCODERS = {"text_encoder": "text", "text_encoder_2": "text_2", "prior_text_encoder": "prior_text"}


class HookedDiffusion(HookedModel):
    """A diffusers pipeline (Stable Diffusion 1.x and 2.x, SDXL, Stable unCLIP) with named sites, hooks and heads.

    The given pipeline object is at ``.pipe``: call it as usual, inside or outside a context.

    Sites: ``text.*`` of its text encoder (``text_2.*``: SDXL's second one; ``prior_text.*``: unCLIP's),
    ``text.cond``: the conditioner as the U-Net gets it, and any ControlNet with it (edits and functions reach both, a
    cache shows the U-Net's), ``text.cond_pooled`` (SDXL), ``image.embed`` and
    ``image.cond`` (unCLIP: the image embedding before its noise, and with it and its level),
    ``unet.<block>.cross.{q, k, v, pattern, z, out}``, and any module by its native path,
    ``unet.mid_block.resnets.0``, ``vae.decoder``.

    In a guided run (``guidance_scale > 1``) the U-Net's batch holds the unconditional rows, then the conditional
    ones: ``guidance="cond"`` of an edit names one half. ``steps=`` names denoising steps, from 0. Each half is
    edited separately, so at ``text.cond`` an edit has the same effect as editing ``prompt_embeds`` directly.

    Raises:
        MMHooksError: no U-Net or no CLIP text encoder to hook, or a batch of three parts.

    >>> import mmhooks as mm
    >>> sd = mm.load_diffusion("stabilityai/stable-diffusion-2-base")                       # doctest: +SKIP
    >>> with sd.hooks(mm.Zero(imgd, at="text.cond", guidance="cond")):                      # doctest: +SKIP
    ...     image = sd.pipe("a red panda", generator=torch.manual_seed(0)).images[0]
    >>> out, cache = sd.run_with_cache("a red panda", sites="unet.mid_block.*.cross.pattern")  # doctest: +SKIP
    >>> cache.cond["unet.mid_block.attentions.0.transformer_blocks.0.cross.pattern"].shape  # doctest: +SKIP
    torch.Size([50, 1, 20, 64, 77])
    """

    def __init__(self, pipe: Any, *, name: str = "") -> None:
        unet = _unwrap_compiled(getattr(pipe, "unet", None))
        if not isinstance(unet, nn.Module):
            raise MMHooksError(
                f"HookedDiffusion takes a diffusers pipeline with a U-Net (StableDiffusionPipeline, "
                f"StableDiffusionXLPipeline, StableUnCLIPPipeline), got {type(pipe).__name__}"
            )
        if "image_guidance_scale" in signature(type(pipe).__call__).parameters:
            raise MMHooksError(
                f"{type(pipe).__name__} guides by text and image, with three parts in a batch: not supported"
            )
        # A container for finding all modules: it is never called.
        parts = nn.Module()
        for key, part in pipe.components.items():
            if isinstance(_unwrap_compiled(part), nn.Module):
                parts.add_module(key, _unwrap_compiled(part))
        sites = SiteMap(parts)
        self.text_towers: dict[str, nn.Module] = {}
        for key, tower in TEXT_ENCODERS.items():
            encoder = getattr(parts, key, None)
            if encoder is not None:
                add_clip_text(sites, tower, encoder)
                self.text_towers[tower] = encoder
        if not self.text_towers:
            raise MMHooksError(
                f"expected a pipeline with a text encoder, got {type(pipe).__name__} without one"
            )
        consumers = _consumers(parts, unet)
        others = [
            Site("text.cond", registry.shared(ModuleArgument(m, CONDITIONING))) for m in consumers.values()
        ]
        tap = ModuleArgument(unet, CONDITIONING)
        sites.add(Site("text.cond", tap, layout="batch token d_cond", beside=tuple(others)))
        if unet.config.addition_embed_type == "text_time":  # type: ignore[union-attr]
            sites.add(
                _pooled(unet, tuple(_pooled(m) for m in consumers.values() if _takes(m, "added_cond_kwargs")))
            )
        if hasattr(pipe, "image_normalizer"):
            tap = ModuleArgument(unet, "class_labels")
            sites.add(Site("image.embed", ImageEmbeds(pipe), tokens=None, layout="batch d"))
            sites.add(Site("image.cond", tap, tokens=None, layout="batch 2d"))
        self.cross_blocks = add_cross_attention(sites, "unet", unet)
        super().__init__(parts, sites, name=name)
        self.pipe = pipe
        calls: list[Tap] = [PipelineCalls(pipe), ModuleCalls(unet, denoises=True)]
        calls += [ModuleCalls(encoder, denoises=False) for encoder in self.text_towers.values()]
        if consumers:
            calls.append(ConditioningCompared(unet))
        edited = zip(consumers.items(), others, strict=True)
        calls += [ConsumerCalls(module, key, [site.tap]) for (key, module), site in edited]
        self._calls = [registry.shared(tap) for tap in calls]

    def __repr__(self) -> str:
        heads = ", ".join(self.places.attachments) or "none"
        return f"HookedDiffusion({self.name or type(self.pipe).__name__}, heads: {heads})"

    @property
    def unet(self) -> nn.Module:
        return self.model.unet  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call."""
        return self.pipe(*args, **kwargs)

    def _extra_taps(self) -> list[Tap]:
        return [*self._calls, *super()._extra_taps()]

    @contextmanager
    def denoising(self, step: int, *, guided: bool) -> Iterator[None]:
        """Sets the denoising step, and whether the batch holds both halves, for a user's own loop around the U-Net."""
        with moment(step, "both" if guided else "cond"):
            yield

    def caching(
        self,
        sites: Pattern | Sequence[Pattern],
        *,
        steps: Any = None,
        guidance: Guidance = "both",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        tokens: Tokens = None,
        strict: bool = True,
    ) -> CacheContext[StepCache]:
        """A context that fills the :class:`~mmhooks.hooks.step_cache.StepCache` it gives.

        Args:
            steps: keep only these denoising steps: 50 steps of all patterns of SD at 512 px are 15 GB.
            guidance: keep only this half.
        """
        cache = StepCache(
            steps=steps,
            guidance=guidance,
            device=device,
            dtype=dtype,
            detach=detach,
            tokens=tokens,
            copy=self._writes_inplace,
        )
        return self._filling(cache, sites, detach=detach, strict=strict)

    def run_with_cache(
        self,
        *args: Any,
        sites: Pattern | Sequence[Pattern] = ("text.cond",),
        steps: Any = None,
        guidance: Guidance = "both",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokens: Tokens = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, StepCache]:
        """Runs the pipeline and keeps what flows at ``sites``.

        Args:
            args, kwargs: of the pipeline: prompt, ``num_inference_steps``, ``generator``, ...
            sites: names, globs or predicates.
            steps, guidance: keep these denoising steps, this half of a guided batch.
            device, dtype, tokens, strict: as in :meth:`HookedModel.caching`.

        Returns:
            the pipeline's output, and the cache: ``cache[site]`` is ``[step batch ...]`` where the U-Net runs.

        Raises:
            UnknownSite: a name that no site has.
            HookDidNotFire: sites that did not run, or of which nothing was kept.
        """
        options = {"steps": steps, "guidance": guidance, "device": device, "dtype": dtype}
        with self.caching(sites, tokens=tokens, strict=strict, **options) as cache:
            out = self.pipe(*args, **kwargs)
        return out, cache


def load_diffusion(
    name: str | Path = "mini",
    *,
    dtype: Dtype | None = None,
    device: Device | None = None,
    **options: Any,
) -> HookedDiffusion:
    """A hooked pipeline by name: ``"mini"``, a directory, or a repository of the Hugging Face Hub.

    Args:
        dtype: of the weights, fp32 by default, or a mapping by part, ``{"unet": torch.float16, "default":
            torch.float32}``. ``torch_dtype=`` is the same option by its older name.
        device: where the weights go, the CPU by default; not beside ``device_map=``, which places them itself.
        options: of diffusers' ``from_pretrained``: ``revision, variant, cache_dir, local_files_only``, or parts of
            the pipeline, such as ``safety_checker=None``.

    Raises:
        MissingWeights: the directory holds no pipeline, or the repository cannot be downloaded.
        MMHooksError: two options contradict each other, or one that the embedded pipeline does not take.

    >>> sd = load_diffusion("runs/my-pipeline")  # doctest: +SKIP
    """
    from diffusers import DiffusionPipeline  # type: ignore[attr-defined]

    weights, place = take_dtype(dtype, options), take_device(device, options)
    if str(name) in ("mini", "mini-sd"):
        from mmhooks.models.embedded.mini_sd import mini_pipeline

        if options:
            raise MMHooksError(
                f"the embedded pipeline takes no options of from_pretrained, got {sorted(options)}"
            )
        kind = plain_dtype(weights, "the embedded pipeline")
        pipe = mini_pipeline().to(place)
        return HookedDiffusion(pipe if kind == torch.float32 else pipe.to(kind), name="mini")
    if weights == "auto":  # diffusers would load fp32
        plain_dtype(weights, "a diffusers pipeline")
    source = Path(name)
    if source.is_dir() and not (source / "model_index.json").is_file():
        raise MissingWeights(f"{source} holds no diffusers pipeline: model_index.json is missing")
    where = str(source) if source.is_dir() else str(name)
    refuse_code(options, where)
    try:
        with no_foreign_code(where):
            pipe = DiffusionPipeline.from_pretrained(
                where, torch_dtype=weights, **options | {"trust_remote_code": False}
            )
    except (OSError, ValueError) as error:
        raise MissingWeights(
            f"no pipeline {where!r} could be loaded ({type(error).__name__}: {error}); without network give the "
            'directory of a downloaded one, or use mm.load_diffusion("mini")'
        ) from error
    return HookedDiffusion(pipe if place is None else pipe.to(place), name=str(name))


def _consumers(parts: nn.Module, unet: nn.Module) -> dict[str, nn.Module]:
    """Components beside the U-Net that take its text conditioning: ControlNets, a second U-Net.

    unCLIP's prior has a text encoder of its own, and an adapter of images takes no text.
    """
    own = {"prior", *TEXT_ENCODERS}
    return {
        key: module
        for key, module in parts.named_children()
        if module is not unet
        and key not in own
        and _takes(module, CONDITIONING)
        and _width(module) in (None, _width(unet))
    }


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in signature(module.forward).parameters


def _width(module: Any) -> Any:
    """Of the conditioning that a module attends to; several ControlNets form one module and have equal widths."""
    first = module.nets[0] if hasattr(module, "nets") else module
    return getattr(getattr(first, "config", None), "cross_attention_dim", None)


def _pooled(module: nn.Module, beside: tuple[Site, ...] = ()) -> Site:
    tap = registry.shared(ModuleArgument(module, "added_cond_kwargs", "text_embeds"))
    return Site("text.cond_pooled", tap, tokens=None, layout="batch d", beside=beside)


def _unwrap_compiled(part: Any) -> Any:
    """The original module, if it was compiled by ``torch.compile``."""
    return getattr(part, "_orig_mod", part)
