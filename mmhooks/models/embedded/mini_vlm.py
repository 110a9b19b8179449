"""`mini-vlm`: transformers' own LLaVA, tower included, that answers questions about composed pictures.

The pictures and questions it was trained on are :mod:`mmhooks.data.synthetic.scenes` and ``questions``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmhooks.errors import MMHooksError
from mmhooks.models.embedded import mini, mini_llava
from mmhooks.utils.tensors import read_safetensors

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


def load_from(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model and its processor from a folder that ``embedded.vlm.ship`` wrote, in fp32.

    Raises:
        MMHooksError: a file is missing, or the weights are not those of the configuration.
    """
    from transformers import LlavaConfig

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise MMHooksError(f"expected {', '.join(FILES)} in {folder}, got no {', '.join(missing)}")
    untrained = mini.build(reads=True).visual  # gives the tower its reading stem
    model = mini_llava.build(LlavaConfig.from_pretrained(folder), untrained)
    state = {k: v.float() for k, v in read_safetensors(folder / "model.safetensors").items()}
    absent, strange = model.load_state_dict(state, strict=False)
    absent = [k for k in absent if k != "lm_head.weight"]  # the token table
    if absent or strange:
        raise MMHooksError(
            f"{folder}: expected the weights of its config.json, got missing {absent}, strange {strange}"
        )
    model.tie_weights()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return model.eval(), mini_llava.processor(folder)
