"""Where the parts of transformers' vision-language models are, and the sites of their three towers."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from mmhooks.hooks.encoder_kinds import ImageTokens
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.models.layers.leaves import add_site
from mmhooks.models.layers.packed_block import add_packed, add_packed_block
from mmhooks.models.layers.transformers_layer import add_transformers_layers
from mmhooks.models.towers.transformers_tower import add_vision_stack


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one model.

    Attributes:
        image: the vision tower.
        projector: from its features to token embeddings.
        language: the decoder without its head.
        head: from the last norm to logits.
    """

    image: nn.Module
    projector: nn.Module
    language: Any
    head: nn.Module


# Where a model type has its tower, its projector and its decoder; each is walked in tests/models/test_vlm.py.
_LLAVA = ("vision_tower", "multi_modal_projector", "language_model")
_IDEFICS = ("vision_model", "connector", "text_model")
_QWEN = ("visual", "visual.merger", "language_model")
LAYOUTS: dict[str, tuple[str, str, str]] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "paligemma": _LLAVA,
    "gemma3": _LLAVA,
    "internvl": _LLAVA,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}

# Types whose processors take a list of images for each prompt, where others take one list.
IMAGES_BY_PROMPT = ("gemma3", "idefics3", "smolvlm")


def vlm_parts(model: Any) -> Parts | None:
    """The parts of a model that writes text about images; None of another model, or of a wrapper around one (PEFT's: hook
    its ``get_base_model()``, in which the adapters are)."""
    layout = LAYOUTS.get(getattr(getattr(model, "config", None), "model_type", ""))
    if layout is None or not type(model).__name__.endswith("ForConditionalGeneration"):
        return None
    image, projector, language = attrgetter(*layout)(model.model)
    return Parts(image, projector, language, model.lm_head)


def vlm_sites(model: nn.Module, parts: Parts) -> SiteMap:
    """``image.*``, ``projector.{in, out}``, ``lm.tokens``, ``lm.blocks.N.*``, ``lm.ln_final``, ``lm.logits``."""
    sites = SiteMap(model)
    if hasattr(parts.image, "patch_embed"):
        add_packed_tower(sites, parts)
    else:
        add_vision_stack(sites, "image", parts.image)
        add_site(sites, "projector.in", sites.input(parts.projector))
        add_site(sites, "projector.out", sites.output(parts.projector))
    # The language model's argument: token embeddings with image features in their places.
    add_site(sites, "lm.tokens", sites.input(parts.language, "inputs_embeds"))
    add_transformers_layers(sites, "lm", parts.language.layers)
    add_site(sites, "lm.ln_final", sites.output(parts.language.norm))
    sites.add(Site("lm.logits", sites.output(parts.head), layout="batch token vocabulary"))
    return sites


def add_packed_tower(sites: SiteMap, parts: Parts) -> None:
    """Qwen-VL's tower and merger: the patches of all images one after the other, in Qwen 2.5's blocks in order of windows.

    ``projector.deepstack.N``: what Qwen3-VL adds to the stream behind the decoder's layer N, at image tokens.
    """
    tower: Any = parts.image
    sites.tokens["image"] = ImageTokens()
    add_packed(sites, "image.patches", sites.output(tower.patch_embed))
    for n, block in enumerate(tower.blocks):
        add_packed_block(sites, f"image.blocks.{n}", block)
    for n, merger in enumerate(getattr(tower, "deepstack_merger_list", ())):
        add_packed(sites, f"projector.deepstack.{n}", sites.output(merger), layout="token d")
    add_packed(sites, "projector.in", sites.input(parts.projector))
    add_packed(sites, "projector.out", sites.output(parts.projector), layout="token d")
