"""The gated SAE against its equations, and what its losses may and may not train."""

from __future__ import annotations

import pytest
import torch

from mmhooks.heads import GatedSAE, reconstruction, train_head
from mmhooks.heads.training.resample import resample
from mmhooks.heads.training.sae_objective import SAEObjective

from .conftest import paired_clouds


def shaken() -> GatedSAE:
    head, g = GatedSAE(16, 48, normalize_input=False, seed=1), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (head.b_pre, head.b_enc, head.b_mag, head.r_mag):
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return head


def test_features_by_hand() -> None:
    head, x = shaken(), paired_clouds(20)[0]
    f = head.encode(x)
    for row in range(20):
        for i in range(48):
            z = float(((x[row] - head.b_pre) @ head.W_enc[i]).detach())
            gate, scale, bias = (float(p[i].detach()) for p in (head.b_enc, head.r_mag.exp(), head.b_mag))
            want = max(scale * z + bias, 0.0) if z + gate > 0 else 0.0
            assert float(f[row, i]) == pytest.approx(want, abs=1e-4)
    assert bool(((head.pre(x) > 0) & (f == 0)).any())  # the two paths disagree somewhere
    assert torch.equal(head.activate(head.pre(x)), f)


def test_the_loss_is_the_papers_and_reaches_what_it_should() -> None:
    head, x = shaken(), paired_clouds(50)[0]
    objective = SAEObjective(penalty=0.2)
    objective.measure(x, None)
    loss = objective.loss(head, x, None, torch.zeros(48, dtype=torch.bool)).loss
    gate = head.pre(x).relu()
    spread = float((x - x.mean(0)).square().sum()) / 50
    recon = (x - head(x)).square().sum() / 50 / spread
    own = (x - (gate @ head.W_dec + head.b_pre)).square().sum() / 50 / spread
    l1 = (gate * head.W_dec.norm(dim=1)).sum() / 50 / spread**0.5
    torch.testing.assert_close(loss, recon + own + 0.2 * l1, rtol=1e-4, atol=1e-5)
    # The gate's own reconstruction and the penalty do not train the decoder, nor the magnitudes.
    got = torch.autograd.grad(loss, [head.W_dec, head.b_pre, head.r_mag, head.b_mag, head.b_enc])
    want = torch.autograd.grad(
        (x - head(x)).square().sum() / 50 / spread, [head.W_dec, head.r_mag, head.b_mag]
    )
    for a, b in zip((got[0], got[2], got[3]), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert bool(got[4].any())  # the gate learns, although the reconstruction has no gradient for it


def test_training_reconstructs_and_the_penalty_makes_it_sparse() -> None:
    pairs, valid = paired_clouds(600), paired_clouds(200, seed=1)
    found = []
    for penalty in (0.1, 0.5):
        head = GatedSAE(16, 48)
        options = SAEObjective(penalty=penalty)
        result = train_head(
            head, *pairs, epochs=30, batch_size=100, valid=valid, objective=options, progress=False
        )
        assert result.history[-1]["valid_score"] < 0.5 * result.history[2]["valid_score"]
        found.append(reconstruction(head, *valid))
    assert found[0].fvu < found[1].fvu and found[0].l0 > found[1].l0 + 2


def test_resampling_resets_both_paths() -> None:
    head, x = shaken(), paired_clouds(50)[0]
    adam = torch.optim.Adam(head.parameters())
    dead = torch.zeros(48, dtype=torch.bool)
    dead[5] = True
    assert resample(head, adam, dead, x, torch.ones(50), torch.Generator().manual_seed(0)) == 1
    assert float(head.r_mag[5]) == float(head.b_mag[5]) == float(head.b_enc[5]) == 0.0
    assert float(head.r_mag[4]) != 0.0
