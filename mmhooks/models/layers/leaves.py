"""What kinds of layers are made of: the sites of one module, of an attention before its output projection, of a sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.hooks.attention import SCORES
from mmhooks.hooks.intercept import Intercepted, attention_scores, residual_addends, residual_middle
from mmhooks.hooks.projection import ProjectionByHead, heads_view, linear_map
from mmhooks.hooks.sites import Site, SiteMap, View
from mmhooks.hooks.taps import Tap
from mmhooks.models.placement import device_of, input_dtype

MLP_LAYOUT = "batch token d_mlp"
_LAYOUT = {"pattern": "batch head query key", "head_out": "batch token head d"}


def add_site(sites: SiteMap, name: str, tap: Tap, leaf: str = "", layout: str = "batch token d") -> None:
    """Adds a site with tokens."""
    sites.add(Site(name, tap, leaf, layout=layout))


def add_outputs(sites: SiteMap, prefix: str, modules: Mapping[str, nn.Module | None]) -> None:
    """Adds the outputs of modules, by leaf; None: the layer lacks that place."""
    for leaf, module in modules.items():
        if module is not None:
            add_site(sites, f"{prefix}.{leaf}", sites.output(module))


def add_mlp(sites: SiteMap, prefix: str, first: nn.Module | None, last: nn.Module | None) -> None:
    """``mlp.pre`` and ``mlp.post``: what the first linear layer gives, and what the last one reads."""
    if first is not None:
        add_site(sites, f"{prefix}.mlp.pre", sites.output(first), layout=MLP_LAYOUT)
    if last is not None:
        add_site(sites, f"{prefix}.mlp.post", sites.input(last), layout=MLP_LAYOUT)


def add_middle(sites: SiteMap, prefix: str, block: nn.Module) -> None:
    """``resid_mid``: the first sum of a block that has the block's input as a term."""
    add_site(sites, f"{prefix}.resid_mid", Intercepted(block, ("resid_mid",), residual_middle), "resid_mid")


def add_addends(sites: SiteMap, prefix: str, block: nn.Module) -> None:
    """``attn_out``, ``resid_mid``, ``mlp_out`` of a block that scales what it adds by bare parameters."""
    leaves = ("attn_out", "resid_mid", "mlp_out")
    tap = Intercepted(block, leaves, residual_addends)
    for leaf in leaves:
        add_site(sites, f"{prefix}.{leaf}", tap, leaf)


def add_attention_site(sites: SiteMap, name: str, tap: Tap, leaf: str, view: View | None = None) -> None:
    """``q, k, v, z, head_out``: attention heads in the second to last dimension; ``pattern``: in the second."""
    heads, tokens = (-3, 2) if leaf == "pattern" else (-2, 1)
    sites.add(Site(name, tap, leaf, heads, tokens, _LAYOUT.get(leaf, "batch token head d_head"), view))


def add_projected_attention(
    sites: SiteMap, prefix: str, scope: nn.Module, heads: int, projection: nn.Module, *, fused: bool = True
) -> None:
    """``attn.*`` if the output projection is a module called by ``scope``, running the model's own code.

    Args:
        fused: whether the attention before it can be intercepted; if not, only the projection's sites are added.
    """
    scores = Intercepted(scope, SCORES, attention_scores)
    for leaf in SCORES if fused else ():
        add_attention_site(sites, f"{prefix}.attn.{leaf}", scores, leaf)
    add_attention_site(sites, f"{prefix}.attn.z", sites.input(projection), "", heads_view(heads))
    add_attention_site(sites, f"{prefix}.attn.head_out", ProjectionByHead(projection, heads), "head_out")


def child(module: Any, *names: str) -> nn.Module | None:
    """The first of the named children that ``module`` has."""
    found = (getattr(module, name, None) for name in names)
    return next((one for one in found if isinstance(one, nn.Module)), None)


# -- weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The parts of a pre-norm layer whose weights decompositions read.

    Attributes:
        kind: the class of the layer, for messages.
        heads: attention heads.
        ln_1: the norm in front of the attention.
        out: the attention's output projection, a linear module or ``nn.MultiheadAttention``.
        value: the module whose map gives the values, likewise; None where no module maps to the values alone.
        mlp_out: the MLP's last linear layer.
        attention_scale, mlp_scale: layer scales behind attention and MLP; None without one.
    """

    kind: str
    heads: int
    ln_1: nn.Module
    out: nn.Module
    value: nn.Module | None
    mlp_out: nn.Module | None
    attention_scale: Float[Tensor, " d"] | None = None
    mlp_scale: Float[Tensor, " d"] | None = None


def linear_weights(module: nn.Module) -> tuple[Float[Tensor, "d e"], Float[Tensor, " d"] | None]:
    """Matrix and bias of a linear layer as it runs, whatever it keeps as its weight, in fp32."""
    width: Any = module.in_features
    with torch.no_grad():
        like = torch.zeros(1, width, dtype=input_dtype(module), device=device_of(module))
        weight, bias = linear_map(module, like)
    return weight.detach().float(), None if bias is None else bias.detach().float()


def layer_scale(block: nn.Module, *names: str) -> Float[Tensor, " d"] | None:
    """The first of the named layer scales that a block has: a parameter, or a module around one."""
    for name in names:
        found = getattr(block, name, None)
        for inner in ("gamma", "lambda1"):  # timm's and open_clip's name, transformers'
            found = getattr(found, inner, found)
        if isinstance(found, Tensor):
            return found.detach().float()
    return None
