"""Reads transcoders of SAELens and sparsify without these libraries; checked against SAELens 6.54 and sparsify 1.3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads.base import build_without_weights
from mmhooks.heads.formats.affine import Options, take_tensors
from mmhooks.heads.transcoder import Transcoder
from mmhooks.heads.weights import load_strictly

# SAELens's architecture -> our activation, and whether it has a skip connection.
ARCHITECTURES = {"transcoder": ("relu", False), "skip_transcoder": ("relu", True),
                 "jumprelu_transcoder": ("jumprelu", False), "jumprelu_skip_transcoder": ("jumprelu", True)}  # fmt: skip


def read_saelens(
    cfg: Mapping[str, Any], state: Mapping[str, Tensor], options: Options, where: Path
) -> Transcoder:
    """SAELens stores ``W_enc`` as ``[d_in, d_sae]`` and ``W_skip`` as ``[d_out, d_in]``, and subtracts nothing from the input.

    Raises:
        MMHooksError: an input that SAELens would scale. DamagedFile: tensors that do not fit the configuration.
    """
    activation, skip = ARCHITECTURES[cfg["architecture"]]
    scaled = cfg.get("normalize_activations") or "none"
    if scaled != "none" or cfg.get("apply_b_dec_to_input"):
        raise MMHooksError(
            f"{where}: expected a transcoder that takes vectors as they are, got normalize_activations={scaled!r} and "
            f"apply_b_dec_to_input={cfg.get('apply_b_dec_to_input')!r}, which are not supported"
        )
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    names |= {"W_skip": "W_skip"} if skip else {}
    names |= {"thresholds": "threshold"} if activation == "jumprelu" else {}
    weights = take_tensors(state, names, where)
    weights["W_enc"] = weights["W_enc"].T
    if skip:
        weights["W_skip"] = weights["W_skip"].T
    stated = {"d_in": cfg.get("d_in"), "d_sae": cfg.get("d_sae"), "d_out": cfg.get("d_out")}
    return _build(weights, stated, where, options, "SAELens", cfg, activation=activation)


def read_sparsify(
    cfg: Mapping[str, Any], state: Mapping[str, Tensor], options: Options, where: Path
) -> Transcoder:
    """A sparse coder of sparsify with ``transcode``; its ``W_skip`` is ``[d_out, d_in]``, and nothing is subtracted.

    Raises:
        MMHooksError: missing or unexpected tensors. DamagedFile: tensors that do not fit the configuration.
    """
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    names |= {"W_skip": "W_skip"} if cfg.get("skip_connection") else {}
    weights = take_tensors(state, names, where)
    if "W_skip" in weights:
        weights["W_skip"] = weights["W_skip"].T
    k = options.k or cfg.get("k", 32)  # sparsify's own default
    stated = {"d_in": cfg.get("d_in"), "d_sae": cfg.get("num_latents") or None, "d_out": None}
    return _build(weights, stated, where, options, "sparsify", cfg, k=k)


def _build(
    weights: dict[str, Tensor],
    stated: Mapping[str, Any],
    where: Path,
    options: Options,
    source: str,
    about: Mapping[str, Any],
    **config: Any,
) -> Transcoder:
    if options.normalize_input:
        raise MMHooksError(
            f"{where}: a transcoder takes vectors as their site carries them: expected no normalize_input, got "
            f"{options.normalize_input!r}"
        )
    faults = [
        f"{name} is {list(weights[name].shape)}" for name in ("W_enc", "W_dec") if weights[name].ndim != 2
    ]
    shape = {} if faults else {
        "d_in": weights["W_enc"].shape[1], "d_sae": weights["W_enc"].shape[0], "d_out": weights["W_dec"].shape[1],
    }  # fmt: skip
    faults += [f"{name} = {stated[name]}, the weights have {size}" for name, size in shape.items()
               if stated[name] not in (None, size)]  # fmt: skip
    if faults:
        raise DamagedFile(f"{where} does not fit its configuration: {'; '.join(faults)}; fetch it again")
    config = {"d_in": shape["d_in"], "d_out": shape["d_out"], "n_features": shape["d_sae"]} | config
    config["skip"] = "W_skip" in weights
    head = build_without_weights("transcoder", config, where, name=options.name or "transcoder")
    assert isinstance(head, Transcoder)
    weights["b_pre"] = weights["W_enc"].new_zeros(shape["d_in"])
    load_strictly(head, {k: v.contiguous() for k, v in weights.items()}, str(where))
    head.info = {"from": source, "cfg": dict(about)}
    return head.eval()
