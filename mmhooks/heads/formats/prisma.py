"""Reads SAEs of ViT-Prisma: ``config.json`` beside a ``.pt`` file as on the Hub, or a ``.pt`` file of its ``save_model``.

The latter pickles the configuration as an object of its own class: its attributes are read, but no code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, read_json, scaling_of, take_tensors
from mmhooks.heads.sae.base import SAE
from mmhooks.utils.tensors import StandIn, read_checkpoint

NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_pre": "b_dec"}
PACKAGE = "vit_prisma."


def fits(cfg: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is one of ViT-Prisma's."""
    return "activation_fn_str" in cfg


def is_whole(payload: dict[str, Any]) -> bool:
    """Whether a checkpoint was written by ``save_model``, with configuration and weights in one file."""
    return {"cfg", "state_dict"} <= payload.keys()


def read(path: Path, options: Options) -> SAE:
    """``path`` is the folder, or its ``.pt`` file. ReLU and TopK of the standard architecture.

    Raises:
        MMHooksError: a gated SAE, a transcoder, or another activation. DamagedFile: invalid contents.
    """
    folder = path if path.is_dir() else path.parent
    where = path if path.is_file() else weights_of(folder)
    payload = read_checkpoint(where, stand_ins=PACKAGE)
    cfg = read_json(folder / "config.json") if (folder / "config.json").is_file() else _config(payload, where)
    activation = cfg.get("activation_fn_str", "relu")
    kwargs = cfg.get("activation_fn_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise DamagedFile(f"{where}: activation_fn_kwargs must be an object, got {kwargs!r}; fetch it again")
    k = options.k or kwargs.get("k", 64)  # ViT-Prisma's default
    standard = cfg.get("architecture", "standard") == "standard" and not cfg.get("is_transcoder", False)
    if not standard or activation not in ("relu", "topk") or kwargs.keys() - {"k"}:
        raise MMHooksError(
            f"{where}: expected a standard SAE with relu or topk, got {cfg.get('architecture')!r} with {activation!r} "
            f"and {kwargs}" + (" (a transcoder)" if cfg.get("is_transcoder") else "")
        )
    state = payload.get("state_dict", payload)
    if state is not payload and (strange := sorted(payload.keys() - {"cfg", "state_dict"})):
        raise DamagedFile(
            f"{where}: unexpected {', '.join(strange)} beside cfg and state_dict; fetch it again"
        )
    weights = take_tensors(state, NAMES, where)
    affine = Affine.of(weights | {"W_enc": weights["W_enc"].T}, where)
    affine, options = scaling_of(cfg.get("normalize_activations"), affine, options, where)
    config: dict[str, Any] = {"k": k} if activation == "topk" else {}
    kind = "topk" if activation == "topk" else "relu"
    about = {k: v for k, v in cfg.items() if isinstance(v, str | int | float | bool | dict | None)}
    return affine.build(kind, where=where, source="ViT-Prisma", options=options, about=about, **config)


def _config(payload: dict[str, Any], where: Path) -> dict[str, Any]:
    """The attributes of a pickled configuration."""
    cfg = payload.get("cfg")
    if not isinstance(cfg, StandIn):
        raise DamagedFile(
            f"{where}: expected config.json beside it, or the configuration that save_model stores in it, got "
            f"{type(cfg).__name__}; fetch config.json too"
        )
    return vars(cfg)


def weights_of(folder: Path) -> Path:
    """The one ``.pt`` file of a folder."""
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        raise MMHooksError(
            f"{folder}: expected one .pt file, got {len(files)} ({', '.join(f.name for f in files)}); give the path of one"
        )
    return files[0]
