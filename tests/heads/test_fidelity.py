"""Reconstruction against its definitions, written out in one pass over the whole set."""

from __future__ import annotations

import json

import pytest
import torch

from mmhooks.errors import MMHooksError, NotFinite
from mmhooks.heads import NCL, TopKSAE, reconstruction


def test_equals_the_definitions_whatever_the_batch(pairs) -> None:
    sae = TopKSAE(16, 48, 5)
    with torch.no_grad():
        sae.b_enc[:6] = -9.0
    x = torch.nn.functional.normalize(pairs[0], dim=1)
    f = sae.encode(x).detach()
    back = (f @ sae.W_dec + sae.b_pre).detach()
    counts = (f > 0).sum(dim=0)
    for batch_size in (7, 4096):
        got = reconstruction(sae, pairs[0], batch_size=batch_size, rare_below=9)
        assert got.n == 600
        assert got.fvu == pytest.approx(
            float((x - back).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-5
        )
        assert got.cosine == pytest.approx(float(torch.cosine_similarity(x, back).mean()), rel=1e-5)
        assert got.l0 == pytest.approx(float((f > 0).sum(1).float().mean()), rel=1e-6)
        assert got.dead == pytest.approx(int((counts == 0).sum()) / 48) and got.dead >= 6 / 48
        assert got.rare == pytest.approx(float(((counts > 0) & (counts < 9)).float().mean()))
        assert got.counts == tuple(counts.tolist())
        assert got.head == sae.id


def test_fvu_of_the_mean_is_one_and_of_the_vectors_is_zero() -> None:
    """The denominator is the spread about the mean, summed over the set: neither a mean square nor one."""
    x = torch.randn(300, 4) + 5
    sae = TopKSAE(4, 8, 8, normalize_input=False)
    with torch.no_grad():
        sae.b_pre.copy_(x.mean(dim=0))
        sae.W_dec.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        sae.W_enc.copy_(sae.W_dec)
    assert reconstruction(sae, x).fvu == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        sae.W_dec.zero_()
    assert reconstruction(sae, x).fvu == pytest.approx(1, rel=1e-5)


def test_several_sets_share_their_dead(pairs) -> None:
    sae = TopKSAE(16, 48, 1)
    image, text, both = (
        reconstruction(sae, pairs[0]),
        reconstruction(sae, pairs[1]),
        reconstruction(sae, *pairs),
    )
    assert both.counts == tuple(a + b for a, b in zip(image.counts, text.counts, strict=True))
    assert both.dead <= min(image.dead, text.dead)


def test_without_decoder_and_as_a_file(pairs, tmp_path) -> None:
    result = reconstruction(NCL(16, 48), pairs[0])
    assert result.fvu != result.fvu and result.cosine != result.cosine and result.l0 > 0
    saved = json.loads(result.save(tmp_path / "f.json").read_text())
    assert saved["l0"] == result.l0 and saved["density"] == pytest.approx(result.l0 / 48)
    assert set(result.table()[0]) >= {"fvu", "l0", "dead", "n", "density"}


def test_bad_input(pairs) -> None:
    with pytest.raises(MMHooksError, match="at least 2 vectors, got 1"):
        reconstruction(TopKSAE(16, 48, 5), pairs[0][:1])
    with pytest.raises(NotFinite, match="row 0"):
        reconstruction(TopKSAE(16, 48, 5), torch.full((3, 16), float("nan")))
