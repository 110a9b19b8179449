"""LLaVA by name: the embedded `mini-vlm`, or any checkpoint of transformers, hooked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmhooks.errors import MMHooksError
from mmhooks.models.load_options import Device, Dtype, plain_dtype, take_device, take_dtype
from mmhooks.models.vlm.checkpoints import load_vlm, prepare
from mmhooks.models.vlm.model import HookedVLM
from mmhooks.utils.assets import ASSETS, asset, check_not_replaced

NAME = "mini-vlm"
MINI_TOKENS = 24  # it says one short sentence at most


def load_llava(
    source: str | Path = "mini",
    *,
    device: Device | None = None,
    dtype: Dtype | None = None,
    **options: Any,
) -> HookedVLM:
    """The embedded `mini-vlm`, or any checkpoint of a vision-language model of transformers by Hub name or folder.

    Args:
        source: ``"mini-vlm"``, ``"mini"`` for short: embedded, no network; else a checkpoint.
        device: where the loaded model is moved, the CPU by default. It is read into the CPU's memory first; not beside
            ``device_map=``.
        dtype: of the weights. Default: the checkpoint's own, as ``"auto"`` of transformers (the type that its
            configuration names, else that of its first weights); the published LLaVA-1.5-7b is fp16: 14 GB, where fp32
            takes 28. `mini-vlm`: fp32. ``torch_dtype=`` is the same option by its older name. Half precision saves memory;
            a CPU without arithmetic of its own for it reads prompts several times slower than in fp32.
        options: of ``from_pretrained`` (``revision``, ``cache_dir``, ``local_files_only``, ``quantization_config``, ...).
            ``device_map={"": "cuda"}`` reads weights straight to where they run, ``device_map="auto"`` spreads them over
            all accelerators, then the CPU, then the disk (needs ``accelerate``); images and prompts go to the device of
            the first weights.

    Raises:
        MissingWeights: no such folder or repository, it cannot be fetched, or the checkpoint lacks weights.
        MMHooksError: a checkpoint of another type, a model that is no longer shipped, or two options contradict each other.

    >>> load_llava().model.config.model_type                                  # doctest: +SKIP
    'llava'
    """
    name = NAME if str(source) == "mini" else str(source)
    check_not_replaced(name)
    if name != NAME:
        return load_vlm(name, device=device, dtype=dtype, **options)
    weights = plain_dtype(take_dtype(dtype, options, default=torch.float32), name)
    place = take_device(device, options)
    if options:
        raise MMHooksError(f"{name} is embedded and takes no {', '.join(options)}")
    model, processor = _mini_vlm()
    model = model.to(place, weights).eval()
    return HookedVLM(model, prepare(processor), name=name, answer_tokens=MINI_TOKENS)


def _mini_vlm() -> tuple[Any, Any]:
    from mmhooks.models.embedded import mini_vlm

    folder = ASSETS / NAME
    for file in mini_vlm.FILES:
        asset(folder / file)
    return mini_vlm.load_from(folder)
