"""The activation function that a CLIP's weights were trained with: open_clip's table knows it by tag, a file seldom does.

OpenAI trained with QuickGELU, ``x * sigmoid(1.702 x)``, and so did some others; open_clip's own configurations say GELU
unless their name ends in ``-quickgelu``. The other function loads without an error and gives other embeddings.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmhooks.errors import MissingWeights, MMHooksError

Activation = Literal["gelu", "quick_gelu"]
# OpenAI's archives carry these numbers beside their weights.
_OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")


def quick_gelu_of(name: str, pretrained: str | None, activation: Activation | None = None) -> bool:
    """Whether the weights ``pretrained`` of the open_clip model ``name`` need QuickGELU.

    What was asked for comes first, then what open_clip's table says of the tag, then the model's configuration.

    Raises:
        MMHooksError: ``activation`` contradicts the tag; or a file of OpenAI's, to be loaded with GELU, which only
            ``activation="gelu"`` may ask for.

    >>> quick_gelu_of("ViT-B-32", "openai"), quick_gelu_of("ViT-B-32", "laion2b_s34b_b79k")
    (True, False)
    """
    import open_clip

    if activation not in (None, "gelu", "quick_gelu"):
        raise MMHooksError(f'activation: expected "gelu" or "quick_gelu", got {activation!r}')
    asked = None if activation is None else activation == "quick_gelu"
    config: dict[str, Any] = open_clip.get_model_config(name) or {}
    configured = bool(config.get("quick_gelu", False))
    tag: dict[str, Any] = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if "quick_gelu" in tag:  # most tags do not say it: they were trained by the configuration
        if asked not in (None, tag["quick_gelu"]):
            raise MMHooksError(
                f"activation: expected that of the tag {pretrained!r}, "
                f"{'quick_gelu' if tag['quick_gelu'] else 'gelu'}, got {activation!r}; leave activation= out"
            )
        return bool(tag["quick_gelu"])
    if asked is not None:
        return asked
    if not configured and pretrained and not tag and is_openai(pretrained):
        raise MMHooksError(
            f"{pretrained}: expected QuickGELU, with which OpenAI trained its weights, got the configuration {name} with "
            f'GELU; load it as "{name}-quickgelu" or with activation="quick_gelu" (activation="gelu" if these '
            "weights are not OpenAI's)"
        )
    return configured


def is_openai(path: str | Path) -> bool:
    """Whether a file is one of OpenAI's: a TorchScript archive, or weights of half precision beside norms in fp32.

    >>> is_openai("nowhere.pt")
    False
    """
    if not Path(path).is_file():
        return False
    if is_torchscript(path):
        return True
    state = _described(Path(path))
    if all(number in state for number in _OPENAI_NUMBERS):
        return True
    types = [getattr(state.get(key), "dtype", None) for key in ("visual.conv1.weight", "ln_final.weight")]
    return types == [torch.float16, torch.float32]


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is an archive of ``torch.jit.save``, which holds code beside weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.split("/")[1:2] == ["code"] for entry in archive.namelist())


def torchscript_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of OpenAI's own archive in fp32, without the numbers beside them.

    Raises:
        MissingWeights: a damaged archive.
    """
    try:
        state = torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError as fault:
        raise MissingWeights(
            f"{path}: expected a TorchScript archive, got a damaged one ({fault})"
        ) from fault
    return {k: v.float() for k, v in state.items() if k not in _OPENAI_NUMBERS}


def _described(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint without their values; empty if it cannot be read so."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            wanted = [k for k in file.keys() if k in ("visual.conv1.weight", "ln_final.weight")]  # noqa: SIM118
            return {k: file.get_tensor(k) for k in wanted}
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # not a checkpoint of torch's: whoever loads it says so
        return {}
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {str(k).removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}
