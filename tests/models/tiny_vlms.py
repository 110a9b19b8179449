"""Small random vision-language models of transformers, one builder a model type, and what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .tiny_transformers import ENDS, SIZES, build, config

VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, **ENDS, "vocab_size": 60, "num_key_value_heads": 2}
IMAGE = 5  # the token in whose places images are
GRID = [[16, 32], [32, 16]]


def llava(attention: str = "sdpa", **text: Any) -> Any:
    """LLaVA 1.5's plan: the tower's layer before the last without its class token; and grouped queries."""
    made = config(
        "LlavaConfig",
        vision_config=config("CLIPVisionConfig", **VISION),
        text_config=config("LlamaConfig", **TEXT, **text),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return build("LlavaForConditionalGeneration", made, attention)


def llava_next(attention: str = "sdpa") -> Any:
    vision, text = config("CLIPVisionConfig", **VISION), config("LlamaConfig", **TEXT)
    options = {"image_token_index": IMAGE, "image_grid_pinpoints": GRID}
    made = config("LlavaNextConfig", vision_config=vision, text_config=text, **options)
    return build("LlavaNextForConditionalGeneration", made, attention)


def llava_onevision(attention: str = "sdpa") -> Any:
    vision, text = config("SiglipVisionConfig", **VISION), config("Qwen2Config", **TEXT)
    options = {"image_token_index": IMAGE, "image_grid_pinpoints": GRID}
    made = config("LlavaOnevisionConfig", vision_config=vision, text_config=text, **options)
    return build("LlavaOnevisionForConditionalGeneration", made, attention)


def paligemma(attention: str = "sdpa") -> Any:
    """One key for all queries."""
    return _paligemma("GemmaConfig", attention)


def paligemma2(attention: str = "eager") -> Any:
    """Gemma 2: norms on both sides, capped scores, layers that see a window; eager attention alone."""
    return _paligemma("Gemma2Config", attention, sliding_window=8, query_pre_attn_scalar=8)


def _paligemma(kind: str, attention: str, **options: Any) -> Any:
    vision = config("SiglipVisionConfig", **VISION, projection_dim=32, vision_use_head=False)
    text = config(kind, **{**TEXT, "num_key_value_heads": 1}, head_dim=8, **options)
    more = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32}
    made = config("PaliGemmaConfig", vision_config=vision, text_config=text, **more)
    return build("PaliGemmaForConditionalGeneration", made, attention)


def gemma3(attention: str = "sdpa") -> Any:
    vision = config("SiglipVisionConfig", **VISION, vision_use_head=False)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    options = {"head_dim": 8, "sliding_window": 8, "layer_types": layers, "query_pre_attn_scalar": 8}
    text = config("Gemma3TextConfig", **TEXT, **options)
    more = {"image_token_index": IMAGE, "mm_tokens_per_image": 4}
    made = config("Gemma3Config", vision_config=vision, text_config=text, **more)
    model = build("Gemma3ForConditionalGeneration", made, attention)
    nn.init.normal_(
        model.model.multi_modal_projector.mm_input_projection_weight, std=0.05
    )  # zero at the start
    return model


def idefics3(attention: str = "sdpa") -> Any:
    return _idefics("Idefics3", attention)


def smolvlm(attention: str = "sdpa") -> Any:
    return _idefics("SmolVLM", attention)


def _idefics(kind: str, attention: str) -> Any:
    vision, text = config(f"{kind}VisionConfig", **VISION), config("LlamaConfig", **TEXT)
    made = config(
        f"{kind}Config", vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=1
    )
    return build(f"{kind}ForConditionalGeneration", made, attention)


def internvl(attention: str = "sdpa") -> Any:
    sides = {"image_size": [32, 32], "patch_size": [8, 8]}
    vision = config("InternVLVisionConfig", **{**VISION, **sides}, layer_scale_init_value=0.5)
    text = config("Qwen2Config", **TEXT)
    options = {"image_token_id": IMAGE, "image_seq_length": 4, "downsample_ratio": 0.5}
    made = config("InternVLConfig", vision_config=vision, text_config=text, **options)
    return build("InternVLForConditionalGeneration", made, attention)


def qwen2_vl(attention: str = "sdpa") -> Any:
    """The patches of all images in one sequence."""
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return _qwen("Qwen2VL", vision, attention)


def qwen2_5_vl(attention: str = "sdpa") -> Any:
    """Windows of 2x2 patches in all blocks but the second."""
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
              "patch_size": 4, "window_size": 8, "fullatt_block_indexes": [1]}  # fmt: skip
    return _qwen("Qwen2_5_VL", vision, attention)


def qwen3_vl(attention: str = "sdpa") -> Any:
    """DeepStack: what the tower's first block gives goes to the decoder's first layer too."""
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    return _qwen("Qwen3VL", vision, attention, head_dim=8)


def _qwen(kind: str, vision: dict[str, Any], attention: str, **options: Any) -> Any:
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = config(f"{kind}TextConfig", **TEXT, rope_parameters=turns, **options)
    marks = {
        "image_token_id": IMAGE,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    }
    made = config(
        f"{kind}Config", vision_config=config(f"{kind}VisionConfig", **vision), text_config=text, **marks
    )
    return build(f"{kind}ForConditionalGeneration", made, attention)


VLMS = {
    "LLaVA 1.5": llava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "PaliGemma": paligemma,
    "PaliGemma 2": paligemma2,
    "Gemma 3": gemma3,
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
    "InternVL": internvl,
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "LLaVA 1.5, eager": lambda: llava("eager"),
    "LLaVA 1.5, biases": lambda: llava(attention_bias=True, mlp_bias=True, head_dim=12),
    "Gemma 3, eager": lambda: gemma3("eager"),
    "InternVL, eager": lambda: internvl("eager"),
}


def blip2() -> Any:
    queries = config("Blip2QFormerConfig", **SIZES, vocab_size=60, encoder_hidden_size=32)
    text = {"vocab_size": 60, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32}  # fmt: skip
    vision = config("Blip2VisionConfig", **VISION)
    made = config("Blip2Config", vision_config=vision, qformer_config=queries, text_config=config("OPTConfig", **text),
                  image_token_id=IMAGE)  # fmt: skip
    return build("Blip2ForConditionalGeneration", made)


def mllama() -> Any:
    vision = {**VISION, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 2,
              "intermediate_layers_indices": [0], "vision_output_dim": 64,
              "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}  # fmt: skip
    text = {**TEXT, "cross_attention_layers": [1]}
    made = config(
        "MllamaConfig", vision_config=config("MllamaVisionConfig", **vision),
        text_config=config("MllamaTextConfig", **text), image_token_index=IMAGE,
    )  # fmt: skip
    return build("MllamaForConditionalGeneration", made)


def llava_7b() -> Any:
    """LLaVA 1.5 7B at its own widths, on the meta device, cut to two layers a tower."""
    made = config("LlavaConfig")
    made.text_config.vocab_size = 32064
    made.vision_config.num_hidden_layers = made.text_config.num_hidden_layers = 2
    with torch.device("meta"):
        return build("LlavaForConditionalGeneration", made)


# Walked at the widths of a published checkpoint too.
REAL = {"LLaVA 1.5": llava_7b}

# Types without named sites.
UNKNOWN = {"BLIP-2": blip2, "Mllama": mllama}


def inputs(model: Any) -> dict[str, Tensor]:
    """Two rows with a picture each, in different places; the second is padded in front."""
    torch.manual_seed(2)
    kind = model.config.model_type
    tiled = kind in ("llava_next", "llava_onevision")
    image = [IMAGE] * (
        14 if tiled else 4
    )  # of two tiles: 4 of the whole, and two rows of 4 with a newline each
    ids = torch.tensor([[1, 9, *image, 11, 12, 13, 14], [0, 0, 1, *image, 21, 22, 23]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if tiled:
        return given | {
            "pixel_values": torch.randn(2, 3, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 32]] * 2),
        }
    if kind.startswith("qwen"):
        given["mm_token_type_ids"] = (ids == IMAGE).int()
        return given | {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    side = 32 if kind == "internvl" else 16
    pixels = torch.randn(2, 3, side, side)
    given["pixel_values"] = pixels[:, None] if kind in ("idefics3", "smolvlm") else pixels
    if kind == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).long()  # an image's tokens see each other
    if kind == "paligemma":
        given["token_type_ids"] = torch.zeros_like(ids)  # the prompt's tokens see each other
    return given


# -- runs --------------------------------------------------------------------------------------------------------

NEW = 5  # tokens of a generation


def logits(model: Any, **more: Any) -> Tensor:
    """Of one forward of a hooked model."""
    return model.forward(**inputs(model.model), **more).logits


def generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a greedy generation, of which no row ends early."""
    plan = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    out = model.model.generate(
        **inputs(model.model), **plan, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences, torch.stack(out.logits, 1)


def real(model: Any) -> Tensor:
    """Where the prompt's tokens are no padding."""
    return inputs(model.model)["attention_mask"].bool()
