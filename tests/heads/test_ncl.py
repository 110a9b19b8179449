"""The contrastive head against formulas written out."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from mmhooks.errors import MMHooksError
from mmhooks.heads import NCL, load_head_dir, reconstruction, train_head
from mmhooks.heads.linalg import effective_rank
from mmhooks.heads.training.ncl_objective import NCLObjective, info_nce, rep_relu


def test_forward_is_the_papers_mlp() -> None:
    ncl = NCL(6, 10, hidden=7, normalize_input=False)
    with torch.no_grad():
        ncl.b1.uniform_(-0.5, 0.5)
        ncl.b2.uniform_(-0.5, 0.5)
    x = torch.randn(6)
    out = ncl.encode(x).detach()
    ncl.requires_grad_(False)
    hidden = [max(0.0, float(w @ x + b)) for w, b in zip(ncl.W1, ncl.b1, strict=True)]
    expected = [
        max(0.0, sum(float(v) * h for v, h in zip(w, hidden, strict=True)) + float(b))
        for w, b in zip(ncl.W2, ncl.b2, strict=True)
    ]
    torch.testing.assert_close(out, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_info_nce_is_symmetric_with_the_positive_in_the_denominator() -> None:
    a, b, tau = torch.rand(5, 4), torch.rand(5, 4), 0.3

    def one_way(x: torch.Tensor, y: torch.Tensor) -> float:
        terms = []
        for i in range(5):
            scores = [math.exp(float(x[i] @ y[j]) / tau) for j in range(5)]
            terms.append(-math.log(scores[i] / sum(scores)))
        return sum(terms) / 5

    expected = (one_way(a, b) + one_way(b, a)) / 2
    assert float(info_nce(a, b, tau)) == pytest.approx(expected, rel=1e-5)
    assert float(info_nce(b, a, tau)) == pytest.approx(expected, rel=1e-5)
    assert float(info_nce(a, b, tau)) > 0  # without the positive it could fall below zero


def test_rep_relu_is_relu_forward_and_gelu_backward() -> None:
    z = torch.linspace(-3, 3, 31, requires_grad=True)
    torch.testing.assert_close(rep_relu(z), z.relu())
    (grad,) = torch.autograd.grad(rep_relu(z).sum(), z)
    phi = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    cdf = (1 + torch.erf(z / math.sqrt(2))) / 2
    torch.testing.assert_close(grad, (cdf + z * phi).detach(), atol=1e-5, rtol=1e-5)


def test_effective_rank_counts_equal_directions() -> None:
    q, _ = torch.linalg.qr(torch.randn(50, 50))
    signs = torch.cat([q[:, :6], -q[:, :6]])
    assert effective_rank(signs @ torch.randn(6, 9)) <= 6.0001
    assert effective_rank(torch.cat([torch.eye(7), -torch.eye(7)])) == pytest.approx(7, rel=1e-6)
    assert effective_rank(torch.ones(4, 3)) == 0


def test_training_pulls_pairs_together(pairs, held_out) -> None:
    ncl = NCL(16, 64)
    result = train_head(ncl, *pairs, epochs=20, batch_size=200, lr=3e-3, valid=held_out, progress=False)
    assert result.last["valid_score"] < result.history[0]["valid_score"] - 0.2
    assert result.last["valid_r@1"] > 10 / 200
    assert 0 < result.last["valid_l0"] < 64
    assert 1 < result.last["valid_rank"] <= 64


def test_needs_pairs(pairs) -> None:
    with pytest.raises(MMHooksError, match="pass text="):
        train_head(NCL(16, 8), pairs[0], epochs=1, progress=False)


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def test_threshold_holds_on_the_training_data_and_the_head_stays_the_papers_mlp(pairs) -> None:
    s, ncl = 1.5, NCL(16, 64)
    train_head(ncl, *pairs, epochs=3, batch_size=200, objective=NCLObjective(threshold=s), progress=False)
    z = ncl.pre(torch.cat([unit(x) for x in pairs])).detach()
    torch.testing.assert_close(z.mean(dim=0), torch.full((64,), -s), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(dim=0, correction=0), torch.ones(64), atol=1e-4, rtol=0)
    assert float((z > 0).float().mean(dim=0).max()) <= 1 / (1 + s * s)  # Cantelli
    assert sorted(ncl.state_dict()) == ["W1", "W2", "b1", "b2"]  # nothing left over from training


def test_loss_ignores_the_scale_and_shift_that_the_threshold_sets(pairs) -> None:
    """Folding between steps is a choice of gauge: the loss of the folded head is the same."""
    image, text = (unit(x) for x in pairs)
    ncl, objective, dead = NCL(16, 64), NCLObjective(threshold=1.2), torch.zeros(64, dtype=torch.bool)
    before = objective.loss(ncl, image, text, dead).loss
    objective.after_step(ncl)
    folded = objective.loss(ncl, image, text, dead).loss
    with torch.no_grad():
        ncl.W2 *= 3
        ncl.b2 += torch.randn(64)
    moved = objective.loss(ncl, image, text, dead).loss
    torch.testing.assert_close(folded, before, rtol=1e-4, atol=0)
    torch.testing.assert_close(moved, before, rtol=1e-4, atol=0)


def test_without_threshold_the_loss_is_info_nce_of_the_heads_own_rows(pairs) -> None:
    image, text = (unit(x) for x in pairs)
    ncl, dead = NCL(16, 64), torch.zeros(64, dtype=torch.bool)
    for similarity in ("cosine", "dot"):
        objective = NCLObjective(threshold=None, similarity=similarity, temperature=0.5)
        f = [ncl.encode(x) for x in (image, text)]
        rows = [unit(x) for x in f] if similarity == "cosine" else f
        expected = info_nce(rows[0], rows[1], 0.5)
        torch.testing.assert_close(objective.loss(ncl, image, text, dead).loss, expected)


def test_threshold_keeps_units_alive_and_sparse_where_the_loss_alone_does_not(pairs) -> None:
    def shares(threshold: float | None, similarity: Literal["cosine", "dot"]) -> tuple[float, float]:
        ncl = NCL(16, 64)
        with torch.no_grad():
            ncl.b2[:20] = -5.0  # born dead
        objective = NCLObjective(threshold=threshold, temperature=0.2, similarity=similarity)
        train_head(ncl, *pairs, epochs=20, batch_size=200, lr=3e-3, objective=objective, progress=False)
        got = reconstruction(ncl, *pairs)
        return got.dead, got.density

    dead, density = shares(1.5, "cosine")
    assert dead == 0 and density < 0.1
    assert shares(None, "cosine")[0] >= 20 / 64
    dead, density = shares(None, "dot")
    assert dead >= 20 / 64 and density > 0.15


# -- the fitted decoder ------------------------------------------------------------------------------------


def test_fitted_decoder_is_the_ridge_solution_written_out(pairs) -> None:
    ncl, ridge = NCL(16, 64), 0.01
    ncl.fit_decoder(*pairs, ridge=ridge, batch_size=170)
    x = torch.cat([unit(p) for p in pairs]).double()
    f = ncl.encode(x.float()).detach().double()
    centred = f - f.mean(dim=0)
    gram = centred.T @ centred
    floor = ridge * float(gram.diagonal().mean()) * torch.eye(64, dtype=torch.float64)
    weight = torch.linalg.solve(gram + floor, centred.T @ (x - x.mean(dim=0)))
    torch.testing.assert_close(ncl.W_dec.double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ncl.decode(f.float()).double().mean(dim=0), x.mean(dim=0), atol=1e-5, rtol=0)


def test_fitted_decoder_is_found_by_no_other_map(pairs) -> None:
    """Without ridge it is the least-squares optimum: the residual is orthogonal to every feature."""
    ncl = NCL(16, 64)
    with torch.no_grad():
        ncl.b2[:5] = -5.0  # features that never fire need a map too: zero
    ncl.fit_decoder(*pairs, ridge=0.0)
    x = torch.cat([unit(p) for p in pairs])
    f = ncl.encode(x)
    residual = x - ncl.decode(f)
    assert float((f - f.mean(0)).T.matmul(residual).abs().max()) < 1e-2
    torch.testing.assert_close(ncl.W_dec[:5].detach(), torch.zeros(5, 16))


def test_training_with_ridge_gives_a_decoder_that_is_saved_and_refitted(pairs, held_out, tmp_path) -> None:
    ncl, settings = NCL(16, 64), {"epochs": 10, "batch_size": 200, "lr": 3e-3, "progress": False}
    train_head(ncl, *pairs, objective=NCLObjective(ridge=1e-3), **settings)
    assert ncl.has_decoder and reconstruction(ncl, held_out[0]).fvu < 0.8  # four features of 64 fire
    back = load_head_dir(ncl.save(tmp_path / "n"))
    x = unit(held_out[0])
    assert back.id == ncl.id and torch.equal(back(x), ncl(x))
    stale = ncl.W_dec.detach().clone()
    train_head(ncl, *pairs, **settings)  # a head that has a decoder gets one that fits its new features
    fresh = NCL(16, 64)
    fresh.load_state_dict({k: v for k, v in ncl.state_dict().items() if "dec" not in k})
    fresh.fit_decoder(*pairs)
    assert not torch.equal(ncl.W_dec, stale)
    torch.testing.assert_close(ncl.W_dec, fresh.W_dec, atol=1e-5, rtol=1e-4)


def test_a_decoder_is_part_of_the_id(pairs) -> None:
    ncl = NCL(16, 64)
    before = ncl.id
    ncl.fit_decoder(*pairs)
    assert ncl.id != before
    with pytest.raises(MMHooksError, match="at least 2 rows with ridge >= 0, got 1 rows"):
        ncl.fit_decoder(pairs[0][:1])
