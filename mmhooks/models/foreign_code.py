"""Prevents code in checkpoints from being run, whether requested by a file, at a prompt, or by an option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from mmhooks.errors import MMHooksError

_REMEDY = (
    "mmhooks runs no code that comes with weights; read the code, build the model with the library itself "
    "(trust_remote_code=True there), and give the object to mm.HookedCLIP, mm.HookedModel or mm.HookedDiffusion"
)


class CodeRefused(MMHooksError):
    """A checkpoint that requires running its own code."""


def refuse_code(options: Mapping[str, Any], source: object) -> None:
    """Refuses options of ``from_pretrained`` that let a checkpoint bring code.

    Raises:
        CodeRefused: ``trust_remote_code`` or ``custom_pipeline`` is set.

    >>> refuse_code({"revision": "main", "trust_remote_code": False}, "me/model")
    """
    found = [name for name in ("trust_remote_code", "custom_pipeline") if options.get(name)]
    if found:
        raise CodeRefused(f"{source}: expected no {' or '.join(found)}, got {options[found[0]]!r}; {_REMEDY}")


@contextmanager
def no_foreign_code(source: object) -> Iterator[None]:
    """While open, transformers neither prompts for permission to run code nor runs any, whatever the files request.

    open_clip hands on what ``tokenizer_kwargs`` of a checkpoint's own configuration holds, ``trust_remote_code`` included,
    and takes no such argument for text towers: so it is stopped where the code would be loaded.

    Raises:
        CodeRefused: loading would run code of the checkpoint.
    """
    from transformers import dynamic_module_utils as dynamic

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise CodeRefused(f"{source}: expected weights and settings alone, got code to run; {_REMEDY}")

    before = dynamic.TIME_OUT_REMOTE_CODE, dynamic.get_class_in_module
    dynamic.TIME_OUT_REMOTE_CODE, dynamic.get_class_in_module = 0, refuse  # 0: no prompt
    try:
        yield
    except ValueError as fault:  # its own way to say no: with the prompt off, or asked with False
        if isinstance(fault, MMHooksError) or (
            "custom code" not in str(fault) and "Loading this model" not in str(fault)
        ):
            raise
        raise CodeRefused(
            f"{source}: expected weights and settings alone, got code to run; {_REMEDY}"
        ) from fault
    finally:
        dynamic.TIME_OUT_REMOTE_CODE, dynamic.get_class_in_module = before
