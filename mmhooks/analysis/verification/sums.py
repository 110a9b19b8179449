"""What must hold between the sites of a layer, and between layers, whatever the weights are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mmhooks.analysis.verification.check import Check, close
from mmhooks.hooks.sites import Site

_BLOCK = re.compile(r"^(.+?\.blocks\.\d+)\.")


def layer_sums(
    cache: Mapping[str, Tensor], sites: Mapping[str, Site], outputs: Mapping[nn.Module, Tensor]
) -> Iterator[Check]:
    """The sums inside the layers of which a cache holds the sites.

    Args:
        sites: the canonical sites by name.
        outputs: what the owners of ``head_out`` give, by plain hooks (:func:`projections`).
    """
    for name in cache:
        prefix, _, leaf = name.rpartition(".")
        if leaf == "resid_mid" and all(
            f"{prefix}.{part}" in cache for part in ("resid_pre", "attn_out", "resid_post")
        ):
            got = cache[f"{prefix}.resid_pre"] + cache[f"{prefix}.attn_out"]
            yield close("resid_pre + attn_out = resid_mid", prefix, got, cache[name])
            if f"{prefix}.mlp_out" in cache:
                got = cache[name] + cache[f"{prefix}.mlp_out"]
                yield close("resid_mid + mlp_out = resid_post", prefix, got, cache[f"{prefix}.resid_post"])
        elif leaf == "pattern":
            yield from _attention(prefix, cache, sites[name].tap.owner)
        elif leaf == "head_out" and sites[name].tap.owner in outputs:
            owner: Any = sites[name].tap.owner
            bias = getattr(owner, "out_proj", owner).bias
            total = cache[name].sum(-2) + (0 if bias is None else bias.detach())
            want = outputs[owner]
            if want.shape != total.shape and want.transpose(0, 1).shape == total.shape:
                want = want.transpose(0, 1)  # of nn.MultiheadAttention with tokens first
            yield close("sum of head_out + bias = output of the attention", prefix, total, want)


def projections(names: list[str], sites: Mapping[str, Site]) -> list[nn.Module]:
    """The modules whose outputs :func:`layer_sums` needs for these sites."""
    return [sites[name].tap.owner for name in names if name.endswith(".head_out")]


def _attention(prefix: str, cache: Mapping[str, Tensor], owner: Any) -> Iterator[Check]:
    pattern = cache[f"{prefix}.pattern"]
    rows = pattern.float().sum(-1)
    yield close("pattern sums to 1", prefix, rows, (rows > 0.5).float())
    q, k, v = (cache.get(f"{prefix}.{leaf}") for leaf in ("q", "k", "v"))
    if v is not None and f"{prefix}.z" in cache:
        values = _by_query_head(v, pattern)
        z = torch.einsum("...hqk,...khe->...qhe", pattern.to(values.dtype), values)
        yield close("pattern @ v = z", prefix, z, cache[f"{prefix}.z"])
    if q is not None and k is not None and not _has_position_bias(owner):
        keys = _by_query_head(k, pattern).float()
        scale = next(
            (s for s in (getattr(owner, n, None) for n in ("scaling", "scale")) if isinstance(s, float)),
            q.shape[-1] ** -0.5,
        )
        scores = scale * torch.einsum("...qhe,...khe->...hqk", q.float(), keys)
        cap = getattr(owner, "attn_logit_softcapping", None)  # Gemma 2
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        # What the model masks is read off its pattern; everything else must follow from q and k.
        scores = scores.masked_fill(pattern == 0, float("-inf"))
        want = torch.nan_to_num(scores.softmax(-1)).to(pattern.dtype)
        yield close("softmax of q · k = pattern", prefix, want, pattern)


def _by_query_head(values: Tensor, pattern: Tensor) -> Tensor:
    """Keys or values of grouped attention, repeated for each query head."""
    return values.repeat_interleave(pattern.shape[-3] // values.shape[-2], -2)


def _has_position_bias(owner: nn.Module) -> bool:
    """Whether scores hold more than queries and keys: relative positions (Swin, T5)."""
    names = [*dict(owner.named_parameters()), *dict(owner.named_modules())]
    return any("rel" in name.lower() for name in names)


def stream_sums(names: list[str], read: Callable[[list[str]], Mapping[str, Tensor]]) -> Iterator[Check]:
    """That layers follow each other, and that each tower's stream ends as the sum of what its layers wrote.

    Args:
        read: the values at sites, in one run.
    """
    towers: dict[str, list[str]] = {}
    for name in names:
        found = _BLOCK.match(name)
        if found and name.endswith(".resid_mid"):
            towers.setdefault(found[1].rpartition(".")[0], []).append(found[1])
    for stack, blocks in towers.items():
        leaves = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        wanted = [f"{block}.{leaf}" for block in blocks for leaf in leaves]
        cache = read([name for name in wanted if name in names])
        if len(cache) < len(wanted):
            continue  # a site that does not fire has a check of its own
        for one, following in pairwise(blocks):
            got, want = cache[f"{one}.resid_post"], cache[f"{following}.resid_pre"]
            yield close("resid_post = resid_pre of the next block", one, got, want)
        total = cache[f"{blocks[0]}.resid_pre"].clone()
        for block in blocks:
            total += cache[f"{block}.attn_out"] + cache[f"{block}.mlp_out"]
        last = cache[f"{blocks[-1]}.resid_post"]
        yield close(
            "first resid_pre + all attn_out and mlp_out = last resid_post", stack, total, last, summed=True
        )
