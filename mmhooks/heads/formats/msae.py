"""Reads MSAE checkpoints (Zaigrajew et al. 2025): one ``.pth`` file whose *name* contains the configuration.

``<latents>_<inputs>_<activation>[_<k or weight>][_UW|_RW]_<tied>_<normalize>_<soft cap>_....pth`` with the keys
``model``, ``mean_center``, ``scaling_factor`` and ``target_norm``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmhooks.errors import MMHooksError
from mmhooks.heads.formats.affine import Affine, Options, read_tensors, take_tensors
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.jumprelu import from_log

NAME = re.compile(
    r"(?P<n>\d+)_(?P<d>\d+)_(?P<activation>[A-Za-z]+)(_(?P<number>\d+))?(_(UW|RW|FW))?"
    r"_(?P<tied>True|False)_(?P<normalize>True|False)_(?P<cap>[\d.]+?)(_|\.pth?$|$)"
)
READ = ("ReLU", "TopKReLU", "BatchTopKReLU", "JumpReLU")


def fits(state: dict[str, Any]) -> bool:
    return {"model", "mean_center", "scaling_factor"} <= state.keys()


def read(path: Path, options: Options) -> SAE:
    """Computes what MSAE's ``SAE(path)`` does: the input centred and scaled, ReLU, and TopK only with ``k=``.

    (There, ``forward(x)`` uses all positive latents and ``forward(x, topk=k)`` the ``k`` largest of them.)

    Raises:
        MMHooksError: a name without a configuration, or an unsupported one (soft cap, absolute TopK).
    """
    found = NAME.match(path.name)
    if found is None:
        raise MMHooksError(
            f"expected a file name with MSAE's configuration, e.g. 6144_768_TopKReLU_64_RW_False_False_0.0_....pth, got "
            f"{path.name!r}; keep the name it was published with"
        )
    if found["activation"] not in READ or float(found["cap"]) != 0 or found["normalize"] == "True":
        raise MMHooksError(
            f"{path.name}: expected an activation among {', '.join(READ)} without normalisation and soft cap, "
            f"got {found['activation']}, normalize {found['normalize']}, soft cap {found['cap']}"
        )
    payload = read_tensors(path)
    unexpected = sorted(payload.keys() - {"model", "mean_center", "scaling_factor", "target_norm"})
    if unexpected:
        raise MMHooksError(f"{path}: unexpected {', '.join(unexpected)} beside the model; fetch it again")
    state, mean, scale = payload["model"], payload["mean_center"], payload["scaling_factor"]
    names = {"W_enc": "encoder", "b_enc": "latent_bias", "W_dec": "decoder", "b_pre": "pre_bias"}
    if found["tied"] == "True":
        names.pop("W_dec")
    extra, thresholds = {}, ("activation.log_threshold", "dead_activations.log_threshold")
    learned = thresholds if found["activation"] == "JumpReLU" else ()
    weights = take_tensors(state, names, path, ignored=("latents_activation_frequency", *learned))
    weights["W_enc"] = weights["W_enc"].T
    weights.setdefault("W_dec", weights["W_enc"])
    affine = Affine.of(weights, path).input_scaled(float(scale), mean)
    kind, config = "relu", {}
    if found["activation"] == "JumpReLU":
        kind, extra = "jumprelu", {"threshold_log": from_log(state[thresholds[0]].float())}
    elif options.k is not None:
        kind, config = "topk", {"k": options.k}
    return affine.build(
        kind, where=path, source="MSAE", options=options, extra=extra, about={"file": path.name}, **config
    )
