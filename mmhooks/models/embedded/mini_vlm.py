"""`mini-vlm`: transformers' own LLaVA, tower included, that answers questions about composed pictures.

An image tower of mini-reader's plan, two linear maps, and a small Llama. The pictures and questions it was trained on are
:mod:`mmhooks.data.synthetic.scenes` and ``questions``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmhooks.errors import MMHooksError
from mmhooks.models.embedded import mini
from mmhooks.models.embedded.hf_weights import encoder_layers
from mmhooks.utils.tensors import read_safetensors

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
TOWER = "mini-reader"  # the embedded CLIP whose image tower its own starts from
TOKENS = (mini.IMAGE_SIZE // 8) ** 2 + 1  # patches and the class token


class _Stem(mini.ReadingStem):
    """The reading stem where ``CLIPVisionEmbeddings`` expects a convolution, whose dtype it asks for."""

    @property
    def weight(self) -> Tensor:
        return self.patch.weight


def config(*, width: int = 192, layers: int = 4, vocabulary: int, image_token: int = 4) -> LlavaConfig:
    """LLaVA 1.5's plan at mini's size: all 65 tokens of the tower's last layer, two linear maps, a Llama.

    LLaVA 1.5 drops the class token and takes the layer before the last; here the class token carries the name of the
    drawing, and there are six layers to draw from.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        projection_dim=mini.EMBED_DIM,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=mini.IMAGE_SIZE,
        patch_size=8,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=160,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def build(plan: LlavaConfig, visual: nn.Module | None = None) -> LlavaForConditionalGeneration:
    """An untrained ``LlavaForConditionalGeneration``, its tower that of an open_clip ViT (default: mini-reader's)."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(plan)
    if visual is None:
        visual = mini.load_embedded(TOWER)[0].visual  # type: ignore[assignment]
    fill_tower(model.model.vision_tower, visual)
    return model.eval()


@torch.no_grad()
def fill_tower(tower: CLIPVisionModel, visual: Any) -> None:
    """Give ``tower`` the weights of an open_clip ViT of the same size, reading stem included; frozen.

    Hidden states and pooled output are open_clip's (tests: to 1e-5).
    """
    state: dict[str, Tensor] = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        "pre_layrnorm.weight": visual.ln_pre.weight,
        "pre_layrnorm.bias": visual.ln_pre.bias,
        "post_layernorm.weight": visual.ln_post.weight,
        "post_layernorm.bias": visual.ln_post.bias,
    }
    state |= encoder_layers(visual.transformer.resblocks)
    embeddings: Any = tower.embeddings
    if isinstance(visual.conv1, mini.ReadingStem):
        stem = _Stem(nn.Conv2d(3, visual.conv1.patch.out_channels, 8, 8, bias=False))
        embeddings.patch_embedding = stem
        state |= {f"embeddings.patch_embedding.{k}": v for k, v in visual.conv1.state_dict().items()}
    else:
        state["embeddings.patch_embedding.weight"] = visual.conv1.weight
    tower.load_state_dict(state)
    tower.requires_grad_(False)


def processor(folder: Path) -> LlavaProcessor:
    """LLaVA's own processor with mini's pixels and the tokenizer of ``folder``."""
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    side = {"height": mini.IMAGE_SIZE, "width": mini.IMAGE_SIZE}
    images = CLIPImageProcessor(
        size=side, crop_size=side, image_mean=list(mini.MEAN), image_std=list(mini.STD), do_convert_rgb=True
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def load_from(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model and its processor from a folder that ``embedded.vlm.ship`` wrote, in fp32.

    Raises:
        MMHooksError: a file is missing, or the weights are not those of the configuration.
    """
    from transformers import LlavaConfig

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise MMHooksError(f"expected {', '.join(FILES)} in {folder}, got no {', '.join(missing)}")
    untrained = mini.build(reads=True).visual  # gives the tower its reading stem
    model = build(LlavaConfig.from_pretrained(folder), untrained)
    state = {k: v.float() for k, v in read_safetensors(folder / "model.safetensors").items()}
    absent, strange = model.load_state_dict(state, strict=False)
    absent = [k for k in absent if k != "lm_head.weight"]  # the token table
    if absent or strange:
        raise MMHooksError(
            f"{folder}: expected the weights of its config.json, got missing {absent}, strange {strange}"
        )
    model.tie_weights()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return model.eval(), processor(folder)
