"""Options of loaders: dtype and device, each given once and never overridden by our defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmhooks.errors import MMHooksError

Dtype = torch.dtype | str | Mapping[str, Any]
Device = str | torch.device


def take_dtype(dtype: Dtype | None, options: dict[str, Any], default: Dtype = torch.float32) -> Dtype:
    """The type of the weights that was asked for as ``dtype=`` or as ``torch_dtype=``, ``default`` where neither was given.

    ``torch_dtype`` is transformers' and diffusers' older name; it is taken out of ``options``.

    Args:
        dtype: a torch type, its name, or what the library beneath knows: ``"auto"``, a mapping by part.
        options: of ``from_pretrained``.

    Raises:
        MMHooksError: two names that ask for different types, or no type of floating-point numbers.

    >>> options = {"torch_dtype": "float16", "revision": "main"}
    >>> take_dtype(None, options), options
    (torch.float16, {'revision': 'main'})
    """
    older = options.pop("torch_dtype", None)
    named = [_dtype(given) for given in (dtype, older) if given is not None]
    if len(named) == 2 and named[0] != named[1]:
        raise MMHooksError(
            f"expected one type of weights, got dtype={named[0]} and torch_dtype={named[1]}, which name the same "
            "option; give dtype= alone"
        )
    return named[0] if named else default


def plain_dtype(dtype: Dtype, what: str) -> torch.dtype:
    """``dtype`` where only one torch type for all weights will do.

    Raises:
        MMHooksError: ``"auto"`` or a mapping; ``what`` names whose weights they are.
    """
    if not isinstance(dtype, torch.dtype):
        raise MMHooksError(
            f"{what}: expected one torch dtype for all weights, got {dtype!r}; give torch.float16, say"
        )
    return dtype


def take_device(device: Device | None, options: Mapping[str, Any]) -> Device | None:
    """Where the loaded model moves to, the CPU by default; None: nowhere, ``device_map=`` placed it.

    Raises:
        MMHooksError: both ``device=`` and ``device_map=``.

    >>> take_device(None, {}), take_device(None, {"device_map": "auto"})
    ('cpu', None)
    """
    if options.get("device_map") is None:
        return "cpu" if device is None else device
    if device is not None:
        raise MMHooksError(
            f"expected device= or device_map=, got device={str(device)!r} and device_map={options['device_map']!r}: "
            "moving the model would undo the map; leave device= out"
        )
    return None


def _dtype(given: Any) -> Dtype:
    if isinstance(given, Mapping) or given == "auto":
        return given
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise MMHooksError(
            f"dtype: expected a torch type of floating-point numbers or its name, got {given!r}; "
            "torch.float32, torch.bfloat16 and torch.float16 are usual"
        )
    return found
