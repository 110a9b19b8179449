"""Transcoders of SAELens and sparsify, and gated SAEs of SAELens, against each library's public formula written out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mmhooks as mm
from mmhooks.errors import DamagedFile, MMHooksError
from mmhooks.heads import Transcoder
from mmhooks.heads.formats import load_saelens

from .test_formats import D, K, N, X, saelens, same, tensors, topk

OUT = 4
CODER = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, OUT), "b_dec": (OUT,)}


def by_saelens(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and output as ``sae_lens.saes.transcoder`` computes them."""
    pre = x @ w["W_enc"] + w["b_enc"]
    f = pre.relu() * (pre > w["threshold"]) if "threshold" in w else pre.relu()
    out = f @ w["W_dec"] + w["b_dec"]
    return f, out + x @ w["W_skip"].T if "W_skip" in w else out


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_saelens_transcoders(tmp_path, architecture) -> None:
    shapes = dict(CODER)
    shapes |= {"W_skip": (OUT, D)} if "skip" in architecture else {}
    shapes |= {"threshold": (N,)} if "jumprelu" in architecture else {}
    cfg = {"d_out": OUT, "apply_b_dec_to_input": False, "normalize_activations": "none"}
    w = saelens(tmp_path / "s", tensors(**shapes), architecture=architecture, **cfg)
    head = mm.load_head(tmp_path / "s")
    assert isinstance(head, Transcoder) and head.skip == ("skip" in architecture)
    same(head, *by_saelens(w, X))
    assert head.info["from"] == "SAELens" and head.d_out == OUT
    values, indices = head.encode_topk(X)
    assert torch.equal(torch.zeros(len(X), N).scatter(1, indices, values), head.encode(X))
    assert mm.load_head(head.save(tmp_path / "ours")).id == head.id
    with pytest.raises(MMHooksError, match="expected an SAE, got a transcoder"):
        load_saelens(tmp_path / "s")
    with pytest.raises(MMHooksError, match="with a k to train"):
        mm.train_head(head, X, torch.randn(len(X), D), progress=False)


@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_transcoders(tmp_path, skip) -> None:
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    w = tensors(**shapes, **({"W_skip": (D, D)} if skip else {}))
    (tmp_path / "s").mkdir()
    save_file(w, tmp_path / "s" / "sae.safetensors")
    cfg = {
        "d_in": D,
        "k": K,
        "activation": "topk",
        "transcode": True,
        "skip_connection": skip,
        "num_latents": N,
    }
    (tmp_path / "s" / "cfg.json").write_text(json.dumps(cfg))
    f = topk(X @ w["encoder.weight"].T + w["encoder.bias"], K)
    head = mm.load_head(tmp_path / "s")
    same(head, f, f @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if skip else 0))
    assert head.kind == "transcoder" and head.info["from"] == "sparsify"


def test_transcoders_that_would_be_computed_wrongly_are_refused(tmp_path) -> None:
    good = {"architecture": "transcoder", "d_out": OUT, "apply_b_dec_to_input": False}
    for i, (change, match) in enumerate(
        (
            ({"normalize_activations": "layer_norm"}, "got normalize_activations='layer_norm'"),
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True"),
            ({"architecture": "skip_transcoder"}, "missing W_skip"),
            ({"architecture": "temporal"}, "jumprelu_transcoder.*got 'temporal'"),
        )
    ):
        saelens(tmp_path / str(i), tensors(**CODER), **(good | change))
        with pytest.raises(MMHooksError, match=match):
            mm.load_head(tmp_path / str(i))
    saelens(tmp_path / "w", tensors(**CODER), **(good | {"d_out": OUT + 1}))
    with pytest.raises(DamagedFile, match="d_out = 5, the weights have 4"):
        mm.load_head(tmp_path / "w")
    saelens(tmp_path / "n", tensors(**CODER), **good)
    with pytest.raises(MMHooksError, match="expected no normalize_input"):
        mm.load_head(tmp_path / "n", normalize_input=True)


@pytest.mark.parametrize("shifted", [True, False])
def test_saelens_gated(tmp_path, shifted) -> None:
    shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_dec": (D,), "b_gate": (N,), "b_mag": (N,), "r_mag": (N,)}
    w = saelens(tmp_path / "s", tensors(**shapes), architecture="gated", apply_b_dec_to_input=shifted)
    x = X - w["b_dec"] * shifted
    f = (x @ w["W_enc"] + w["b_gate"] > 0) * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    same(mm.load_head(tmp_path / "s"), f, f @ w["W_dec"] + w["b_dec"])
    for i, (state, match) in enumerate(
        (
            (tensors(**{k: v for k, v in shapes.items() if k != "b_mag"}), "missing b_mag"),
            (tensors(**shapes) | {"b_enc": torch.zeros(N)}, "unexpected b_enc"),
            (tensors(**shapes) | {"more": torch.zeros(N)}, "unexpected more"),
        )
    ):
        saelens(tmp_path / str(i), state, architecture="gated")
        with pytest.raises(MMHooksError, match=match):
            mm.load_head(tmp_path / str(i))
