"""The sum over attention heads is held against the projection's output once, and again when anything changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mmhooks as mm
from mmhooks.errors import MMHooksError
from mmhooks.hooks import projection

from .families import FAMILIES
from .test_weights import lora

FAMILY, SITE = "timm ViT, SigLIP", "image.blocks.*.attn.head_out"


@pytest.fixture
def model() -> mm.HookedCLIP:
    torch.manual_seed(0)
    plain = FAMILIES[FAMILY]().eval()
    lora(plain, FAMILY)
    return mm.HookedCLIP(plain)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that were compared, in order."""
    seen: list[Any] = []
    real = projection._check_sum
    monkeypatch.setattr(projection, "_check_sum", lambda m, *rest: seen.append(m) or real(m, *rest))
    return seen


def look(model: mm.HookedCLIP, n: int = 2) -> torch.Tensor:
    size = model.model.visual.image_size  # type: ignore[union-attr]
    height = size if isinstance(size, int) else size[0]
    pixels = torch.randn(n, 3, height, height, generator=torch.Generator().manual_seed(n))
    with torch.no_grad(), model.caching(SITE) as cache:
        model.encode_image(pixels)
    return cache.stack(SITE)


def proj(model: mm.HookedCLIP) -> Any:
    return model.model.visual.trunk.blocks[0].attn.proj  # type: ignore[union-attr]


def test_once_for_a_module_and_a_shape(model, checks):
    first = look(model)
    assert len(checks) == len(set(checks)) == len(model.model.visual.trunk.blocks)
    assert torch.equal(look(model), first) and len(checks) == len(first)
    look(model, 3)  # other rows
    assert len(checks) == 2 * len(first)
    with model.hooks(fwd_hooks=[(SITE, lambda t, *, hook: t)]):
        look(model)
    assert len(checks) == 2 * len(first)


@pytest.mark.parametrize("change", ["dropout", "hook", "forward", "another layer", "pre-hook"])
def test_what_is_no_longer_linear_is_told(model, checks, change):
    look(model)
    layer = proj(model)
    if change == "dropout":
        layer.lora_dropout["default"] = nn.Dropout(0.5)
        layer.train()
    elif change == "hook":
        layer.base_layer.register_forward_hook(lambda m, args, out: out.relu())
    elif change == "pre-hook":
        layer.lora_A["default"].register_forward_pre_hook(lambda m, args: args[0].abs())
    elif change == "forward":
        layer.base_layer.forward = lambda x: nn.Linear.forward(layer.base_layer, x).square()
    else:
        layer.lora_B["default"] = nn.Sequential(layer.lora_B["default"], nn.Tanh())
    with pytest.raises(MMHooksError, match="add up to the output of this Linear"):
        look(model)


def test_new_weights_need_no_new_look(model, checks):
    look(model)
    n = len(checks)
    with torch.no_grad():
        proj(model).lora_B["default"].weight.mul_(3)
        proj(model).base_layer.weight.add_(0.1)
    parts = look(model)[0]
    assert len(checks) == n
    with torch.no_grad():
        full = proj(model)(torch.eye(parts.shape[-1])) - proj(model)(torch.zeros(1, parts.shape[-1]))
    with torch.no_grad(), model.caching("image.blocks.0.attn.z") as cache:
        model.encode_image(
            torch.randn(
                2, 3, *[model.model.visual.image_size[0]] * 2, generator=torch.Generator().manual_seed(2)
            )
        )
    z = cache["image.blocks.0.attn.z"].flatten(-2)
    torch.testing.assert_close(parts.sum(2), z @ full, atol=1e-4, rtol=1e-4)


def test_zeros_say_nothing(model, checks):
    """An input of zeros agrees with any layer: the next one is compared."""
    layer = proj(model)
    layer.base_layer.register_forward_hook(lambda m, args, out: out + args[0] ** 2)
    with (
        torch.no_grad(),
        model.hooks(mm.Zero(at="image.blocks.0.attn.z"), fwd_hooks=[(SITE, lambda t, *, hook: None)]),
    ):
        model.encode_image(torch.randn(2, 3, *[model.model.visual.image_size[0]] * 2))
    with pytest.raises(MMHooksError, match="add up"):
        look(model)
