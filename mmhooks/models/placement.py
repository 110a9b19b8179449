"""The device and floating-point type that a module expects of its inputs.

The first parameter tells neither. Half-precision models keep some parameters in fp32 (open_clip's
``precision="bf16"``: embeddings and norms), and an offloaded model keeps its weights on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

# Modules that meet an input first, and multiply it by weights of its own type.
_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Bilinear)


def input_dtype(module: nn.Module) -> torch.dtype:
    """The type that floating-point inputs of ``module`` must have: that of its first convolution or linear layer.

    >>> input_dtype(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2).half()))
    torch.float16
    """
    layers = (m.weight for m in module.modules() if isinstance(m, _FIRST))
    found = next((t.dtype for t in chain(layers, _tensors(module)) if t.is_floating_point()), None)
    return torch.get_default_dtype() if found is None else found


def device_of(module: nn.Module) -> torch.device:
    """The device that inputs of ``module`` go to.

    Offloaded weights (accelerate) are on the meta device between calls; then it is the device that they are run on.
    """
    first = next((t.device for t in _tensors(module)), torch.device("cpu"))
    if first.type != "meta":
        return first
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    runs_on = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in runs_on if device is not None), first)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Parameters that ``module`` itself owns are where they run, also if accelerate offloaded them.

    Its hook loads them when ``forward`` is called; open_clip's ``encode_text`` uses the root's without that.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
