"""Widths of sites, inferred from the architecture without running the model.

Linear layers, norms, embeddings and convolutions store their widths. Places without such a module (the ends of a block,
sums) are as wide as places of the same block whose layout ends in the same dimension name: ``batch token d``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmhooks.hooks.parameter_product import ParameterProduct
from mmhooks.hooks.sites import Site, SiteMap
from mmhooks.hooks.taps import ModuleInput, ModuleOutput

# Attributes with the widths of a module's output and input; of a shape, the last entry.
_OUT = ("out_features", "normalized_shape", "embedding_dim", "out_channels")
_IN = ("in_features", "normalized_shape", "in_channels")


def known_widths(sites: SiteMap) -> dict[str, int]:
    """The size of the dimension that heads read, for canonical sites where it is known without a run."""
    found = dict(sites.widths)
    words: dict[tuple[str, str], int] = {}
    for name, site in sites.canonical.items():
        width = found.get(name) or _of_tap(site)
        if width is not None:
            found[name] = width
            words.setdefault(_word(site), width)
    for name, site in sites.canonical.items():
        block, word = _word(site)
        if name not in found and ".blocks." in block and word.startswith("d") and (block, word) in words:
            found[name] = words[block, word]
    return found


def _word(site: Site) -> tuple[str, str]:
    """The block of a site (``image.blocks.3``) and the name of its last dimension."""
    return ".".join(site.name.split(".")[:3]), site.layout.rpartition(" ")[2]


def _of_tap(site: Site) -> int | None:
    tap: Any = site.tap
    if isinstance(tap, ParameterProduct):
        parameter: Tensor = getattr(tap.owner, tap.name)
        return parameter.shape[0 if site.leaf == "in" else 1]
    if site.leaf == "head_out" and hasattr(tap, "heads"):
        return _read(tap.owner, _OUT)
    if site.leaf in ("q", "k", "v", "z"):
        return _read(tap.owner, ("head_dim",))
    width = None
    if isinstance(tap, ModuleOutput):
        width = _read(tap.owner, _OUT)
    elif isinstance(tap, ModuleInput):
        width = _read(tap.owner, _IN)
    heads = getattr(getattr(site.view, "show", None), "heads", None)
    return width if width is None or heads is None else width // heads


def _read(module: Any, names: tuple[str, ...]) -> int | None:
    found = next((value for name in names if (value := getattr(module, name, None)) is not None), None)
    found = found[-1] if isinstance(found, (tuple, list)) else found
    return found if isinstance(found, int) else None
