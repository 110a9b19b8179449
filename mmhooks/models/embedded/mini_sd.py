"""`mini-sd`: a latent diffusion model small enough to ship, as a diffusers ``StableDiffusionPipeline``.

Text comes from mini's own text tower, put into a transformers ``CLIPTextModel`` (the hidden states are equal). The
latents are the first principal components of 8 x 8 patches: an ``AutoencoderTiny`` without encoder blocks is a linear
map and holds them exactly; its decoder is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.models.embedded import mini
from mmhooks.models.embedded.hf_weights import encoder_layers
from mmhooks.utils.assets import ASSETS, asset
from mmhooks.utils.files import write_bytes
from mmhooks.utils.tensors import read_safetensors

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

LATENTS = 24  # principal components kept of a patch of 8 x 8 x 3
SIDE = 8  # latents are SIDE x SIDE
PATCH = 8
SCALING = 2.0  # autoencoder's latents have a spread of about ½, the U-Net's of 1
FOLDER = ASSETS / "mini-sd"
PAD = "<|pad|>"
DRAWINGS_FILE = "drawings.json"


def text_encoder() -> CLIPTextModel:
    """mini's text tower as a ``CLIPTextModel``.

    Padding has an id of its own (the mask's, which mini never uses) with the vector of mini's padding, id 0:
    ``CLIPTokenizer`` would otherwise take every ``!`` of a prompt for padding.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    source: Any = mini.load_embedded("mini")[0]
    tokenizer, width = mini.tokenizer(), source.token_embedding.weight.shape[1]
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=mini.vocabulary_size(),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=mini.EMBED_DIM,
            num_hidden_layers=len(source.transformer.resblocks),
            num_attention_heads=source.transformer.resblocks[0].attn.num_heads,
            max_position_embeddings=mini.CONTEXT,
            hidden_act="gelu",
            bos_token_id=tokenizer.sot_token_id,
            eos_token_id=tokenizer.eot_token_id,
            pad_token_id=mini.mask_id(),
        )
    )
    words = source.token_embedding.weight.detach().clone()
    words[mini.mask_id()] = words[0]
    state = {
        "embeddings.token_embedding.weight": words,
        "embeddings.position_embedding.weight": source.positional_embedding.detach(),
        "final_layer_norm.weight": source.ln_final.weight.detach(),
        "final_layer_norm.bias": source.ln_final.bias.detach(),
    }
    state |= encoder_layers(source.transformer.resblocks)
    prefix = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    model.load_state_dict({prefix + k: v for k, v in state.items()})
    return model.eval()


def tokenizer() -> CLIPTokenizer:
    """mini's tokenizer as a ``CLIPTokenizer``: the same ids, padding apart (see :func:`text_encoder`)."""
    from transformers import CLIPTokenizer

    own = mini.tokenizer()
    start, end = (own.decoder[i] for i in (own.sot_token_id, own.eot_token_id))
    merges: Any = [pair for pair, _ in sorted(own.bpe_ranks.items(), key=lambda item: item[1])]
    return CLIPTokenizer(
        vocab=dict(own.encoder) | {PAD: mini.mask_id()},
        merges=merges,
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token=PAD,
        model_max_length=mini.CONTEXT,
    )


def unet() -> UNet2DConditionModel:
    """An untrained U-Net on 8 x 8 latents: 6.5 M parameters, cross-attention at 8 x 8 and in the middle.

    Beside the cross-attention, the text enters through the time embedding (diffusers' ``addition_embed_type="text"``),
    pooled from the same ``encoder_hidden_states``.
    """
    from diffusers import UNet2DConditionModel  # type: ignore[attr-defined]

    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(128, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
        resnet_time_scale_shift="scale_shift",
    )


def scheduler() -> DDIMScheduler:
    """Cosine schedule, v-prediction; sampling starts at the noisiest step."""
    from diffusers import DDIMScheduler  # type: ignore[attr-defined]

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # of no effect with trailing steps; the pipeline warns of any other value
    )


def autoencoder(
    mean: Float[Tensor, " 192"] | None = None, basis: Float[Tensor, "k 192"] | None = None
) -> AutoencoderTiny:
    """An autoencoder whose encoder is linear; its decoder is untrained.

    Args:
        mean: of the patches, pixels from 0 to 1 in the order of ``F.unfold`` (channel, row, column).
        basis: rows that take a centred patch to its latents.
    """
    from diffusers import AutoencoderTiny  # type: ignore[attr-defined]

    model = AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(48,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(4, 4, 2, 0),
        latent_channels=LATENTS,
        scaling_factor=SCALING,
    )
    if mean is not None and basis is not None:
        _set_linear_encoder(model.encoder.layers, mean, basis)
    return model


@torch.no_grad()
def _set_linear_encoder(layers: Any, mean: Float[Tensor, " 192"], basis: Float[Tensor, "k 192"]) -> None:
    """Strided convolutions that gather 2 x 2 pixels, then 4 x 4; the third gathers 8 x 8 and projects."""
    first, *strided, last = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    for layer in (first, *strided, last):
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    for c in range(3):
        first.weight[c, c, 1, 1] = 1
    places = [(c, 0, 0) for c in range(3)]  # of each channel: colour, row and column inside the patch
    for level, layer in enumerate(strided):
        gathered = [
            (k, (c, row + (dy << level), column + (dx << level)), dy, dx)
            for dy in range(2)
            for dx in range(2)
            for k, (c, row, column) in enumerate(places)
        ]
        if level < len(strided) - 1:
            for new, (k, _, dy, dx) in enumerate(gathered):
                layer.weight[new, k, dy + 1, dx + 1] = 1
            places = [place for _, place, _, _ in gathered]
        else:
            for k, (c, row, column), dy, dx in gathered:
                layer.weight[: len(basis), k, dy + 1, dx + 1] = basis[:, c * 64 + row * PATCH + column]
    for k in range(len(basis)):
        last.weight[k, k, 1, 1] = 1
    last.bias = torch.nn.Parameter(-(basis @ mean))


def assemble(vae: Any, denoiser: Any) -> StableDiffusionPipeline:
    """The pipeline of its parts, in evaluation mode."""
    from diffusers import StableDiffusionPipeline  # type: ignore[attr-defined]

    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=denoiser.eval(),
        scheduler=scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mini_pipeline() -> StableDiffusionPipeline:
    """The shipped pipeline, computed in fp32; the text tower is taken from ``mini``.

    Raises:
        MissingWeights: the weights are not in this installation.

    >>> pipe = mini_pipeline()
    >>> pipe("a drawing of a cat", num_inference_steps=2, output_type="np").images.shape
    (1, 64, 64, 3)
    """
    parts = {"unet": unet(), "vae": autoencoder()}
    for name, part in parts.items():
        weights = read_safetensors(asset(FOLDER / f"{name}.safetensors"))
        part.load_state_dict({k: v.float() for k, v in weights.items()})
    return assemble(parts["vae"], parts["unet"])


def write(folder: str | Path) -> Path:
    """Write the shipped pipeline as a plain directory for ``StableDiffusionPipeline.from_pretrained``."""
    folder = Path(folder)
    mini_pipeline().save_pretrained(folder)
    write_bytes(folder / DRAWINGS_FILE, (FOLDER / DRAWINGS_FILE).read_bytes())
    return folder


def drawings() -> list[dict[str, str]]:
    """Names and codepoints of the drawings that the pipeline was trained on, in their order."""
    return json.loads(asset(FOLDER / DRAWINGS_FILE).read_text(encoding="utf-8"))
