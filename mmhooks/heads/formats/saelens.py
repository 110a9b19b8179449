"""Reads and writes SAELens's files (``cfg.json``, ``sae_weights.safetensors``) without it; checked against 6.54.

SAELens stores ``W_enc`` as ``[d_in, d_sae]`` and calls our ``b_pre`` ``b_dec``. It stores BatchTopK heads as JumpReLU
with one threshold, and Matryoshka heads as TopK, which they compute at inference; ours keep their kind in ``metadata``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmhooks.errors import DamagedFile, MissingWeights, MMHooksError
from mmhooks.heads.base import Head, build_without_weights
from mmhooks.heads.formats import transcoders
from mmhooks.heads.formats.affine import Affine, Options, read_json, read_tensors, scaling_of, take_tensors
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.jumprelu import JumpReLUSAE, from_log
from mmhooks.heads.transcoder import Transcoder
from mmhooks.heads.weights import load_strictly
from mmhooks.utils.files import atomic_path, make_folder, write_text

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_pre": "b_dec"}
# SAELens's architecture -> our kind. The last two are training checkpoints, which apply a threshold at inference.
ARCHITECTURES = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu",
                 "gated": "gated", "batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk"}  # fmt: skip
VERSION = "6.54.12"  # whose layout is written; without a version SAELens assumes a file from before 6.0
NORMALIZED = {True: "constant_norm_rescale", False: "none", "layer_norm": "layer_norm"}
WRITTEN = {
    "topk": "topk",
    "matryoshka": "topk",
    "relu": "standard",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
}


def load_saelens(
    path: str | Path, *, name: str | None = None, normalize_input: bool | Literal["layer_norm"] | None = None
) -> SAE:
    """The SAE in a directory written by SAELens (``sae.save_model``): topk, standard, jumprelu, batchtopk.

    Its inputs are not normalised, as in SAELens; pass ``normalize_input=True`` if it was trained on vectors of unit
    norm and is to be applied to raw ones. (Files written by :func:`save_saelens` store this.)

    Raises:
        MissingWeights: no such files in ``path``.
        MMHooksError: another architecture, unsupported input scaling, or tensors that do not fit.

    >>> import tempfile
    >>> from mmhooks.heads import TopKSAE
    >>> sae = TopKSAE(8, 32, k=4); folder = save_saelens(sae, tempfile.mkdtemp())
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(load_saelens(folder)(x), sae(x), atol=1e-6)
    True
    """
    head = read(Path(path), Options(name=name, normalize_input=normalize_input))
    if not isinstance(head, SAE):
        raise MMHooksError(f"{path}: expected an SAE, got a transcoder; mmhooks.load_head reads both")
    return head


def read(path: Path, options: Options) -> SAE | Transcoder:
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise MissingWeights(
                f"no SAELens head in {path}: expected {CONFIG} and {WEIGHTS}, but {file} is missing"
            )
    cfg, where = _upgrade_config(read_json(path / CONFIG)), path / WEIGHTS
    _check_types(cfg, path / CONFIG)
    architecture = cfg["architecture"]
    if architecture not in ARCHITECTURES and architecture not in transcoders.ARCHITECTURES:
        raise MMHooksError(
            f"{path / CONFIG}: expected an architecture among {', '.join((*ARCHITECTURES, *transcoders.ARCHITECTURES))}, got "
            f"{architecture!r}, which is not supported"
        )
    state = read_tensors(where)
    if architecture in transcoders.ARCHITECTURES:
        return transcoders.read_saelens(cfg, state, options, where)
    ours = (cfg.get("metadata") or {}).get("mmhooks")
    if isinstance(ours, dict):
        return _read_own(ours, state, options, where, cfg)
    if "scaling_factor" in state and bool((state["scaling_factor"] == 1).all()):
        del state["scaling_factor"]  # from before 6.0, without effect
    if architecture == "gated":
        state = _gate_first(state, where)
    kind, extra, config, state = _activation(ARCHITECTURES[architecture], cfg, state, options, where)
    weights = take_tensors(state, NAMES, where)
    affine = Affine.of(weights | {"W_enc": weights["W_enc"].T}, where)
    if tuple(affine.W_enc.shape) != (cfg.get("d_sae"), cfg.get("d_in")):
        raise MMHooksError(
            f"{where}: {CONFIG} has d_in = {cfg.get('d_in')} and d_sae = {cfg.get('d_sae')}, W_enc is "
            f"{list(weights['W_enc'].shape)}"
        )
    if cfg.get("rescale_acts_by_decoder_norm"):
        affine = affine.row_norms_folded()
    if not cfg.get("apply_b_dec_to_input", True):
        if kind == "gated":  # the magnitudes' bias is shifted by their own weights
            extra["b_mag"] = extra["b_mag"] + extra["r_mag"].exp() * (affine.W_enc @ affine.b_pre)
        affine = affine.encoder_unshifted()
    affine, options = scaling_of(cfg.get("normalize_activations"), affine, options, path / CONFIG)
    return affine.build(
        kind, where=where, source="SAELens", options=options, extra=extra, about=cfg, **config
    )


def _upgrade_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """Converts a configuration from before 6.0 to the current form."""
    cfg = {"architecture": "standard"} | cfg
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk" and cfg["architecture"] == "standard":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k")}
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    return cfg


def _check_types(cfg: dict[str, Any], where: Path) -> None:
    """Checks the types of the fields that determine what is computed."""
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)  # noqa: E731
    expected = {
        "architecture": ("text", lambda v: isinstance(v, str)),
        "d_in": ("a whole number", lambda v: isinstance(v, int)),
        "d_sae": ("a whole number", lambda v: isinstance(v, int)),
        "k": ("a number", lambda v: number(v) and v > 0),
        "apply_b_dec_to_input": ("true or false", lambda v: isinstance(v, bool)),
        "rescale_acts_by_decoder_norm": ("true or false", lambda v: isinstance(v, bool)),
        "normalize_activations": ("text", lambda v: isinstance(v, str)),
        "metadata": ("an object", lambda v: isinstance(v, dict)),
    }
    faults = [f"{name} must be {words}, got {cfg[name]!r}" for name, (words, fits) in expected.items()
              if cfg.get(name) is not None and not fits(cfg[name])]  # fmt: skip
    if faults:
        raise DamagedFile(f"{where} is not a configuration of SAELens: {'; '.join(faults)}; fetch it again")


def _activation(
    kind: str, cfg: dict[str, Any], state: dict[str, Tensor], options: Options, where: Path
) -> tuple[str, dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Our kind, its extra tensors and configuration, and the state without them."""
    state = dict(state)
    if kind == "topk":
        k = options.k or cfg.get("k")
        if k is None:
            raise MMHooksError(f"{where}: expected k in {CONFIG}, got none; pass k=")
        return kind, {}, {"k": int(k)}, state
    if kind == "batchtopk":
        threshold = state.pop("topk_threshold", None)
        if threshold is None:
            raise MMHooksError(f"{where}: missing topk_threshold: without it a BatchTopK SAE cannot be used")
        return kind, {"threshold": threshold}, {"k": max(1, round(cfg.get("k") or 1))}, state
    if kind == "gated":
        return kind, {name: state.pop(name).float() for name in ("r_mag", "b_mag")}, {}, state
    if kind == "jumprelu":
        if "log_threshold" in state:  # training checkpoints from before 6.0
            log_threshold = state.pop("log_threshold").float()
        elif "threshold" in state:
            log_threshold = state.pop("threshold").float().clamp_min(0).log()  # at zero or below: ReLU
        else:
            raise MMHooksError(f"{where}: missing threshold, which a jumprelu SAE needs")
        return kind, {"threshold_log": from_log(log_threshold)}, {}, state
    return kind, {}, {}, state


def _gate_first(state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """A gated SAE's tensors with the gate's bias as ``b_enc``."""
    missing = [name for name in ("b_gate", "r_mag", "b_mag") if name not in state]
    if missing:
        raise MMHooksError(f"{where}: missing {', '.join(missing)}, which a gated SAE needs")
    if "b_enc" in state:
        raise MMHooksError(f"{where}: unexpected b_enc, which a gated SAE has not")
    return {"b_enc" if name == "b_gate" else name: value for name, value in state.items()}


def _read_own(
    ours: dict[str, Any], state: dict[str, Tensor], options: Options, where: Path, cfg: dict[str, Any]
) -> SAE:
    """Reads a file written by :func:`save_saelens`, whose metadata hold our kind and configuration."""
    config = ours.get("config")
    if ours.get("kind") not in WRITTEN or not isinstance(config, dict):
        raise DamagedFile(
            f"{where.with_name(CONFIG)}: expected a kind of {', '.join(WRITTEN)} and its configuration under "
            f"metadata.mmhooks, got {ours.get('kind')!r}; write it again with save_saelens"
        )
    if options.normalize_input is not None:
        config = config | {"normalize_input": options.normalize_input}
    head = build_without_weights(
        ours["kind"], config, where.with_name(CONFIG), name=options.name or ours.get("name")
    )
    assert isinstance(head, SAE)
    state = dict(state)
    threshold = state.pop("threshold", None)
    weights = take_tensors(state, NAMES, where)
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    if cfg.get("normalize_activations") == "constant_norm_rescale":
        root = float(cfg["d_in"]) ** 0.5
        weights |= {
            "W_enc": weights["W_enc"] * root,
            "W_dec": weights["W_dec"] / root,
            "b_pre": weights["b_pre"] / root,
        }
    if ours["kind"] in ("jumprelu", "batchtopk"):
        if threshold is None or threshold.ndim != 1 or not len(threshold):
            raise DamagedFile(f"{where}: missing threshold; write it again with save_saelens")
        key = "threshold_log" if ours["kind"] == "jumprelu" else "threshold"
        weights[key] = from_log(threshold.log()) if key == "threshold_log" else threshold[0].clone()
    elif threshold is not None:
        raise DamagedFile(
            f"{where}: unexpected threshold of a {ours['kind']} head; write it again with save_saelens"
        )
    load_strictly(head, weights, str(where))
    head.info = {"from": "SAELens", "cfg": cfg}
    return head.eval()


def save_saelens(
    head: Head, path: str | Path, *, hook_name: str | None = None, model_name: str | None = None
) -> Path:
    """Writes an SAE in SAELens's format; there ``sae.encode(x)`` and ``sae(x)`` take the same raw vectors.

    Unit-norm input becomes SAELens's ``constant_norm_rescale`` (rows of norm sqrt(d)) with weights scaled to match.

    Args:
        hook_name: the head's site in TransformerLens's naming; default ``head.info["hook_name"]``, or
            ``head.info["site"]``.
        model_name: of the model it belongs to; default ``head.info["model_name"]``, or ``head.info["model"]``.

    Raises:
        MMHooksError: a head without an SAELens architecture (NCL), or a BatchTopK head without a threshold.
        CannotWrite: a full disk, a read-only folder.
    """
    if head.kind not in WRITTEN:
        raise MMHooksError(
            f"expected a head of kind {', '.join(WRITTEN)}, got {head.kind}, for which SAELens has no architecture; "
            "head.save(path) writes it in the format of mmhooks"
        )
    state = {k: v.detach().to("cpu", torch.float32) for k, v in head.state_dict().items()}
    tensors = {theirs: state[ours] for ours, theirs in NAMES.items()}
    if head.normalize_input is True:
        root = head.d_in**0.5
        tensors |= {
            "W_enc": tensors["W_enc"] / root,
            "W_dec": tensors["W_dec"] * root,
            "b_dec": tensors["b_dec"] * root,
        }
    tensors["W_enc"] = tensors["W_enc"].T
    cfg: dict[str, Any] = {"architecture": WRITTEN[head.kind], "d_in": head.d_in, "d_sae": head.n_features}
    if head.kind == "jumprelu":
        assert isinstance(head, JumpReLUSAE)
        tensors["threshold"] = head.threshold.detach().to("cpu", torch.float32)
    elif head.kind == "batchtopk":
        if bool(state["threshold"].isnan()):
            raise MMHooksError(
                f"head {head.name!r} has no inference threshold yet: train or calibrate it first"
            )
        tensors["threshold"] = state["threshold"].expand(head.n_features)
    elif WRITTEN[head.kind] == "topk":
        cfg |= {"k": head.config()["k"], "rescale_acts_by_decoder_norm": False}
    known = {"hook_name": hook_name or head.info.get("hook_name") or head.info.get("site"),
             "model_name": model_name or head.info.get("model_name") or head.info.get("model")}  # fmt: skip
    cfg |= {
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": NORMALIZED[head.normalize_input],
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION}
        | {k: v for k, v in known.items() if isinstance(v, str)}
        | {"mmhooks": {"id": head.id, "kind": head.kind, "name": head.name, "config": head.config()}},
    }
    path = make_folder(path)
    with atomic_path(path / WEIGHTS) as aside:
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside)
    write_text(path / CONFIG, json.dumps(cfg, indent=1) + "\n")
    return path
