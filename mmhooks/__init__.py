"""mmhooks: hooked-model mechanistic interpretability for multimodal models.

Public names are imported where they are first used (PEP 562), so that ``import mmhooks`` costs little
more than importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmhooks import errors

__version__ = "0.1.0"

# public name -> module that holds it
_PUBLIC: dict[str, str] = {
    "load": "mmhooks.models.zoo",
    "load_head": "mmhooks.models.zoo",
    "HookedModel": "mmhooks.models.hooked",
    "HookedCLIP": "mmhooks.models.clip",
    "HookedDiffusion": "mmhooks.models.diffusion",
    "load_diffusion": "mmhooks.models.diffusion",
    "reference": "mmhooks.models.references",
    "attention_maps": "mmhooks.analysis.attention_maps",
    "conditioner_mds": "mmhooks.analysis.conditioner",
    "FeatureSet": "mmhooks.hooks.features",
    "ActivationCache": "mmhooks.hooks.cache",
    "StepCache": "mmhooks.hooks.step_cache",
    "Zero": "mmhooks.hooks.edits",
    "Mean": "mmhooks.hooks.edits",
    "Resample": "mmhooks.hooks.edits",
    "Interpolate": "mmhooks.hooks.edits",
    "Steer": "mmhooks.hooks.edits",
    "Clamp": "mmhooks.hooks.edits",
    "Patch": "mmhooks.hooks.edits",
    "TopKSAE": "mmhooks.heads.sae",
    "BatchTopKSAE": "mmhooks.heads.batchtopk",
    "MatryoshkaSAE": "mmhooks.heads.matryoshka",
    "JumpReLUSAE": "mmhooks.heads.jumprelu",
    "ReLUSAE": "mmhooks.heads.relu",
    "NCL": "mmhooks.heads.ncl",
    "train_head": "mmhooks.heads.train",
    "extract": "mmhooks.models.extract",
    "Store": "mmhooks.data.store",
    "fidelity": "mmhooks.analysis.fidelity",
    "measure": "mmhooks.analysis.measure",
    "mds": "mmhooks.analysis.mds",
    "embed_sim": "mmhooks.analysis.interpretability",
    "win_rate": "mmhooks.analysis.interpretability",
    "top_activating": "mmhooks.analysis.top",
    "retrieval": "mmhooks.analysis.retrieval",
    "sweep": "mmhooks.analysis.sweep",
    "monosemanticity": "mmhooks.analysis.monosemanticity",
    "align": "mmhooks.analysis.align",
    "load_llava": "mmhooks.models.llava",
    "decompose": "mmhooks.analysis.decompose",
    "text_span": "mmhooks.analysis.text_span",
    "sparse_text_code": "mmhooks.analysis.splice_text",
}

__all__ = ["__version__", "data", "errors", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "data":
        return import_module("mmhooks.data")
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mmhooks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
