"""Checkpoints of transformers and timm by name, hooked: ``mm.load("hf:…")`` and ``mm.load("timm:…")``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models.families import hook
from mmhooks.models.foreign_code import no_foreign_code
from mmhooks.models.vlm.checkpoints import load_vlm, prepare
from mmhooks.models.vlm.parts import LAYOUTS
from mmhooks.utils.faults import first_line


def load_transformers(
    source: str,
    *,
    pretrained: str | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    cache_dir: str | Path | None,
) -> Any:
    """A model of transformers with its processor.

    Args:
        source: a folder that ``save_pretrained`` wrote, or a name of the Hub.
        pretrained: a revision of the Hub's repository; "": random weights of the architecture that its ``config.json`` says.
        dtype: of the weights; default: fp32, of a vision-language model the checkpoint's own.

    Raises:
        MissingWeights: no such folder or repository, or it cannot be fetched.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    options: dict[str, Any] = {"trust_remote_code": False, "revision": pretrained or "main"}
    options |= {"cache_dir": str(cache_dir)} if cache_dir else {}
    try:
        with no_foreign_code(source):
            plan = AutoConfig.from_pretrained(source, **options)
            known = plan.model_type in LAYOUTS
            if pretrained == "":
                kind = AutoModelForImageTextToText if known else AutoModel
                model = kind.from_config(plan, dtype=dtype or torch.float32)
            elif known:
                return load_vlm(source, device=device, dtype=dtype, name=f"hf:{source}", **options)
            else:
                model = AutoModel.from_pretrained(source, dtype=dtype or torch.float32, **options)
            processor = _processor(source, options)
            processor = prepare(processor) if known else processor
    except OSError as error:
        raise MissingWeights(
            f"hf:{source}: expected a folder that save_pretrained wrote or a Hub name that can be fetched, got "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return hook(model.to(device).eval(), processor, name=f"hf:{source}")


def _processor(source: str, options: dict[str, Any]) -> Any:
    """The checkpoint's processor, or its image processor where it has no tokenizer."""
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError):
        return AutoImageProcessor.from_pretrained(source, **options)


def load_timm(
    source: str,
    *,
    pretrained: str | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    cache_dir: str | Path | None,
) -> Any:
    """A network of timm with its preprocessing.

    Args:
        source: a name of ``timm.list_models()``, with or without a tag, or timm's ``hf-hub:…`` and ``local-dir:…``.
        pretrained: a checkpoint file; None: the weights that timm knows for this name; "": random ones.

    Raises:
        MMHooksError: no such name; the message names near ones.
        MissingWeights: the weights cannot be fetched.
    """
    from difflib import get_close_matches

    import timm
    from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]

    if ":" not in source and not timm.is_model(source):
        near = get_close_matches(source, timm.list_models(), n=4, cutoff=0.5)
        raise MMHooksError(f"timm has no model {source!r}; close matches: {', '.join(near) or 'none'}")
    weights: dict[str, Any] = (
        {"checkpoint_path": pretrained} if pretrained else {"pretrained": pretrained is None}
    )
    weights |= {"cache_dir": str(cache_dir)} if cache_dir else {}
    try:
        model = timm.create_model(source, **weights)
    except (OSError, RuntimeError) as error:
        raise MissingWeights(
            f"timm:{source}: its weights could not be loaded ({type(error).__name__}: {first_line(error)}); without "
            "network give pretrained= the path of a downloaded checkpoint, or hook a network of your own: "
            "mm.hook(timm.create_model(...))"
        ) from error
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return hook(model.to(device, dtype or torch.float32).eval(), name=f"timm:{source}", preprocess=transform)
