"""Reads SAEs of ViT-Prisma: ``config.json`` beside a ``.pt`` file as on the Hub, or a ``.pt`` file of its ``save_model``.

The latter pickles the configuration as an object of its own class: its attributes are read, but no code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, read_json, scaling_of, take_tensors
from mmhooks.heads.formats.located import LEAVES, image_site, located
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
    head = affine.build(kind, where=where, source="ViT-Prisma", options=options, about=about, **config)
    site, missing = _site(cfg)
    tokens = "class" if cfg.get("cls_token_only") else "patch" if cfg.get("use_patches_only") else "all"
    model, size = cfg.get("model_name"), cfg.get("image_size")
    return located(head, site, missing, model=model, image_size=size, tokens=tokens if model else None)


def _site(cfg: dict[str, Any]) -> tuple[str | None, str]:
    """Our name of its hook point; or None, and what to pass.

    Its models are loaded with centred weights, so that nothing writes a mean into the stream, unless they are open_clip's:
    a head that does not take the mean off by itself reads other vectors in the model's own code.
    """
    layer, hook = cfg.get("hook_point_layer"), cfg.get("layer_subtype")
    point = cfg.get("hook_point")
    if (layer is None or hook is None) and isinstance(point, str) and point.count(".") >= 2:
        _, number, hook = point.split(".", 2)
        layer = int(number) if number.lstrip("-").isdigit() else None
    if type(layer) is not int or hook not in LEAVES or cfg.get("hook_point_head_index") is not None:
        said = f"hook_point_layer {layer!r} and layer_subtype {hook!r}"
        return None, f"its configuration has {said}, which has no name here: the sites are in docs/sites.md"
    site = image_site(layer, LEAVES[hook])
    own = str(cfg.get("model_name", "")).startswith("open-clip:")
    if not own and cfg.get("normalize_activations") != "layer_norm" and not hook.startswith("mlp."):
        return None, (
            f"it was trained at {cfg.get('hook_point') or hook} of {cfg.get('model_name')!r}, whose weights ViT-Prisma centres "
            f"when it loads them, and it does not normalise its input: pass at={site!r} if they were loaded without"
        )
    return site, ""


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
