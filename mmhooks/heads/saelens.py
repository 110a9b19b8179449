"""SAELens's files for TopK SAEs: ``cfg.json`` and ``sae_weights.safetensors``, read and written without it.

SAELens keeps ``W_enc`` as ``[d_in, d_sae]`` and calls our ``b_pre`` ``b_dec``; it subtracts it from the input
only where ``apply_b_dec_to_input`` is true, and so do we: otherwise the shift goes into ``b_enc``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.heads.base import load_strictly
from mmhooks.heads.sae import TopKSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def load_saelens(path: str | Path, *, name: str = "sae", normalize_input: bool = False) -> TopKSAE:
    """The TopK SAE in a directory written by SAELens (``sae.save_model``).

    Its inputs are taken as they come, as SAELens does; pass ``normalize_input=True`` if it was trained on
    vectors of unit norm and should get them from raw ones.

    Raises:
        MissingWeights: no such files in ``path``.
        MMHooksError: another architecture, input scaling that we do not apply, or tensors that do not fit.

    >>> import tempfile
    >>> sae = TopKSAE(8, 32, k=4); folder = save_saelens(sae, tempfile.mkdtemp())
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(load_saelens(folder)(x), sae(x), atol=1e-6)
    True
    """
    path = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise MissingWeights(
                f"no SAELens head in {path}: expected {CONFIG} and {WEIGHTS}, {file} is not there"
            )
    cfg: dict[str, Any] = json.loads((path / CONFIG).read_text())
    if cfg.get("architecture") != "topk":
        raise MMHooksError(
            f"{path / CONFIG}: architecture {cfg.get('architecture')!r} cannot be read yet, only 'topk'"
        )
    if cfg.get("normalize_activations", "none") != "none":
        raise MMHooksError(
            f"{path / CONFIG}: normalize_activations={cfg['normalize_activations']!r} scales the input; "
            "fold the scale into the weights with SAELens first (sae.fold_activation_norm_scaling_factor)"
        )
    if cfg.get("rescale_acts_by_decoder_norm"):
        raise MMHooksError(
            f"{path / CONFIG}: rescale_acts_by_decoder_norm selects by other values than ours; "
            "fold the norms with SAELens first (sae.fold_W_dec_norm)"
        )
    state = {k: v.float() for k, v in load_file(path / WEIGHTS).items()}
    where = str(path / WEIGHTS)
    if "W_enc" not in state or "b_dec" not in state:
        raise MMHooksError(f"{where}: expected W_enc, W_dec, b_enc, b_dec, came {', '.join(sorted(state))}")
    state["W_enc"] = state["W_enc"].T.contiguous()
    state["b_pre"] = state.pop("b_dec")
    sae = TopKSAE(cfg["d_in"], cfg["d_sae"], cfg["k"], name=name, normalize_input=normalize_input)
    load_strictly(sae, state, where)
    if not cfg.get("apply_b_dec_to_input", True):
        with torch.no_grad():
            sae.b_enc.add_(sae.W_enc @ sae.b_pre)
    sae.info = {"from": "SAELens", "cfg": cfg}
    return sae.eval()


def save_saelens(sae: TopKSAE, path: str | Path) -> Path:
    """Writes ``sae`` as SAELens writes its own; unit norm of the input stays the caller's task there."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", torch.float32) for k, v in sae.state_dict().items()}
    state["W_enc"] = state["W_enc"].T
    state["b_dec"] = state.pop("b_pre")
    save_file({k: v.contiguous() for k, v in state.items()}, path / WEIGHTS)
    cfg = {
        "architecture": "topk",
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"mmhooks_id": sae.id, "normalize_input": sae.normalize_input},
    }
    (path / CONFIG).write_text(json.dumps(cfg, indent=1) + "\n")
    return path
