"""Where activations come from: weights, transforms and versions, in words and hashes that every process agrees on."""

from __future__ import annotations

import platform
import re
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

VERSIONS = ("mmhooks", "torch", "open_clip_torch", "pyarrow", "pillow")


def weights_hash(module: torch.nn.Module) -> str:
    """Of all parameters and buffers, by name, shape, type and bits."""
    digest = sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:20]


def spelled(what: Any) -> str | None:
    """A transform in words that are the same in every process."""
    if what is None:
        return None
    name = getattr(what, "__qualname__", None)
    if name is not None:
        return f"{what.__module__}.{name}"
    said = repr(what) if type(what).__repr__ is not object.__repr__ else type(what).__qualname__
    return re.sub(r" at 0x[0-9a-f]+", "", said)


def versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS} | {"python": platform.python_version()}
