"""Views of a tower's tensors: patches of a convolution as tokens, and one token of a sequence."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mmhooks.hooks.sites import View


def _as_tokens(raw: Tensor) -> Tensor:
    return rearrange(raw, "b d h w -> b (h w) d")


def _as_map(raw: Tensor, new: Tensor) -> Tensor:
    return rearrange(new, "b (h w) d -> b d h w", h=raw.shape[2])


def _first(raw: Tensor) -> Tensor:
    return raw[:, 0]


def _with_first(raw: Tensor, new: Tensor) -> Tensor:
    return torch.cat([new[:, None], raw[:, 1:]], 1)


PATCHES = View(_as_tokens, _as_map)  # [b d h w] as [b patch d]
SIGLIP_END = 1  # of texts: </s> of SigLIP, <eos> of SigLIP 2
FIRST_TOKEN = View(_first, _with_first)  # [b t d] as [b d]
