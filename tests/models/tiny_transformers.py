"""Small random instances of transformers' encoders, one builder a model type."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import nn

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGES = {"image_size": 32, "patch_size": 8}
TEXTS = {"vocab_size": 60, "max_position_embeddings": 12}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config(kind: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, kind)(**options)


def build(kind: str, config: Any, attention: str = "sdpa") -> Any:
    """A random model in evaluation mode, its biases and norms not at their neutral start."""
    import transformers

    torch.manual_seed(0)
    config._attn_implementation = attention
    model = getattr(transformers, kind)._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 and "logit" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clip(attention: str = "sdpa", **options: Any) -> Any:
    text = {**SIZES, **TEXTS, **ENDS, "eos_token_id": 59}
    made = config(
        "CLIPConfig", text_config=text, vision_config={**SIZES, **IMAGES}, projection_dim=24, **options
    )
    return build("CLIPModel", made, attention)


def siglip(attention: str = "sdpa") -> Any:
    text = {**SIZES, **TEXTS, "projection_size": 32}
    return build(
        "SiglipModel", config("SiglipConfig", text_config=text, vision_config={**SIZES, **IMAGES}), attention
    )


def siglip2(attention: str = "sdpa") -> Any:
    text, vision = {**SIZES, **TEXTS, "projection_size": 32}, {**SIZES, "patch_size": 8, "num_patches": 16}
    return build("Siglip2Model", config("Siglip2Config", text_config=text, vision_config=vision), attention)


def chinese_clip(attention: str = "sdpa") -> Any:
    vision = {**SIZES, **IMAGES}
    made = config(
        "ChineseCLIPConfig", text_config={**SIZES, **TEXTS}, vision_config=vision, projection_dim=24
    )
    return build("ChineseCLIPModel", made, attention)


def altclip(attention: str = "sdpa") -> Any:
    text = {**SIZES, "vocab_size": 60, "max_position_embeddings": 20, "project_dim": 24}
    made = config("AltCLIPConfig", text_config=text, vision_config={**SIZES, **IMAGES}, projection_dim=24)
    return build("AltCLIPModel", made, attention)


def align(attention: str = "sdpa") -> Any:
    vision = {"image_size": 32, "hidden_dim": 32, "in_channels": [32, 16], "out_channels": [16, 32], "kernel_sizes": [3, 3],
              "strides": [1, 2], "expand_ratios": [1, 2], "num_block_repeats": [1, 1], "width_coefficient": 1.0,
              "depth_coefficient": 1.0, "depthwise_padding": []}  # fmt: skip
    made = config("AlignConfig", text_config={**SIZES, **TEXTS}, vision_config=vision, projection_dim=32)
    return build("AlignModel", made, "eager")  # it knows no other


def clap(attention: str = "sdpa") -> Any:
    audio = {"spec_size": 32, "num_mel_bins": 8, "window_size": 4, "patch_size": 2, "patch_stride": [2, 2],
             "patch_embeds_hidden_size": 16, "depths": [2, 2], "num_attention_heads": [2, 4], "hidden_size": 32,
             "projection_dim": 24, "num_classes": 3, "mlp_ratio": 2.0}  # fmt: skip
    text = {**SIZES, "vocab_size": 60, "max_position_embeddings": 20, "projection_dim": 24}
    made = config("ClapConfig", text_config=text, audio_config=audio, projection_dim=24)
    return build("ClapModel", made, "eager")


def xclip(attention: str = "sdpa") -> Any:
    vision = {**SIZES, **IMAGES, "num_frames": 2, "mit_hidden_size": 24, "mit_intermediate_size": 32,
              "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}  # fmt: skip
    text = {**SIZES, **TEXTS, **ENDS, "eos_token_id": 59}
    made = config(
        "XCLIPConfig", text_config=text, vision_config=vision, projection_dim=24, prompt_num_attention_heads=4
    )
    return build("XCLIPModel", made, attention)


DUAL = {
    "CLIP": clip,
    "SigLIP": siglip,
    "SigLIP 2": siglip2,
    "ChineseCLIP": chinese_clip,
    "AltCLIP": altclip,
    "ALIGN": align,
    "CLAP": clap,
    "X-CLIP": xclip,
}


def inputs(model: Any, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and texts that end in padding."""
    torch.manual_seed(1)
    pad = model.config.text_config.pad_token_id
    tokens = torch.randint(3, 58, (batch, 12))
    tokens[:, 8] = 59
    if pad is not None:
        tokens[:, 9:] = pad
    return torch.randn(batch, 3, 32, 32), tokens


def processor(model_type: str = "clip", side: int = 32, words: int = 60, length: int = 12) -> Any:
    """A processor of CLIP's kind with a tokenizer of single letters, saved and loaded like a real one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPProcessor,
        PreTrainedTokenizerFast,
        SiglipImageProcessor,
        SiglipProcessor,
    )

    words_of = ["<pad>", "<s>", "<unk>", *string.ascii_lowercase, *string.ascii_uppercase, *"0123"]
    vocabulary = {word: n for n, word in enumerate([*words_of[: words - 1], "</s>"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    from tokenizers.processors import TemplateProcessing

    plain.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", vocabulary["</s>"])]
    )  # type: ignore
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=length
    )  # fmt: skip
    size = {"height": side, "width": side}
    if model_type == "siglip":
        return SiglipProcessor(SiglipImageProcessor(size=size), tokenizer)
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size), tokenizer)


def checkpoint(folder: Any, model_type: str = "clip") -> str:
    """Saves a CLIP or SigLIP that reads texts of up to 64 letters, with its processor; its name for ``mm.load``."""
    text, vision = {**SIZES, "vocab_size": 60, "max_position_embeddings": 64}, {**SIZES, **IMAGES}
    if model_type == "siglip":
        made = config("SiglipConfig", text_config={**text, "projection_size": 32}, vision_config=vision)
    else:
        text |= {**ENDS, "eos_token_id": 59}
        made = config("CLIPConfig", text_config=text, vision_config=vision, projection_dim=24)
    build("SiglipModel" if model_type == "siglip" else "CLIPModel", made).save_pretrained(folder)
    processor(model_type, length=64).save_pretrained(folder)
    return f"hf:{folder}"


def out_projection(attn: nn.Module) -> nn.Linear:
    return next(getattr(attn, name) for name in ("out_proj", "o_proj", "proj") if hasattr(attn, name))


# -- vision encoders ---------------------------------------------------------------------------------------------


def vit(attention: str = "sdpa") -> Any:
    return build("ViTModel", config("ViTConfig", **SIZES, **IMAGES, pooler_output_size=32), attention)


def vit_classifier(attention: str = "sdpa") -> Any:
    return build("ViTForImageClassification", config("ViTConfig", **SIZES, **IMAGES, num_labels=5), attention)


def dinov2(attention: str = "sdpa") -> Any:
    made = config("Dinov2Config", **{**SIZES, "mlp_ratio": 2}, **IMAGES, layerscale_value=0.5)
    return build("Dinov2Model", made, attention)


def dinov2_swiglu(attention: str = "sdpa") -> Any:
    made = config(
        "Dinov2Config", **{**SIZES, "mlp_ratio": 2}, **IMAGES, use_swiglu_ffn=True, layerscale_value=0.5
    )
    return build("Dinov2Model", made, attention)


def dinov3(attention: str = "sdpa") -> Any:
    made = config("DINOv3ViTConfig", **SIZES, **IMAGES, num_register_tokens=2, layerscale_value=0.5)
    return build("DINOv3ViTModel", made, attention)


def dinov3_gated(attention: str = "sdpa") -> Any:
    made = config("DINOv3ViTConfig", **SIZES, **IMAGES, num_register_tokens=2, use_gated_mlp=True)
    return build("DINOv3ViTModel", made, attention)


def clip_vision(attention: str = "sdpa") -> Any:
    return build("CLIPVisionModel", config("CLIPVisionConfig", **SIZES, **IMAGES), attention)


def clip_vision_projected(attention: str = "sdpa") -> Any:
    made = config("CLIPVisionConfig", **SIZES, **IMAGES, projection_dim=24)
    return build("CLIPVisionModelWithProjection", made, attention)


def siglip_vision(attention: str = "sdpa") -> Any:
    return build("SiglipVisionModel", config("SiglipVisionConfig", **SIZES, **IMAGES), attention)


def vjepa2(kind: str = "VJEPA2Model", attention: str = "sdpa") -> Any:
    made = config(
        "VJEPA2Config", **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, crop_size=32, patch_size=8,
        frames_per_clip=4, mlp_ratio=2, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1,
        pred_num_mask_tokens=2, num_pooler_layers=1, num_labels=5,
    )  # fmt: skip
    return build(kind, made, attention)


def videomae(kind: str = "VideoMAEModel", attention: str = "sdpa", **options: Any) -> Any:
    made = config("VideoMAEConfig", **SIZES, **IMAGES, num_frames=4, num_labels=5, **options)
    return build(kind, made, attention)


VISION = {
    "ViT": vit,
    "ViT with a classifier": vit_classifier,
    "DINOv2": dinov2,
    "DINOv2, SwiGLU": dinov2_swiglu,
    "DINOv3": dinov3,
    "DINOv3, gated": dinov3_gated,
    "CLIP vision": clip_vision,
    "CLIP vision, projected": clip_vision_projected,
    "SigLIP vision": siglip_vision,
}
