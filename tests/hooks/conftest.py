from __future__ import annotations

import pytest
import torch

from mmhooks.heads import NCL, TopKSAE
from mmhooks.models.clip.model import HookedCLIP

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}


def tiny_clip():
    from open_clip import CLIP

    torch.manual_seed(0)
    model = CLIP(embed_dim=12, vision_cfg=dict(VISION), text_cfg=dict(TEXT)).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # open_clip starts some parameters at zero: give every bias a part
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def model() -> HookedCLIP:
    return HookedCLIP(tiny_clip())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts() -> torch.Tensor:
    return torch.randint(1, 31, (3, 6), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def sae() -> TopKSAE:
    head = TopKSAE(12, 32, 4, seed=3)
    with torch.no_grad():
        head.b_pre.normal_(std=0.1)
        head.b_enc.normal_(std=0.1)
    return head


@pytest.fixture
def ncl() -> NCL:
    return NCL(12, 24, seed=4)


def fingerprint(model: torch.nn.Module) -> list[object]:
    """Everything that hooks could leave behind: modules, attributes, hooks, state."""
    seen: list[object] = []
    for path, module in model.named_modules():
        hooks = {k: tuple(v) for k, v in module.__dict__.items() if "hook" in k and hasattr(v, "__len__")}
        attributes = {k: id(v) for k, v in module.__dict__.items() if "hook" not in k}
        seen.append((path, id(module), type(module), tuple(module.__dict__), hooks, attributes))
    seen.append(tuple(model.state_dict()))
    return seen
