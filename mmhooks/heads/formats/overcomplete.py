"""Reads state dicts of overcomplete with a linear encoder, without the library; checked against 0.3.

Such a state dict does not specify the activation of the SAE (TopK, BatchTopK and ReLU have the same tensors, and
BatchTopK's threshold is not among them), so the caller must.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, read_tensors, take_tensors
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.jumprelu import from_log

ROWS = "dictionary._weights"
BATCH_NORM_EPS = 1e-5


def fits(state: dict[str, Any]) -> bool:
    return ROWS in state


def read(path: Path, options: Options) -> SAE:
    """Reads a file with a ``state_dict()``. Dictionary rows are given unit norm, as the library's default layer does.

    Raises:
        MMHooksError: an encoder that is not linear, or an activation that neither file nor caller specifies.
    """
    state = read_tensors(path)
    _check_keys(state, path)
    rows = state[ROWS].float()
    unit = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    W_dec = unit * state.get("dictionary.multiplier", torch.zeros(())).float().exp()
    W_enc, b_enc = _encoder(state, W_dec, path)
    # The library has no pre-bias.
    affine = Affine.of(
        {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_pre": torch.zeros(rows.shape[1])}, path
    )
    build = {"where": path, "source": "overcomplete", "options": options}
    if "thresholds" in state:
        return affine.build(
            "jumprelu", extra={"threshold_log": from_log(state["thresholds"].float())}, **build
        )
    if options.threshold is not None:
        threshold = torch.tensor(float(options.threshold))
        return affine.build("batchtopk", extra={"threshold": threshold}, k=options.k or 1, **build)
    if options.k is not None:
        return affine.build("topk", k=options.k, **build)
    if options.kind == "relu":
        return affine.build("relu", **build)
    raise MMHooksError(
        f"{path}: a state dict of overcomplete does not specify its activation: pass k= (TopKSAE), threshold= "
        "(BatchTopKSAE: its running_threshold, which is not in the file), or kind='relu' (SAE)"
    )


def _check_keys(state: dict[str, Any], path: Path) -> None:
    """Raises unless all keys belong to a linear encoder, a dictionary or thresholds: others would change the results."""
    if "Q" in state:
        raise MMHooksError(f"{path}: a QSAE quantizes its codes (Q), which no head of mmhooks supports")
    if not any(k.startswith("encoder.") for k in state):
        raise MMHooksError(
            f"{path} has no encoder: a matching pursuit (MpSAE, OMPSAE) finds its codes iteratively, which no head of "
            "mmhooks supports"
        )
    known = {ROWS, "dictionary.multiplier", "thresholds"}
    unexpected = sorted(k for k in state if k not in known and not k.startswith("encoder."))
    if unexpected:
        raise MMHooksError(
            f"{path}: expected the state dict of a TopKSAE, BatchTopKSAE, JumpSAE or SAE of overcomplete, got one with "
            f"unexpected {', '.join(unexpected)}"
        )


def _encoder(state: dict[str, Tensor], dictionary: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    own = {k for k in state if k.startswith("encoder.")}
    tied = {k for k in own if k.startswith("encoder.tied_to.")}  # a copy of the dictionary
    for key in tied:
        twin = state.get("dictionary." + key.removeprefix("encoder.tied_to."))
        if twin is None or not torch.equal(state[key], twin):
            raise MMHooksError(
                f"{path}: expected {key} to equal the dictionary that the encoder is tied to, got another"
            )
    own -= tied
    zeros = torch.zeros(len(dictionary))
    if own <= {"encoder.weight", "encoder.bias"}:  # tied to the dictionary where there is no weight
        return state.get("encoder.weight", dictionary).float(), state.get("encoder.bias", zeros).float()
    linear, norm = "encoder.final_block.0.", "encoder.final_block.1."
    if {k for k in own if not k.startswith((linear, norm))}:
        raise MMHooksError(f"{path}: expected an encoder of one linear layer, got {', '.join(sorted(own))}")
    weight, bias = state[linear + "weight"].float(), state[linear + "bias"].float()
    if any(k.startswith(norm) for k in own):
        names = {k: norm + k for k in ("weight", "bias", "running_mean", "running_var")}
        ignored = (norm + "num_batches_tracked",)
        batch = take_tensors({k: state[k] for k in own if k.startswith(norm)}, names, path, ignored=ignored)
        scale = batch["weight"] / (batch["running_var"] + BATCH_NORM_EPS).sqrt()
        weight, bias = weight * scale[:, None], (bias - batch["running_mean"]) * scale + batch["bias"]
    return weight, bias
