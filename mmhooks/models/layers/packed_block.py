"""The block of Qwen-VL's image towers, through which the patches of all images run as one sequence without a batch.

Each image, or each window of one, is a call of the kernel of its own, so there is no one ``q``, ``k``, ``v`` or ``pattern``:
these sites are absent.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmhooks.hooks.intercept import Intercepted, residual_middle
from mmhooks.hooks.projection import ProjectionByHead, heads_view
from mmhooks.hooks.sites import Site, SiteMap, View
from mmhooks.hooks.taps import Tap
from mmhooks.models.layers.leaves import child


def is_packed_block(block: Any) -> bool:
    """Whether a block is of this kind."""
    attn = child(block, "attn")
    return (
        child(block, "norm1") is not None
        and child(attn, "qkv") is not None
        and child(attn, "proj") is not None
    )


def add_packed_block(sites: SiteMap, prefix: str, block: Any) -> None:
    """Its sites, with patches first: ``[patch d]``; of attention ``z`` and ``head_out``."""
    attn, mlp, heads = block.attn, block.mlp, block.attn.num_heads
    add_packed(sites, f"{prefix}.resid_pre", sites.input(block, "hidden_states"))
    add_packed(sites, f"{prefix}.ln_1", sites.output(block.norm1))
    view = heads_view(heads)
    add_packed(
        sites, f"{prefix}.attn.z", sites.input(attn.proj), layout="patch head d_head", axis=-2, view=view
    )
    by_head = ProjectionByHead(attn.proj, heads)
    add_packed(sites, f"{prefix}.attn.head_out", by_head, "head_out", layout="patch head d", axis=-2)
    add_packed(sites, f"{prefix}.attn_out", sites.output(attn))
    middle = Intercepted(block, ("resid_mid",), residual_middle)
    add_packed(sites, f"{prefix}.resid_mid", middle, "resid_mid")
    add_packed(sites, f"{prefix}.ln_2", sites.output(block.norm2))
    first, last = child(mlp, "fc1", "up_proj", "linear_fc1"), child(mlp, "fc2", "down_proj", "linear_fc2")
    inner: dict[str, tuple[nn.Module | None, bool]] = {
        "gate": (child(mlp, "gate_proj"), False),
        "pre": (first, False),
        "post": (last, True),
    }
    for leaf, (module, reads) in inner.items():
        if module is not None:
            tap = sites.input(module) if reads else sites.output(module)
            add_packed(sites, f"{prefix}.mlp.{leaf}", tap, layout="patch d_mlp")
    add_packed(sites, f"{prefix}.mlp_out", sites.output(mlp))
    add_packed(sites, f"{prefix}.resid_post", sites.output(block, first=True))


def add_packed(
    sites: SiteMap,
    name: str,
    tap: Tap,
    leaf: str = "",
    *,
    layout: str = "patch d",
    axis: int = -1,
    view: View | None = None,
) -> None:
    """Adds a site whose first dimension is the patches of all images."""
    sites.add(Site(name, tap, leaf, axis, tokens=0, layout=layout, view=view))
