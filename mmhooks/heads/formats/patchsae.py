"""Reads checkpoints of PatchSAE (``cfg`` and ``state_dict`` in one ``.pt`` file) without its code.

The configuration is a pickled object of its own class, or a dictionary: attributes are read, no code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, take_tensors
from mmhooks.heads.formats.located import image_site, located
from mmhooks.heads.sae.base import SAE
from mmhooks.utils.tensors import StandIn, read_checkpoint

NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_pre": "b_dec"}
PACKAGES = ("src.sae_training.", "sae_training.")


def fits(payload: dict[str, Any]) -> bool:
    """Whether a checkpoint is PatchSAE's, told by the layer that its configuration names."""
    return "state_dict" in payload and "block_layer" in _config(payload)


def read(path: Path, options: Options) -> SAE:
    """A ReLU SAE on the residual stream behind a block of CLIP's image tower (transformers' numbering).

    Raises:
        MMHooksError: a gated SAE, or another module than ``resid``. DamagedFile: contents that contradict the configuration.
    """
    payload = read_checkpoint(path, stand_ins=PACKAGES)
    cfg = _config(payload)
    if cfg.get("gated_sae") or cfg.get("module_name", "resid") != "resid":
        raise MMHooksError(
            f"{path}: expected a ReLU SAE of PatchSAE on 'resid', got gated_sae={cfg.get('gated_sae')!r} on "
            f"{cfg.get('module_name')!r}, which is not supported"
        )
    layer = cfg["block_layer"]
    if type(layer) is not int:
        raise DamagedFile(f"{path}: block_layer must be a whole number, got {layer!r}; fetch it again")
    weights = take_tensors(payload["state_dict"], NAMES, path)
    affine = Affine.of(weights | {"W_enc": weights["W_enc"].T}, path)
    if cfg.get("d_in") not in (None, affine.W_enc.shape[1]):
        raise DamagedFile(
            f"{path}: its configuration says width {cfg['d_in']}, W_enc has {affine.W_enc.shape[1]}; fetch it again"
        )
    about = {k: v for k, v in cfg.items() if isinstance(v, str | int | float | bool | None)}
    head = affine.build("relu", where=path, source="PatchSAE", options=options, about=about)
    return located(
        head,
        image_site(layer),
        model=cfg.get("model_name"),
        image_size=cfg.get("image_width"),
        tokens="class" if cfg.get("class_token") else "all",
    )


def _config(payload: dict[str, Any]) -> dict[str, Any]:
    cfg = payload.get("cfg", payload.get("config"))
    return vars(cfg) if isinstance(cfg, StandIn) else cfg if isinstance(cfg, dict) else {}
