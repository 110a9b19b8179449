"""Models of their full architecture on the meta device, without weights: what a cost is counted on.

Known are open_clip's names, the embedded models, folders of transformers and diffusers (only their configurations are
read), and by name the checkpoints of the paper, whose configurations lie on the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mmhooks.errors import MissingWeights
from mmhooks.utils.assets import EMBEDDED

LLAVA_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                 "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
LLAVA_TEXT = {"vocab_size": 32064, "max_position_embeddings": 4096}
LLAVA_SHAPES: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                                 "num_attention_heads": 32},
    "llava-hf/llava-1.5-13b-hf": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                                  "num_attention_heads": 40},
}  # fmt: skip
SD2_UNET = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
             "cross_attention_dim": 1024, "use_linear_projection": True}  # fmt: skip
SD2_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
             "vocab_size": 49408, "hidden_act": "gelu"}  # fmt: skip
SD_VAE = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
           "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}  # fmt: skip
# transformers' names and shapes of ViT-L/16 at 224 pixels: the paper's classifier of fashion images.
CLASSIFIER_SHAPES: dict[str, dict[str, Any]] = {
    "touchtech/fashion-images-gender-age-vit-large-patch16-224-in21k-v3": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    },
}  # fmt: skip
SD2_SIZES = {
    "stabilityai/stable-diffusion-2-base": 64,
    "stabilityai/stable-diffusion-2-1-base": 64,
    "stabilityai/stable-diffusion-2": 96,
    "stabilityai/stable-diffusion-2-1": 96,
}


@dataclass(frozen=True)
class Painter:
    """The parts of a latent diffusion pipeline, and the side of its latents."""

    unet: Any = field(repr=False)
    vae: Any = field(repr=False)
    text_encoder: Any = field(repr=False)
    side: int


def clip_blueprint(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """An open_clip model of this name (or an embedded one) on the meta device, in evaluation mode.

    Raises:
        MMHooksError: no such model.

    >>> sum(p.numel() for p in clip_blueprint("ViT-B-32").parameters())
    151277313
    """
    if name in EMBEDDED:
        from mmhooks.models.embedded.mini import load_embedded

        return deepcopy(load_embedded(name)[0]).to("meta", dtype).eval()
    import open_clip

    from mmhooks.models.zoo import known_name

    name = known_name(name)
    with torch.device("meta"), _quiet():
        return open_clip.create_model(name, device="meta").to(dtype).eval()


def llava_blueprint(source: str, dtype: torch.dtype | None = None) -> Any:
    """A ``LlavaForConditionalGeneration`` on the meta device: `mini-vlm`, a folder, or a known name.

    Args:
        dtype: default: the configuration's own, as :func:`~mmhooks.models.vlm.llava.load_llava`; known names are fp16.

    Raises:
        MissingWeights: neither.

    >>> sum(p.numel() for p in llava_blueprint("llava-hf/llava-1.5-7b-hf").parameters())
    7063427072
    """
    from mmhooks.models.vlm.llava import NAME, load_llava

    if source in ("mini", NAME):
        return load_llava(device="meta", dtype=dtype).model
    hf = _classes("transformers")
    if Path(source).is_dir():
        plan = hf.AutoConfig.from_pretrained(source)
        own = getattr(plan, "dtype", None) or torch.float32
    elif source in LLAVA_SHAPES:
        text = hf.LlamaConfig(**LLAVA_TEXT, **LLAVA_SHAPES[source])
        plan = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**LLAVA_VISION), text_config=text, image_seq_length=576
        )
        own = torch.float16
    else:
        raise MissingWeights(
            f"no configuration of {source!r}: expected mini-vlm, a checkpoint's folder, or one of "
            f"{', '.join(LLAVA_SHAPES)}; download its config.json and give the folder"
        )
    with torch.device("meta"):
        return hf.LlavaForConditionalGeneration(plan).to(dtype or own).eval()


def classifier_blueprint(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """An image classifier of ``transformers`` on the meta device: a folder, or a known name.

    Raises:
        MissingWeights: neither.

    >>> name = "touchtech/fashion-images-gender-age-vit-large-patch16-224-in21k-v3"
    >>> sum(p.numel() for p in classifier_blueprint(name).vit.parameters())
    303301632
    """
    hf = _classes("transformers")
    if Path(source).is_dir():
        plan = hf.AutoConfig.from_pretrained(source)
    elif source in CLASSIFIER_SHAPES:
        plan = hf.ViTConfig(**CLASSIFIER_SHAPES[source])
    else:
        raise MissingWeights(
            f"no configuration of the classifier {source!r}: expected a checkpoint's folder, or one of "
            f"{', '.join(CLASSIFIER_SHAPES)}; download its config.json and give the folder"
        )
    with torch.device("meta"):
        return hf.AutoModelForImageClassification.from_config(plan).to(dtype).eval()


def painter_blueprint(source: str, dtype: torch.dtype = torch.float32) -> Painter:
    """U-Net, autoencoder and text encoder of a pipeline on the meta device: `mini`, a folder, or a known name.

    Raises:
        MissingWeights: neither.

    >>> sum(p.numel() for p in painter_blueprint("stabilityai/stable-diffusion-2-base").unet.parameters())
    865910724
    """
    if source in ("mini", "mini-sd"):
        from mmhooks.models.embedded.mini_sd import mini_pipeline

        pipe: Any = deepcopy(mini_pipeline())
        parts = [m.to("meta", dtype).eval() for m in (pipe.unet, pipe.vae, pipe.text_encoder)]
        return Painter(*parts, side=pipe.unet.config.sample_size)
    hf, folder = _classes("transformers"), Path(source)
    denoisers, autoencoders = (
        getattr(_classes("diffusers"), n) for n in ("UNet2DConditionModel", "AutoencoderKL")
    )
    with torch.device("meta"):
        if (folder / "unet" / "config.json").is_file():
            unet = denoisers.from_config(denoisers.load_config(folder, subfolder="unet"))
            vae = autoencoders.from_config(autoencoders.load_config(folder, subfolder="vae"))
            text = hf.CLIPTextModel(hf.CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        elif source in SD2_SIZES:
            unet = denoisers(sample_size=SD2_SIZES[source], **SD2_UNET)
            vae, text = autoencoders(**SD_VAE), hf.CLIPTextModel(hf.CLIPTextConfig(**SD2_TEXT))
        else:
            raise MissingWeights(
                f"no configuration of {source!r}: expected mini, a pipeline's folder, or one of "
                f"{', '.join(SD2_SIZES)}; download its config.json files and give the folder"
            )
    parts = [m.to(dtype).eval() for m in (unet, vae, text)]
    return Painter(*parts, side=unet.config.sample_size)


def _classes(library: str) -> Any:
    """The library's lazy names, whose many alternatives a type checker would otherwise ask about."""
    return import_module(library)


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs that a model without weights has none."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
