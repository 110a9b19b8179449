"""Builders of one small random instance of every architecture family that open_clip lists."""

from __future__ import annotations

import open_clip
from open_clip.hf_model import HFTextEncoder

V = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
T = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
CUSTOM = {
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}


def build(kind: str, vision: dict, text: dict):
    return getattr(open_clip, kind)(12, dict(vision), dict(text))


def timm(name: str, pool: str = "", size: int = 64):
    """A timm trunk by name, cut to two blocks where it is a stack of blocks."""
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": size}
    model = build("CustomTextCLIP", vision, T)
    trunk = model.visual.trunk
    if hasattr(trunk, "blocks"):
        trunk.blocks = trunk.blocks[:2]
    return model


def eva(**options):
    """timm's Eva at a size of its own: fused and separate projections, rotary or not, norms before or after."""
    from timm.models.eva import Eva

    model = timm("test_vit", size=32)
    model.visual.trunk = Eva(
        32, 16, num_classes=0, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0, **options
    )
    return model


def coca():
    from open_clip.coca_model import CoCa

    text, vision = {**T, "embed_cls": True, "output_tokens": True}, {**V, "attentional_pool": True}
    return CoCa(12, dict(T), text, {**vision, "attn_pooler_heads": 2, "output_tokens": True})  # type: ignore[arg-type]


HF_CONFIGS = {  # class of transformers' configuration -> small sizes in its own words
    "BertConfig": {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32},
    "RobertaConfig": {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32},
    "XLMRobertaConfig": {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32},
    "M2M100Config": {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                     "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
    "MT5Config": {"num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32},
}  # fmt: skip


def hf_text(config: str, embed_dim: int = 12, **options) -> HFTextEncoder:
    """open_clip's text tower around a small random Hugging Face encoder."""
    import transformers

    width = "d_model" if config in ("M2M100Config", "MT5Config") else "hidden_size"
    sizes = {width: 16, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
    made = getattr(transformers, config)(**sizes, **HF_CONFIGS[config])
    text = HFTextEncoder("", embed_dim, config=made, pooler_type="mean_pooler", proj_type="mlp", **options)
    if made.is_encoder_decoder:  # as open_clip does for downloaded ones
        text.transformer = text.transformer.get_encoder()
    text.context_length = 8
    return text


def hugging_face(config: str):
    model = build("CustomTextCLIP", V, T)
    model.text = hf_text(config)
    return model


FAMILIES = {
    "CLIP": lambda: build("CLIP", V, T),
    "CustomTextCLIP": lambda: build("CustomTextCLIP", V, {**T, "proj_bias": True, "no_causal_mask": True, "pool_type": "last"}),
    "SigLIP text": lambda: build("CustomTextCLIP", V, {**T, "proj_type": "none", "width": 12}),
    "custom blocks": lambda: build("CLIP", {**V, **CUSTOM}, {**T, "qk_norm": True}),
    "layer scale": lambda: build("CLIP", {**V, "ls_init_value": 0.1}, {**T, "ls_init_value": 0.1}),
    "norm after pool": lambda: build("CLIP", {**V, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, T),
    "CoCa": coca,
    "ResNet": lambda: build("CLIP", {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, T),
    "timm ViT, SigLIP": lambda: timm("test_vit", size=160),
    "timm ViT, relative": lambda: timm("test_vit_relpos", size=160),
    "EVA": lambda: eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "EVA, norm after": lambda: eva(qkv_fused=True, use_post_norm=True),
    "PE": lambda: eva(attn_type="rope", use_rot_pos_emb=True, qk_norm=True),
    "ConvNeXt": lambda: timm("test_convnext", size=160),
    "FastViT, MobileCLIP": lambda: timm("fastvit_t8", size=64),
    "ViTamin": lambda: timm("vitamin_small_224", size=224),
    "Swin": lambda: timm("swin_tiny_patch4_window7_224", size=224),
    "BERT": lambda: hugging_face("BertConfig"),
    "RoBERTa": lambda: hugging_face("RobertaConfig"),
    "XLM-RoBERTa": lambda: hugging_face("XLMRobertaConfig"),
    "NLLB": lambda: hugging_face("M2M100Config"),
    "mT5": lambda: hugging_face("MT5Config"),
}  # fmt: skip
