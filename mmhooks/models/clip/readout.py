"""How a tower computes its embedding from the residual stream: pooling, final LayerNorm and projection, per family.

open_clip's own image and text transformers (class token, average, CoCa's attention pooling; end-of-text, first and
last position) and timm's (class token, average, SigLIP's attention pooling). Other towers raise an error that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmhooks.errors import NoExactSum
from mmhooks.hooks.intercept import MultiheadWeights, is_multihead, multihead_weights
from mmhooks.models.clip.linearized import Frozen, check_norm, pooled
from mmhooks.models.layers.leaves import LayerWeights, linear_weights
from mmhooks.models.layers.openclip_block import openclip_weights
from mmhooks.models.layers.timm_block import timm_weights
from mmhooks.models.placement import device_of, input_dtype

Freeze = Callable[[Float[Tensor, "b t d"]], Frozen]
Positions = Callable[[Tensor], Int[Tensor, " b"]]


@dataclass(frozen=True, eq=False)
class Readout:
    """From the residual stream after the last block to the embedding.

    Attributes:
        tower: "image" or "text".
        blocks: the weights of the tower's blocks; what they write is at the sites ``<tower>.blocks.N.attn.z`` and
            ``.mlp_out``.
        freeze: the map at a stream; given one token where ``positions`` is set, else all.
        positions: the token of each input that is read; None: all tokens are pooled.
        nonlinear_site: a native site that adds to the embedding without being linear in the stream, the MLP of an
            attention pooling; "" where there is none.
        project: from that site's output to the embedding.
        pools_by_attention: whether the weights of the pooling depend on the stream.
    """

    tower: str
    blocks: Sequence[LayerWeights]
    freeze: Freeze
    positions: Positions | None = None
    nonlinear_site: str = ""
    project: Callable[[Tensor], Float[Tensor, "b e"]] | None = None
    pools_by_attention: bool = False

    def writer(self, layer: int) -> tuple[Float[Tensor, "h k d"], Float[Tensor, " d"]]:
        """Weights of a block's output projection, including its layer scale: attention heads write ``z @ w_o``, and ``b_o``
        is added once."""
        block = self.blocks[layer]
        weight, bias = (
            attention_weights(block.out).out if is_multihead(block.out) else linear_weights(block.out)
        )
        w_o = rearrange(weight, "d (head e) -> head e d", head=block.heads)
        b_o = w_o.new_zeros(w_o.shape[-1]) if bias is None else bias
        scale = block.attention_scale
        return (w_o, b_o) if scale is None else (w_o * scale, b_o * scale)

    def reader(self, layer: int) -> tuple[Float[Tensor, "d h k"], Float[Tensor, "h k"]]:
        """Matrix and bias from a block's normed stream to the values of its attention heads.

        Raises:
            NoExactSum: no module of this block maps to the values alone.
        """
        block = self.blocks[layer]
        if block.value is None:
            raise NoExactSum(
                f"second-order effects: expected blocks with a map of their own to the values, got {block.kind}, whose "
                "queries, keys and values are one product or are normed before the projection"
            )
        one = is_multihead(block.value)
        weight, bias = attention_weights(block.value).v if one else linear_weights(block.value)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return weight.T.unflatten(1, (block.heads, -1)), bias.unflatten(0, (block.heads, -1))

    def mlp_writer(self, layer: int) -> tuple[Float[Tensor, "d n"], Float[Tensor, " d"]]:
        """What each neuron at 1 writes into the stream, including the layer scale, and what the MLP writes besides.

        Raises:
            NoExactSum: the MLP has no last linear layer.
        """
        block = self.blocks[layer]
        if block.mlp_out is None:
            raise NoExactSum(
                f"neurons: expected an MLP with one last linear layer, got that of a {block.kind}"
            )
        weight, bias = linear_weights(block.mlp_out)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        scale = block.mlp_scale
        return (weight, bias) if scale is None else (weight * scale[:, None], bias * scale)

    @property
    def n_heads(self) -> int:
        return self.blocks[0].heads


def image_readout(model: Any) -> Readout:
    """The readout of ``model.visual``.

    Raises:
        NoExactSum: a convolutional tower, blocks or a pooling whose sum is not one of those above; says which.
    """
    visual = model.visual
    if hasattr(visual, "transformer") and hasattr(visual, "conv1"):
        return _openclip_image(visual)
    if hasattr(getattr(visual, "trunk", None), "blocks"):
        return _timm_image(visual)
    kind = type(getattr(visual, "trunk", visual)).__name__
    raise NoExactSum(
        f"the image tower is a {kind}: convolutions and pooling between stages, no residual stream of tokens that "
        "blocks add to, so its embedding is no sum of direct contributions; take a ViT"
    )


def text_readout(model: Any) -> Readout:
    """The readout of the text tower, at the position that it pools (end of text).

    Raises:
        NoExactSum: a Hugging Face encoder, or an unknown pooling.
    """
    owner = getattr(model, "text", None) or model
    if not hasattr(owner, "token_embedding"):
        kind = type(owner.transformer).__name__
        raise NoExactSum(
            f"the text tower is a {kind} of Hugging Face: its LayerNorms stand in the residual stream or its pooler is "
            "not linear, so its embedding is no sum of direct contributions; take one of open_clip's own"
        )
    blocks = _openclip_blocks(owner.transformer.resblocks, "text")
    pool = "last" if getattr(owner, "cls_emb", None) is not None else None
    pool = pool or getattr(owner, "pool_type", None) or getattr(owner, "text_pool_type", "argmax")
    eos = getattr(owner, "eos_id", None) or getattr(owner, "text_eos_id", None)
    class_token = getattr(owner, "cls_emb", None) is not None
    positions: dict[str, Positions] = {
        "argmax": lambda tokens: tokens.argmax(-1),
        "eos": lambda tokens: (tokens == eos).int().argmax(-1),
        "first": lambda tokens: tokens.new_zeros(len(tokens)),
        "last": lambda tokens: tokens.new_full((len(tokens),), tokens.shape[1] - (0 if class_token else 1)),
    }
    if pool not in positions:
        raise NoExactSum(f"the text tower pools by {pool!r}; a sum is known for {', '.join(positions)}")
    check_norm(owner.ln_final, "the text tower's final norm")
    matrix, bias = matrix_of(owner.text_projection)
    return Readout("text", blocks, one_token(owner.ln_final, matrix, bias), positions[pool])


# -- families ------------------------------------------------------------------------------------------------


def _openclip_image(visual: Any) -> Readout:
    blocks = _openclip_blocks(visual.transformer.resblocks, "image")
    check_norm(visual.ln_post, "the image tower's final norm")
    matrix, bias = matrix_of(visual.proj)
    if visual.attn_pool is not None:
        if visual.attn_pool_contrastive is not None or visual.pool_type != "tok":
            raise NoExactSum(
                f"the image tower pools by attention twice ({visual.attn_pool_type or visual.pool_type!r}); a sum is "
                "known for CoCa's pooling, whose first query is the embedding"
            )
        pool, norm = visual.attn_pool, visual.ln_post
        check_norm(pool.ln_k, "the norm in front of the image tower's pooling")

        def attention(stream: Tensor) -> Frozen:
            inner = _query_pooling(pool, stream)
            return inner.normed(norm, inner(stream)).projected(matrix, bias)

        return Readout("image", blocks, attention, pools_by_attention=True)
    return class_token_or_average(
        "image", blocks, visual.pool_type, 1, visual.ln_post, visual.final_ln_after_pool, matrix, bias
    )


def _timm_image(visual: Any) -> Readout:
    trunk = visual.trunk
    odd = sorted({type(b).__name__ for b in trunk.blocks} - {"Block", "EvaBlock", "RelPosBlock"})
    if odd:
        raise NoExactSum(
            f"the image tower's blocks are {', '.join(odd)}: what attention and MLP add is normalised or mixed on its "
            "way into the residual stream, so attention heads are no plain sum; a sum is known for timm's Block, "
            "EvaBlock and RelPosBlock"
        )
    blocks = [timm_weights(block) for block in trunk.blocks]
    norm, after = _final_norm(trunk)
    steps = [
        m
        for m in (getattr(trunk, "head", None), *visual.head)
        if not isinstance(m, (nn.Identity, nn.Dropout))
    ]
    if any(not hasattr(m, "in_features") for m in steps if m is not None):
        kinds = ", ".join(type(m).__name__ for m in steps)
        raise NoExactSum(f"the projection behind the pooling is {kinds}: only a linear one keeps the sum")
    matrix = bias = None
    for step in steps:
        more, plus = matrix_of(step)
        assert more is not None
        bias = plus if bias is None else bias @ more + (0 if plus is None else plus)
        matrix = more if matrix is None else matrix @ more
    pool = getattr(trunk, "attn_pool", None)
    if pool is None:
        kind = {"token": "tok", "avg": "avg"}.get(trunk.global_pool, str(trunk.global_pool))
        skip = 0 if getattr(trunk, "pool_include_prefix", False) else trunk.num_prefix_tokens
        return class_token_or_average("image", blocks, kind, skip, norm, after, matrix, bias)
    if type(pool).__name__ != "AttentionPoolLatent" or after or pool.pool not in ("token", "avg"):
        raise NoExactSum(
            f"the image tower pools by {type(pool).__name__}; a sum is known for AttentionPoolLatent"
        )
    skip = 0 if getattr(trunk, "pool_include_prefix", False) else trunk.num_prefix_tokens

    def choose(latents: Float[Tensor, "b q d"]) -> Float[Tensor, "b d"]:
        return latents[:, 0] if pool.pool == "token" else latents.mean(1)

    def project(out: Float[Tensor, "b q d"]) -> Float[Tensor, "b e"]:
        return choose(out.float()) @ matrix if matrix is not None else choose(out.float())

    def freeze(stream: Tensor) -> Frozen:
        return _latent_pooling(pool, norm, stream, skip).projected(matrix, bias)

    nonlinear_site = "" if pool.mlp is None else "visual.trunk.attn_pool.mlp"
    return Readout("image", blocks, freeze, None, nonlinear_site, project, pools_by_attention=True)


def class_token_or_average(
    tower: str,
    blocks: Sequence[LayerWeights],
    kind: str,
    skip: int,
    norm: nn.Module,
    after: bool,
    matrix: Tensor | None,
    bias: Tensor | None,
) -> Readout:
    """Class token, or the average of all tokens but the first ``skip``; the norm before or ``after`` it."""
    if kind == "tok":
        first: Positions = lambda images: torch.zeros(len(images), dtype=torch.long, device=images.device)  # noqa: E731
        return Readout(tower, blocks, one_token(norm, matrix, bias), first)
    if kind != "avg":
        raise NoExactSum(
            f"the {tower} tower pools by {kind!r}; a sum is known for the class token, the average and attention pooling"
        )

    def average(stream: Tensor) -> Frozen:
        b, t, _ = stream.shape
        weights = stream.new_full((b, 1, t), 1 / (t - skip))
        weights[..., :skip] = 0
        if not after:
            return pooled(norm, stream, weights).projected(matrix, bias)
        plain = pooled(nn.Identity(), stream, weights)
        return plain.normed(norm, plain(stream)).projected(matrix, bias)

    return Readout(tower, blocks, average)


def one_token(norm: nn.Module, matrix: Tensor | None, bias: Tensor | None) -> Freeze:
    def freeze(stream: Float[Tensor, "b 1 d"]) -> Frozen:
        return pooled(norm, stream, stream.new_ones(len(stream), 1, 1)).projected(matrix, bias)

    return freeze


def _latent_pooling(pool: Any, norm: nn.Module, stream: Tensor, skip: int) -> Frozen:
    """timm's AttentionPoolLatent behind ``norm``, up to its own MLP."""
    x = norm(stream.to(input_dtype(pool.kv))).float()[:, skip:]
    if pool.pos_embed is not None:
        raise NoExactSum("attention pooling with position embeddings of its own is not known as a sum here")
    heads = pool.num_heads
    q = rearrange(pool.q(pool.latent).detach().float(), "1 query (head e) -> query head e", head=heads)
    kv, kv_bias = linear_weights(pool.kv)
    w_k, w_v = kv.chunk(2)
    b_k, b_v = (None, None) if kv_bias is None else kv_bias.chunk(2)
    k = rearrange(F.linear(x, w_k, b_k), "b token (head e) -> b token head e", head=heads)
    q, k = pool.q_norm(q), pool.k_norm(k)
    pattern = einsum(q * pool.scale, k, "query head e, b token head e -> b head query token").softmax(-1)
    pattern = pattern[:, :, 0] if pool.pool == "token" else pattern.mean(2)
    pattern = F.pad(pattern, (skip, 0))
    return through_values(norm, stream, pattern, w_v, b_v, *linear_weights(pool.proj))


def _query_pooling(pool: Any, stream: Tensor) -> Frozen:
    """open_clip's AttentionalPooler (CoCa): what its first query gets."""
    return multihead_pooling(pool.attn, pool.ln_k, pool.ln_q(pool.query[:1]).detach(), stream)


def multihead_pooling(
    attn: Any, norm: nn.Module, query: Float[Tensor, "1 d"], stream: Float[Tensor, "b t e"]
) -> Frozen:
    """What one query gets from torch's attention over ``norm(stream)``."""
    keys = norm(stream.to(query.dtype))
    heads, x = attn.num_heads, keys.float()
    weights = multihead_weights(attn, query[None], keys[:1, :1])
    (w_q, b_q), (w_k, b_k), (w_v, b_v), (w_o, b_o) = _to_float32(weights)
    q = rearrange(F.linear(query.float(), w_q, b_q), "1 (head e) -> head e", head=heads)
    k = rearrange(F.linear(x, w_k, b_k), "b token (head e) -> b token head e", head=heads)
    pattern = einsum(q / q.shape[-1] ** 0.5, k, "head e, b token head e -> b head token").softmax(-1)
    return through_values(norm, stream, pattern, w_v, b_v, w_o, b_o)


def through_values(
    norm: nn.Module,
    stream: Float[Tensor, "b t d"],
    pattern: Float[Tensor, "b p t"],
    w_v: Float[Tensor, "e d"],
    b_v: Float[Tensor, " e"] | None,
    w_o: Float[Tensor, "f e"],
    b_o: Float[Tensor, " f"] | None,
) -> Frozen:
    """Attention with a given pattern: each head reads by its part of ``w_v`` and writes by its part of ``w_o``."""
    p = pattern.shape[1]
    value = rearrange(w_v, "(head e) d -> head e d", head=p)
    maps = einsum(value, rearrange(w_o, "f (head e) -> f head e", head=p), "head e d, f head e -> head d f")
    bias = torch.zeros(len(w_o), device=w_o.device) if b_o is None else b_o
    if b_v is not None:
        bias = bias + w_o @ b_v
    return pooled(norm, stream, pattern, maps).projected(None, bias)


# -- weights -------------------------------------------------------------------------------------------------


def _openclip_blocks(blocks: Iterable[Any], tower: str) -> list[LayerWeights]:
    blocks = list(blocks)
    if any(not isinstance(getattr(block, "ln_attn", nn.Identity()), nn.Identity) for block in blocks):
        raise NoExactSum(
            f"the {tower} tower's blocks normalise attention's output before they add it (scale_attn): attention heads "
            "are no plain sum there"
        )
    return [openclip_weights(block) for block in blocks]


def _final_norm(trunk: Any) -> tuple[nn.Module, bool]:
    """timm's final norm, and whether it comes after the pooling."""
    norms = [getattr(trunk, name, None) or nn.Identity() for name in ("norm", "fc_norm")]
    there = [not isinstance(norm, nn.Identity) for norm in norms]
    after = there[1]
    found = norms[1] if after else norms[0]
    if all(there):
        kinds = " and ".join(type(n).__name__ for n, is_there in zip(norms, there, strict=True) if is_there)
        raise NoExactSum(f"the image tower ends in {kinds}; a sum is known for one LayerNorm")
    check_norm(found, "the image tower's final norm")
    return found, after


def attention_weights(attn: Any) -> MultiheadWeights:
    """Weights of torch's attention as it runs, in fp32."""
    x = torch.zeros(1, 1, attn.embed_dim, dtype=attn.in_proj_weight.dtype, device=device_of(attn))
    return _to_float32(multihead_weights(attn, x, x))


def _to_float32(weights: MultiheadWeights) -> MultiheadWeights:
    return MultiheadWeights(*((w.float(), None if b is None else b.float()) for w, b in weights))


def matrix_of(projection: Any) -> tuple[Tensor | None, Tensor | None]:
    """``x @ matrix + bias`` of a parameter or a linear layer; None for what does not exist."""
    if projection is None:
        return None, None
    if isinstance(projection, nn.Module):
        weight, bias = linear_weights(projection)
        return weight.T, bias
    return projection.detach().float(), None
