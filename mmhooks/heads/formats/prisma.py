"""ViT-Prisma's SAEs as they lie on the Hub: ``config.json`` beside one ``.pt`` file with the state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmhooks.errors import MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, read_json, read_tensors, scaling_of, take
from mmhooks.heads.sae import SAE

NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_pre": "b_dec"}


def fits(cfg: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is one of its own."""
    return "activation_fn_str" in cfg


def read(path: Path, options: Options) -> SAE:
    """``path`` is the folder, or its ``.pt`` file. ReLU and TopK of the standard architecture.

    Raises:
        MMHooksError: a gated SAE, or another activation.
    """
    folder = path if path.is_dir() else path.parent
    where = path if path.is_file() else weights_of(folder)
    cfg = read_json(folder / "config.json")
    activation = cfg.get("activation_fn_str", "relu")
    k = options.k or (cfg.get("activation_fn_kwargs") or {}).get("k")
    if cfg.get("architecture", "standard") != "standard" or activation not in ("relu", "topk"):
        raise MMHooksError(
            f"{folder / 'config.json'}: read are standard SAEs with relu or topk, came "
            f"{cfg.get('architecture')!r} with {activation!r}"
        )
    payload = read_tensors(where)
    weights = take(payload.get("state_dict", payload), NAMES, where)
    affine = Affine.of(weights | {"W_enc": weights["W_enc"].T}, where)
    affine, options = scaling_of(cfg.get("normalize_activations"), affine, options, folder / "config.json")
    config: dict[str, Any] = {"k": k} if activation == "topk" else {}
    kind = "topk" if activation == "topk" else "relu"
    return affine.build(kind, where=where, source="ViT-Prisma", options=options, about=cfg, **config)


def weights_of(folder: Path) -> Path:
    """The one ``.pt`` file of a folder."""
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        raise MMHooksError(
            f"{folder} holds {len(files)} .pt files ({', '.join(f.name for f in files)}): give the path of one"
        )
    return files[0]
