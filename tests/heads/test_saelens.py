"""SAELens's TopK files, against its public formula written out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.heads import TopKSAE
from mmhooks.heads.saelens import load_saelens, save_saelens


def foreign(path, **change) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (6, 20), "W_dec": (20, 6), "b_enc": (20,), "b_dec": (6,)}
    state = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    path.mkdir()
    save_file(state, path / "sae_weights.safetensors")
    cfg = {"architecture": "topk", "d_in": 6, "d_sae": 20, "k": 3, "apply_b_dec_to_input": True} | change
    (path / "cfg.json").write_text(json.dumps(cfg))
    return state


@pytest.mark.parametrize("shifted", [True, False])
def test_reads_what_saelens_computes(tmp_path, shifted) -> None:
    w = foreign(tmp_path / "s", apply_b_dec_to_input=shifted)
    x = torch.randn(7, 6)
    hidden = ((x - w["b_dec"] if shifted else x) @ w["W_enc"] + w["b_enc"]).relu()
    top = hidden.topk(3, dim=-1)
    f = torch.zeros_like(hidden).scatter(-1, top.indices, top.values)
    sae = load_saelens(tmp_path / "s")
    torch.testing.assert_close(sae.encode(x).detach(), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x).detach(), f @ w["W_dec"] + w["b_dec"], atol=1e-5, rtol=1e-5)
    assert not sae.normalize_input


def test_writes_saelens_names_and_shapes_and_reads_them_back(tmp_path) -> None:
    sae = TopKSAE(6, 20, 3)
    with torch.no_grad():
        sae.b_pre.normal_()
    path = save_saelens(sae, tmp_path / "s")
    shapes = {k: tuple(v.shape) for k, v in load_file(path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (6, 20), "W_dec": (20, 6), "b_enc": (20,), "b_dec": (6,)}
    assert load_saelens(path, normalize_input=True).id == sae.id


def test_refuses_what_it_would_compute_wrongly(tmp_path) -> None:
    for i, (change, match) in enumerate(
        [
            ({"architecture": "jumprelu"}, "'jumprelu' cannot be read"),
            ({"normalize_activations": "layer_norm"}, "scales the input"),
            ({"rescale_acts_by_decoder_norm": True}, "fold_W_dec_norm"),
            ({"d_sae": 21}, r"W_dec is \[20, 6\], not \[21, 6\]"),
        ]
    ):
        foreign(tmp_path / str(i), **change)
        with pytest.raises(MMHooksError, match=match):
            load_saelens(tmp_path / str(i))
    with pytest.raises(MissingWeights, match="sae_weights"):
        load_saelens(tmp_path)
