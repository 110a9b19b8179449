"""Reads state dicts of dictionary_learning (``ae.pt`` beside ``config.json``) without it; checked against 0.1.

sae-for-vlm (Pach et al. 2025) writes this format, and says where a head belongs in the name of its folder only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, read_json, read_tensors, take_tensors
from mmhooks.heads.formats.located import image_site, located
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.jumprelu import from_log

WEIGHTS = "ae.pt"
FOLDER = re.compile(
    r"_activations_(?P<model>.+)_(?P<layer>-?\d+)_(?P<point>post_mlp_residual|post_projection)"
)
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_pre": "b_dec"}
CLASSES = {"AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
           "MatryoshkaBatchTopKSAE": "batchtopk", "MatroyshkaBatchTopKSAE": "batchtopk",
           "JumpReluAutoEncoder": "jumprelu"}  # fmt: skip


def fits(state: dict[str, Any]) -> bool:
    """Whether the keys are those of one of the library's classes."""
    return set(LINEAR.values()) <= state.keys() or set(PLAIN.values()) | {"threshold"} <= state.keys()


def read(path: Path, options: Options) -> SAE:
    """``path`` is a folder with ``ae.pt``, or the file itself; ``config.json`` beside it names the class.

    Raises:
        MMHooksError: an unsupported class (gated), or a file that may be either TopK or BatchTopK.
    """
    where = path / WEIGHTS if path.is_dir() else path
    beside = where.parent / "config.json"
    cfg = read_json(beside).get("trainer", {}) if beside.is_file() else {}
    state = read_tensors(where)
    kind = _kind(cfg.get("dict_class"), state, options, where)
    k = options.k or int(state.get("k", cfg.get("k", 0)))
    affine, extra = _weights(kind, state, where), {}
    config: dict[str, Any] = {"k": k} if kind in ("topk", "batchtopk") else {}
    if kind == "batchtopk":
        threshold = float(state["threshold"]) if options.threshold is None else options.threshold
        if threshold < 0:
            raise MMHooksError(
                f"{where}: expected a threshold >= 0, got {threshold}: training never set it; pass threshold=, or "
                "kind='topk'"
            )
        extra["threshold"] = torch.tensor(threshold)
    elif kind == "jumprelu":
        extra["threshold_log"] = from_log(state["threshold"].float().clamp_min(0).log())
    head = affine.build(
        kind,
        where=where,
        source="dictionary_learning",
        options=options,
        extra=extra,
        about=cfg or None,
        **config,
    )
    return _located(head, cfg, where)


def _located(head: SAE, cfg: dict[str, Any], where: Path) -> SAE:
    """The site that the folder names: sae-for-vlm leaves it out of its configuration."""
    folders = where.absolute().parts[:-1]
    found = next((found for found in map(FOLDER.search, reversed(folders)) if found), None)
    if found is None:
        named = {
            name: cfg[name]
            for name in ("lm_name", "layer", "submodule_name")
            if cfg.get(name) not in (None, "")
        }
        said = f"its configuration names {named}" if named else (
            "its configuration names no layer; sae-for-vlm's folders do (..._activations_<model>_<layer>_post_mlp_residual_...): "
            "keep them, or pass at='image.blocks.<layer>.resid_post', or 'image.embed' for post_projection"
        )  # fmt: skip
        return located(head, None, said)
    post = found["point"] == "post_projection"
    drawn = any(
        folder.startswith("random_k_") for folder in folders
    )  # its scripts take all tokens there, else the class token
    return located(
        head,
        "image.embed" if post else image_site(int(found["layer"])),
        model=found["model"],
        tokens="pooled" if post else "all" if drawn else None,
    )


def _kind(dict_class: str | None, state: dict[str, Any], options: Options, where: Path) -> str:
    if dict_class is not None and dict_class not in CLASSES:
        raise MMHooksError(
            f"{where}: expected a class among {', '.join(CLASSES)}, got {dict_class!r}, which is not supported"
        )
    if options.kind or dict_class:
        return options.kind or CLASSES[dict_class or ""]
    if "k" not in state:
        return "jumprelu" if "threshold" in state else "relu"
    if "group_sizes" in state:
        return "batchtopk"
    raise MMHooksError(
        f"{where}: TopK and BatchTopK have the same tensors, and there is no config.json beside it that says which; "
        "pass kind='topk' or kind='batchtopk'"
    )


def _weights(kind: str, state: dict[str, Tensor], where: Path) -> Affine:
    bookkeeping = {
        "topk": ("k", "threshold"),
        "batchtopk": ("k", "threshold", "group_sizes"),
        "jumprelu": ("threshold",),
    }
    known = bookkeeping.get(kind, ())
    if "W_enc" in state:
        plain = take_tensors(state, PLAIN, where, ignored=known)
        affine = Affine.of(plain | {"W_enc": plain["W_enc"].T}, where)
        return affine.encoder_unshifted() if kind == "jumprelu" else affine
    bias = next((b for b in ("bias", "b_dec", "decoder.bias") if b in state), "bias")
    linear = take_tensors(state, LINEAR | {"b_pre": bias}, where, ignored=known)
    affine = Affine.of(linear | {"W_dec": linear["W_dec"].T}, where)
    return affine.encoder_unshifted() if bias == "decoder.bias" else affine
