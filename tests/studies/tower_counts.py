"""Counts what goes through the towers of the models that a study loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import mmhooks as mm


@contextmanager
def counted_towers() -> Iterator[dict[str, int]]:
    """While open, counts the images and texts that every open_clip model from ``mm.load`` reads."""
    counted, handles, load = {"images": 0, "texts": 0}, [], mm.load

    def loading(*args: Any, **options: Any) -> Any:
        model: Any = load(*args, **options)

        def adding(unit: str) -> Any:
            def hook(module: torch.nn.Module, inputs: Any) -> None:
                counted[unit] += len(inputs[0])

            return hook

        for unit, tower in (("images", model.model.visual), ("texts", model.model.transformer)):
            handles.append(tower.register_forward_pre_hook(adding(unit)))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm, "load", loading)
        try:
            yield counted
        finally:
            for handle in handles:
                handle.remove()
