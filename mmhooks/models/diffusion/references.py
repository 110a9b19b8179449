"""A reference image as a conditioner: the tensor that a prompt's conditioner is interpolated toward.

A U-Net reads a text tower's hidden states, an image's embedding lies in CLIP's joint space. Three ways across:

- ``naive``: the embedding itself on every token (probably the paper's; needs equal widths, the bases differ);
- ``projected``: back through the pseudo-inverse of the text projection, ``e W⁺`` with ``text embed = h W``: the
  hidden state of least norm whose text embedding is the image's;
- ``unclip``: the embedding as Stable unCLIP takes it, for the site ``image.embed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.errors import MissingWeights, MMHooksError, ShapeMismatch
from mmhooks.models.layers.leaves import linear_weights
from mmhooks.models.placement import input_dtype

Mode = Literal["naive", "projected", "unclip"]


def reference(
    sd: Any,
    images: Any,
    *,
    mode: Mode = "projected",
    clip: Any = None,
    projection: Any = None,
    norm: float | None = None,
) -> Float[Tensor, "n ..."]:
    """What ``mm.Interpolate(..., toward=)`` takes for a reference image.

    Args:
        sd: a :class:`~mmhooks.models.diffusion.model.HookedDiffusion`.
        images: a PIL image, or several: one a row of the prompt's batch.
        clip: the CLIP whose image tower belongs to the conditioner, as ``mm.load("ViT-H-14",
            pretrained="laion2b_s32b_b79k")`` for SD 2; default: the pipeline's own ``image_encoder``.
        projection: ``projected``: ``[d_cond d_joint]``, or a model that has it; default: that of ``clip``, or the
            pipeline's own. See :func:`text_projection`.
        norm: to which every row is scaled; default: that of the conditioner's tokens (:func:`token_norm`), for
            ``unclip`` the embedding as it is.

    Returns:
        ``[n 1 d_cond]`` for ``text.cond``, the same on every token; ``unclip``: ``[n d]`` for ``image.embed``.

    Raises:
        MissingWeights: neither ``clip`` nor the pipeline has an image tower, or a projection.
        ShapeMismatch: widths that differ: ``naive`` needs ``d_joint = d_cond``.
        MMHooksError: the projection belongs to another text tower.

    >>> ref = reference(sd, image, clip=clip)                                            # doctest: +SKIP
    >>> edit = mm.Interpolate(textd, toward=ref, strength=0.4, at="text.cond", guidance="cond")  # doctest: +SKIP
    >>> with sd.hooks(edit):                                                               # doctest: +SKIP
    ...     sd.pipe("please draw an animal")
    """
    if mode not in ("naive", "projected", "unclip"):
        raise MMHooksError(f'mode: expected "naive", "projected" or "unclip", got {mode!r}')
    embeds = image_embeds(sd, images, clip=clip)
    if mode == "unclip":
        if "image.embed" not in sd.places.sites.canonical:
            raise MMHooksError(
                f"{type(sd.pipe).__name__} takes no image embedding: mode='unclip' is for StableUnCLIPPipeline"
            )
        width = sd.model.image_normalizer.mean.shape[-1]
        if embeds.shape[-1] != width:
            raise ShapeMismatch(
                f"the image tower gives {embeds.shape[-1]} dimensions, the pipeline takes {width}"
            )
        return embeds if norm is None else F.normalize(embeds, dim=-1) * norm
    width = sd.unet.config.cross_attention_dim
    if "text_2" in sd.text_towers:
        raise MMHooksError(
            f"{type(sd.pipe).__name__} conditions on {' and '.join(sd.text_towers)}, each with a space of its own: a "
            f"image has no single place among their {width} dimensions; give Interpolate(toward=) a tensor of yours"
        )
    if mode == "projected":
        matrix = text_projection(sd, clip if projection is None else projection)
        if matrix.shape[1] != embeds.shape[-1]:
            raise ShapeMismatch(
                f"the projection maps to {matrix.shape[1]} dimensions, the image tower gives {embeds.shape[-1]}: "
                "they belong to different models"
            )
        embeds = embeds.float() @ torch.linalg.pinv(matrix.float())
    if embeds.shape[-1] != width:
        raise ShapeMismatch(
            f"the image's embedding has {embeds.shape[-1]} dimensions, the U-Net reads {width}: use mode='projected'"
        )
    scaled = F.normalize(embeds.float(), dim=-1) * (token_norm(sd) if norm is None else norm)
    return scaled[:, None].to(sd.unet.dtype)


def image_embeds(sd: Any, images: Any, *, clip: Any = None) -> Float[Tensor, "n d"]:
    """Images in CLIP's joint space, by ``clip`` or the pipeline's own image tower; not normalised.

    Raises:
        MissingWeights: there is neither.
    """
    images = list(images) if isinstance(images, Sequence) else [images]
    with torch.no_grad():
        if clip is not None:
            if clip.preprocess is None:
                raise MMHooksError(
                    "expected a clip with preprocess=, got one without: mm.HookedCLIP(model, preprocess=...)"
                )
            pixels = torch.stack([clip.preprocess(image) for image in images])
            return clip.encode_image(pixels.to(clip.device, clip.dtype)).to(sd.device)
        tower = getattr(sd.pipe, "image_encoder", None)
        extract = getattr(sd.pipe, "feature_extractor", None)
        if tower is None or extract is None:
            raise MissingWeights(
                f"{type(sd.pipe).__name__} has no image tower (image_encoder, feature_extractor): give "
                'clip=, e.g. mm.load("ViT-H-14", pretrained="laion2b_s32b_b79k") for SD 2'
            )
        pixels = extract(images=[p.convert("RGB") for p in images], return_tensors="pt").pixel_values
        return tower(pixels.to(tower.device, tower.dtype)).image_embeds


def text_projection(sd: Any, source: Any = None) -> Float[Tensor, "d_cond d_joint"]:
    """``W_proj`` with ``text embed = hidden state @ W_proj`` for the pipeline's conditioner.

    Args:
        source: the matrix itself, an open_clip model (hooked or not), or a ``CLIPTextModelWithProjection``; None:
            the pipeline's own. A model's text tower must be the pipeline's: its token embeddings are compared.

    Raises:
        MissingWeights: the pipeline has none of its own.
        ShapeMismatch, MMHooksError: it belongs to a text tower of another width, or of other weights.
    """
    width = sd.unet.config.cross_attention_dim
    if source is None:
        own = [
            t for t in sd.text_towers.values() if hasattr(getattr(t, "text_projection", None), "in_features")
        ]
        source = next((t for t in own if t.text_projection.in_features == width), None)
        if source is None:
            raise MissingWeights(
                f"{type(sd.pipe).__name__} has no text projection of its own: give projection= or clip=, the model "
                "whose text tower it conditions on"
            )
    if isinstance(source, Tensor):
        matrix, tower = source, None
    else:
        model = getattr(source, "model", source)
        found = getattr(model, "text_projection", None)
        if found is None:
            found = getattr(getattr(model, "text", None), "text_projection", None)
        if found is None:
            raise MissingWeights(f"{type(model).__name__} has no text_projection")
        matrix, tower = _matrix(found), model
    if matrix.dim() != 2 or matrix.shape[0] != width:
        raise ShapeMismatch(
            f"a projection from {width} dimensions is needed, those that the U-Net reads; got one of shape "
            f"{tuple(matrix.shape)}"
        )
    if tower is not None:
        _check_tower(tower, [t for name, t in sd.text_towers.items() if name != "prior_text"])
    return matrix.detach().to(sd.device)


def _matrix(projection: nn.Module | Tensor) -> Float[Tensor, "d e"]:
    """Of a parameter, or of a linear layer as it runs: LoRA adds to its weight, quantised layers keep none."""
    if isinstance(projection, Tensor):
        return projection
    weight, bias = linear_weights(projection)
    if bias is not None and bool(bias.any()):
        raise MMHooksError(
            f"expected a text projection that is a matrix, got a {type(projection).__name__} with a bias: give the "
            "matrix itself as projection="
        )
    return weight.T.to(input_dtype(projection))


def _check_tower(model: nn.Module, encoders: list[nn.Module]) -> None:
    """Raises where no text encoder of the pipeline has the token embeddings of ``model``."""
    theirs = _tokens(model)
    said = []
    for encoder in encoders:
        ours = _tokens(encoder)
        if ours.shape != theirs.shape:
            said.append(f"shape {tuple(ours.shape)}")
            continue
        ours, other = ours.float(), theirs.float().to(ours.device)
        far = (ours - other).norm(dim=1) > 1e-2 * ours.norm(dim=1)  # half precision is 2e-4 away
        if far.float().mean() < 0.01:  # a few may be added or replaced: padding, textual inversion
            return
        said.append(f"a table of which {int(far.sum())} of {len(far)} rows differ")
    raise MMHooksError(
        f"{type(model).__name__} is not the model whose text tower the pipeline uses: its token embeddings, "
        f"{tuple(theirs.shape)}, against {' and '.join(said)}; give the checkpoint of the pipeline's text encoder"
    )


def _tokens(model: Any) -> Tensor:
    for name, module in model.named_modules():
        if name.endswith("token_embedding"):
            return module.weight.detach()
    raise MMHooksError(f"{type(model).__name__} has no token embedding")


def conditioner(sd: Any, prompts: str | Sequence[str]) -> Float[Tensor, "n token d_cond"]:
    """What the U-Net would get for prompts, without a run: ``text.cond`` of the conditional half."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    with torch.no_grad():
        found = sd.pipe.encode_prompt(
            prompt=prompts, device=sd.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return found[0]


def text_end(sd: Any, prompts: Sequence[str]) -> Int[Tensor, " n"]:
    """Position of the end of the text, whose hidden state CLIP projects into the joint space."""
    tokenizer = getattr(sd.pipe, "tokenizer", None) or sd.pipe.tokenizer_2
    ids = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return (ids == tokenizer.eos_token_id).int().argmax(1)


def caption_embeds(sd: Any, captions: Sequence[str], *, clip: Any = None) -> Float[Tensor, "n d"]:
    """Captions in the joint space of a Stable unCLIP pipeline: what its prior makes an image embedding of.

    The CLIP text embedding, not the prior's output: the prior draws at random, costs dozens of passes a caption, and
    is trained to land where *images* lie, so it would not be an independent side.

    Args:
        clip: the model whose image tower gives the other side; its text tower must be the prior's.

    Raises:
        MMHooksError: no prior, or ``clip`` has another text tower.
    """
    tower = sd.text_towers.get("prior_text")
    if tower is None:
        raise MMHooksError(
            f"{type(sd.pipe).__name__} has no prior with a text encoder: no caption reaches its image embedding"
        )
    if clip is not None:
        _check_tower(getattr(clip, "model", clip), [tower])
    ids = sd.pipe.prior_tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return tower(ids.to(sd.device)).text_embeds


def token_norm(sd: Any, prompt: str = "a photo") -> float:
    """The median norm of a conditioner's tokens, the first left out: it is an outlier in every CLIP."""
    return float(conditioner(sd, prompt)[0, 1:].float().norm(dim=-1).median())
