"""Checkpoints of vision-language models by name or folder, with their own processor, hooked."""

from __future__ import annotations

from typing import Any

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models.foreign_code import no_foreign_code, refuse_code
from mmhooks.models.load_options import Device, Dtype, take_device, take_dtype
from mmhooks.models.vlm.model import HookedVLM
from mmhooks.models.vlm.parts import LAYOUTS
from mmhooks.utils.faults import first_line

# Options that say where a checkpoint lies: configuration and processor need them too, all others are the model's.
LOCATION_OPTIONS = (
    "revision",
    "cache_dir",
    "local_files_only",
    "token",
    "subfolder",
    "force_download",
    "proxies",
)


def load_vlm(
    source: str, *, device: Device | None = None, dtype: Dtype | None = None, name: str = "", **options: Any
) -> HookedVLM:
    """Any checkpoint of a type that :class:`~mmhooks.models.vlm.model.HookedVLM` knows, in its own floating-point type.

    Args, Raises: those of :func:`~mmhooks.models.vlm.llava.load_llava`.
    """
    weights = take_dtype(dtype, options, default="auto")
    place = take_device(device, options)
    model, processor = _checkpoint(source, weights, options)
    model = (model if place is None else model.to(place)).eval()
    return HookedVLM(model, prepare(processor), name=name or source)


def prepare(processor: Any) -> Any:
    """The processor, padding in front: answers begin where prompts end."""
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _checkpoint(source: str, dtype: Dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    refuse_code(options, source)
    options = options | {"trust_remote_code": False}  # left out, it is asked at a prompt
    where = {k: v for k, v in options.items() if k in (*LOCATION_OPTIONS, "trust_remote_code")}
    try:
        with no_foreign_code(source):
            plan = AutoConfig.from_pretrained(source, **where)
            if plan.model_type not in LAYOUTS:
                raise MMHooksError(
                    f"{source} is a {plan.model_type}; expected a vision-language model of the types {', '.join(LAYOUTS)}"
                )
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options
            )
            model, report = loaded
            processor = AutoProcessor.from_pretrained(source, **where)
    except OSError as error:
        raise MissingWeights(
            f"no checkpoint of a vision-language model at {source!r} ({type(error).__name__}: {first_line(error)}); give a "
            'folder that save_pretrained wrote, a Hub name that can be fetched, or "mini"'
        ) from error
    if missing := sorted(
        report["missing_keys"]
    ):  # transformers fills them with random numbers and only warns
        raise MissingWeights(
            f"{source} lacks {len(missing)} weights of its own configuration, such as {missing[0]}; expected a whole "
            "checkpoint: fetch its missing files again"
        )
    return model, processor
