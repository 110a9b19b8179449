"""Where a study's models run, and in which floating-point type: the options ``--device`` and ``--dtype``.

Models and embedders get both, victims the device (a LLaVA has its own type); heads and all statistics stay in fp32, and
what leaves a model is brought to the CPU in fp32.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mmhooks.errors import MMHooksError
from mmhooks.utils.faults import first_line

if TYPE_CHECKING:
    import torch

AUTO = "auto"


@runtime_checkable
class Placed(Protocol):
    """The options of a study that runs models."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Placement:
    """A device that this machine has, and a type that it computes in.

    >>> Placement.of(Options(device="cpu", dtype="bfloat16"))              # doctest: +SKIP
    Placement(device=device(type='cpu'), dtype=torch.bfloat16)
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, options: Placed) -> Placement:
        """Reads ``--device`` ("auto": cuda if there is one, else cpu) and ``--dtype``, and tries both out.

        Raises:
            MMHooksError: a device that this machine lacks, or a type that is none or that it cannot compute in.
        """
        import torch

        name = options.device
        if name == AUTO:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).sum().item()
        except Exception as fault:  # torch raises RuntimeError, AssertionError, NotImplementedError
            raise MMHooksError(
                f"--device: expected a device of this machine, got {options.device!r} ({first_line(fault)}); "
                "give --device cpu, or leave it out"
            ) from fault
        dtype = getattr(torch, options.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise MMHooksError(
                f"--dtype: expected float32, bfloat16 or float16, got {options.dtype!r}; give one of these"
            )
        try:
            _compute(device, dtype)
        except Exception as fault:
            raise MMHooksError(
                f"--dtype: expected a type that {device} computes in, got {options.dtype!r} ({first_line(fault)}); "
                "give --dtype float32"
            ) from fault
        return cls(device, dtype)


def on_device_of(model: Any, head: Any) -> Any:
    """Returns ``head`` where the hooked ``model`` runs, as it must be to be attached: itself, or a copy on that device.

    The copy has the same id, so the groups of features that belong to the head belong to it as well.
    """
    device = next(head.parameters()).device
    return head if device == model.device else deepcopy(head).to(model.device)


def _compute(device: torch.device, dtype: torch.dtype) -> None:
    """Runs what every tower is made of, once, at a size of nothing."""
    import torch
    from torch.nn.functional import conv2d, layer_norm, linear, scaled_dot_product_attention

    x = torch.ones(1, 1, 2, 8, device=device, dtype=dtype)
    out = conv2d(x, torch.ones(8, 1, 2, 2, device=device, dtype=dtype)).flatten(2).transpose(1, 2)
    out = layer_norm(linear(out, torch.ones(8, 8, device=device, dtype=dtype)), (8,))
    scaled_dot_product_attention(out, out, out).sum().item()
