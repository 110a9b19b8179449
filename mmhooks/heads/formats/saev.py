"""Reads saev's checkpoints (a JSON header line, then a torch checkpoint) without it; checked against schema 5.

Until schema 1 its encoder subtracted ``b_dec`` from the input, since then it does not; each file is read as computed by
the code that wrote it. BatchTopK was a per-row TopK until its threshold was added to the state dict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, read_json, take_tensors
from mmhooks.heads.formats.located import image_site, located
from mmhooks.heads.sae.base import SAE
from mmhooks.utils.tensors import is_headed, read_headed_checkpoint

NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_pre": "b_dec"}
THRESHOLD = "activation.threshold"
LATEST = 5


def fits(path: Path) -> bool:
    """Whether a file is one of saev's: a ``.pt`` that starts with a JSON header."""
    return path.suffix == ".pt" and is_headed(path)


def read(path: Path, options: Options) -> SAE:
    """:func:`read_weights`, with the layer that ``config.json`` beside the file names, as saev's training writes it."""
    head = read_weights(path, options)
    beside = path.parent / "config.json"
    run = read_json(beside) if beside.is_file() else {}
    data = run.get("train_data") or run.get("data") or {}
    shards = path.parent.parent / "links" / "train-shards" / "metadata.json"
    model = read_json(shards) if shards.is_file() else {}
    site, missing = _site(data, beside)
    patches = data.get("tokens", data.get("patches"))
    kinds = {"content": "patch", "patches": "patch", "special": "class", "cls": "class", "all": "all"}
    tokens = kinds.get(str(patches))
    name = f"{model['family']}/{model['ckpt']}" if {"family", "ckpt"} <= model.keys() else None
    return located(
        head,
        site,
        missing,
        model=name,
        tokens=tokens,
        patches_per_image=model.get("content_tokens_per_example"),
    )


def _site(data: dict[str, Any], beside: Path) -> tuple[str | None, str]:
    """The site of its layer; or None, and what to pass."""
    layer = data.get("layer")
    if type(layer) is not int:
        found = f"names layer {layer!r}" if data else "is not there"
        return None, (
            "saev's checkpoints name no layer; the config.json that its training writes beside them does, but "
            f"{beside} {found}: fetch it too, or pass at='image.blocks.<layer>.resid_post'"
        )
    scaled = [name for name in ("scale_mean", "scale_norm") if data.get(name)]
    if scaled:
        return None, (
            f"it was trained on vectors of layer {layer} with {' and '.join(scaled)}, whose statistics are not in its files: "
            f"pass at={image_site(layer)!r} after folding them into the weights"
        )
    return image_site(layer), ""


def read_weights(path: Path, options: Options) -> SAE:
    """A ReLU, TopK or BatchTopK SAE. (There, a TopK feature may be negative where fewer than k are positive.)

    Raises:
        MMHooksError: a later schema, or another activation. DamagedFile: contents that contradict the header.
    """
    header, state = read_headed_checkpoint(path)
    schema = header.get("schema", 0)
    if type(schema) is not int or not 0 <= schema <= LATEST:
        raise MMHooksError(f"{path}: expected a schema of saev up to {LATEST}, got {schema!r}")
    cfg = header.get("cfg", {}) if schema else header
    if not isinstance(cfg, dict):
        raise DamagedFile(f"{path}: expected saev's configuration under 'cfg', got {cfg!r}; fetch it again")
    activation, k = _activation(header, cfg, path)
    threshold = state.pop(THRESHOLD, None)
    weights = take_tensors(state, NAMES, path)
    affine = Affine.of(weights | {"W_enc": weights["W_enc"].T}, path)
    width = cfg.get("d_model", cfg.get("d_vit"))
    if width is not None and width != affine.W_enc.shape[1]:
        raise DamagedFile(
            f"{path}: its header says width {width}, W_enc has {affine.W_enc.shape[1]}; fetch it again"
        )
    if schema >= 2:
        affine = affine.encoder_unshifted()
    build: dict[str, Any] = {"where": path, "source": "saev", "options": options, "about": header}
    if threshold is not None and activation != "BatchTopK":
        raise MMHooksError(f"{path}: unexpected {THRESHOLD} of a {activation} SAE")
    if activation == "Relu":
        return affine.build("relu", **build)
    k = options.k or k
    if threshold is None:  # TopK, and BatchTopK before it had a threshold
        return affine.build("topk", k=k, **build)
    extra = {"threshold": torch.as_tensor(threshold).float().clamp_min(0)}
    return affine.build("batchtopk", extra=extra, k=k, **build)


def _activation(header: dict[str, Any], cfg: dict[str, Any], path: Path) -> tuple[str, int]:
    """The activation and k. Schema 1 stores it beside or inside the configuration; earlier files are ReLU."""
    said = cfg.get("activation")
    if said is None:
        old = header.get("cls", "Relu") if "schema" in header else "Relu"
        said = {"cls": "Relu" if old == "SparseAutoencoderConfig" else old, "params": cfg}
    name = said.get("cls") if isinstance(said, dict) else said
    if name not in ("Relu", "TopK", "BatchTopK"):
        raise MMHooksError(
            f"{path}: expected an activation of saev among Relu, TopK, BatchTopK, got {name!r}, which is not supported"
        )
    return name, (said.get("params") or {}).get("top_k", 32)
