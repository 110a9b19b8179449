"""Tiny random pipelines of the shapes of SD 1.x, SD 2.x, SDXL and Stable unCLIP."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mmhooks as mm

KINDS = ("sd1", "sd2", "sdxl", "unclip")
PATTERN = "unet.mid_block.attentions.0.transformer_blocks.0.cross.pattern"
LENGTH, VOCABULARY = 12, 520
WORDS = ["red", "panda", "blue", "kite", "house", "umbrella"]


@cache
def tokenizer() -> Any:
    """CLIP's tokenizer over bytes and a few whole words, padded with its end token."""
    from transformers import CLIPTokenizer

    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 256))]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merged = f"{parts[0]} {parts[1]}"
            parts = ["".join(parts[:2]), *parts[2:]]
            if merged not in merges:
                merges.append(merged)
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merge = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({token: n for n, token in enumerate(vocabulary)}))
        merge.write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer(str(vocab), str(merge), model_max_length=LENGTH)


def text_encoder(width: int = 16, *, projection: int = 0, layers: int = 3) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokens = tokenizer()
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=projection or width,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def unet(cross: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    shape = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
    }  # fmt: skip
    return UNet2DConditionModel(cross_attention_dim=cross, **(shape | options)).eval()


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def image_encoder(width: int = 16, projection: int = 16) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=projection,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def feature_extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def build(kind: str, **options: Any) -> Any:
    """A pipeline of one of :data:`KINDS`; ``options`` go to the U-Net."""
    import diffusers

    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1)
    if kind in ("sd1", "sd2"):
        if (
            kind == "sd2"
        ):  # heads of a fixed width, linear projections, the penultimate layer kept as the last
            options = {"use_linear_projection": True, "attention_head_dim": (2, 4), **options}
        pipe = diffusers.StableDiffusionPipeline(
            vae=autoencoder(), text_encoder=text_encoder(16 if kind == "sd1" else 32), tokenizer=tokenizer(),
            unet=unet(16 if kind == "sd1" else 32, **options), scheduler=scheduler, safety_checker=None,
            feature_extractor=feature_extractor(), image_encoder=image_encoder(), requires_safety_checker=False,
        )  # fmt: skip
    elif kind == "sdxl":
        time_ids, pooled = 6, 24
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=autoencoder(), text_encoder=text_encoder(16), text_encoder_2=text_encoder(32, projection=pooled),
            tokenizer=tokenizer(), tokenizer_2=tokenizer(), scheduler=scheduler,
            unet=unet(
                48, addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=8 * time_ids + pooled, use_linear_projection=True,
                transformer_layers_per_block=(1, 2), **options,
            ),
            add_watermarker=False,
        )  # fmt: skip
    else:
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
            StableUnCLIPImageNormalizer,
        )

        embedding = 16
        pipe = diffusers.StableUnCLIPPipeline(
            prior_tokenizer=tokenizer(), prior_text_encoder=text_encoder(16, projection=embedding),
            prior=diffusers.PriorTransformer(
                num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=embedding,
                num_embeddings=LENGTH,
            ).eval(),
            prior_scheduler=diffusers.DDPMScheduler(
                variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=100,
                clip_sample=True, clip_sample_range=5.0,
            ),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=embedding),
            image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer(), text_encoder=text_encoder(16), vae=autoencoder(), scheduler=scheduler,
            unet=unet(
                16, class_embed_type="projection", projection_class_embeddings_input_dim=2 * embedding, **options
            ),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any, prompt: Any = "a red panda", *, steps: int = 3, guidance: float = 4.0, **options: Any
) -> torch.Tensor:
    """Pictures ``[b 3 h w]``, before rounding, of one seed."""
    if hasattr(pipe, "prior"):
        options.setdefault("prior_num_inference_steps", 2)
    run = pipe(
        prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip
    return run.images


def traces(sd: mm.HookedDiffusion) -> list:
    """All that a context could leave: classes, hooks, attributes, processors."""
    seen = [type(sd.pipe), sorted(k for k in vars(sd.pipe) if k not in ("_guidance_scale",))]
    for name, module in sd.model.named_modules():
        hooks = [
            list(getattr(module, kind))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        ]
        seen.append((name, type(module), sorted(vars(module)), hooks, getattr(module, "processor", None)))
    return seen


def matching_clip(encoder: Any, folder: Path, *, joint: int = 16) -> str:
    """An open_clip model that ``encoder`` (a text encoder of :func:`build`) is the text tower of, as a directory.

    Its name for ``mm.load``: ``local-dir:…``. Picture tower and, where the encoder has none, projection are random.
    """
    import open_clip
    from safetensors.torch import save_file

    from mmhooks.models.embedded.hf_weights import encoder_layers

    text = encoder.config
    shape = {
        "embed_dim": joint, "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": text.hidden_size,
                     "heads": text.num_attention_heads, "layers": text.num_hidden_layers, "mlp_ratio": 2},
    }  # fmt: skip
    torch.manual_seed(3)
    model = open_clip.model.CLIP(**shape)
    with torch.no_grad():
        theirs = dict(encoder.named_parameters())
        for name, ours in encoder_layers(model.transformer.resblocks).items():
            ours.copy_(next(v for k, v in theirs.items() if k.endswith(name)))
        for name, ours in {
            "token_embedding.weight": model.token_embedding.weight, "position_embedding.weight": model.positional_embedding,
            "final_layer_norm.weight": model.ln_final.weight, "final_layer_norm.bias": model.ln_final.bias,
        }.items():  # fmt: skip
            ours.copy_(next(v for k, v in theirs.items() if k.endswith(name)))
        if "text_projection.weight" in theirs:
            model.text_projection.copy_(theirs["text_projection.weight"].T)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"
