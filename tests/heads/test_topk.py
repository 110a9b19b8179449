"""The TopK SAE against loops, and the faults of public SAE code that it must not have (methods.md, 6)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmhooks.heads import TopKSAE, reconstruction, train_head
from mmhooks.heads.linalg import geometric_median, project_out_, to_unit, total_variance
from mmhooks.heads.training.sae_objective import SAEObjective


def naive_encode(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in x:
        z = [float((row - sae.b_pre) @ w + b) for w, b in zip(sae.W_enc, sae.b_enc, strict=True)]
        kept = sorted(range(len(z)), key=lambda i: -z[i])[: sae.k]
        rows.append([max(v, 0.0) if i in kept else 0.0 for i, v in enumerate(z)])
    return torch.tensor(rows)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12))
def test_encode_is_the_k_largest_clipped_at_zero(seed: int, k: int) -> None:
    sae = TopKSAE(6, 12, k, seed=seed, normalize_input=False)
    with torch.no_grad():
        sae.b_pre.uniform_(-1, 1)
        sae.b_enc.uniform_(-1, 0.2)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = naive_encode(sae, x)
        torch.testing.assert_close(sae.encode(x), expected)
        values, indices = sae.encode_topk(x)
        torch.testing.assert_close(torch.zeros(4, 12).scatter(1, indices, values), expected)
        # b_pre is added once, not twice
        torch.testing.assert_close(sae.decode(expected), expected @ sae.W_dec + sae.b_pre)


def test_encode_topk_carries_gradient_to_x() -> None:
    sae, x = TopKSAE(6, 12, 3), torch.randn(4, 6, requires_grad=True)
    sparse, dense = (
        torch.autograd.grad(f.square().sum(), x)[0] for f in (sae.encode_topk(x)[0], sae.encode(x))
    )
    torch.testing.assert_close(sparse, dense)


def test_tied_unit_norm_start() -> None:
    sae = TopKSAE(16, 48, 5)
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert not torch.equal(TopKSAE(16, 48, 5, seed=1).W_dec, sae.W_dec)


def test_geometric_median_is_the_least_sum_of_distances() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).exp()
    centre = geometric_median(x)
    cost = (x - centre).norm(dim=1).sum()
    for axis in range(3):
        for h in (-0.02, 0.02):
            moved = centre.clone()
            moved[axis] += h
            assert (x - moved).norm(dim=1).sum() > cost


def test_projection_leaves_nothing_parallel() -> None:
    w, g = to_unit(torch.randn(9, 4)), torch.randn(9, 4)
    left = g.clone()
    project_out_(left, w)
    torch.testing.assert_close((left * w).sum(dim=1), torch.zeros(9), atol=1e-6, rtol=0)
    torch.testing.assert_close(left + (g * w).sum(dim=1, keepdim=True) * w, g)


@pytest.mark.parametrize("b_pre", ["median", "mean", "zero"])
def test_b_pre_starts_from_both_modalities(b_pre, pairs) -> None:
    image, text = pairs
    sae = TopKSAE(16, 48, 5)
    SAEObjective(b_pre=b_pre).start(sae, image, text)
    pooled = torch.cat([image, text])
    expected = {"median": geometric_median(pooled), "mean": pooled.mean(dim=0), "zero": torch.zeros(16)}[
        b_pre
    ]
    torch.testing.assert_close(sae.b_pre.detach(), expected)


def test_loss_is_the_mean_of_both_modalities_fvu(pairs) -> None:
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in pairs)
    sae, objective = TopKSAE(16, 48, 5), SAEObjective()
    objective.measure(image, text)
    loss = objective.loss(sae, image, text, torch.zeros(48, dtype=torch.bool)).loss
    by_hand = []
    for x in (image, text):
        back = sae(x)
        by_hand.append(float((x - back).square().sum() / (x - x.mean(dim=0)).square().sum()))
    assert float(loss.detach()) == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    assert reconstruction(sae, pairs[0]).fvu == pytest.approx(by_hand[0], rel=1e-5)
    assert total_variance(image) == pytest.approx(
        float((image - image.mean(0)).square().sum(1).mean()), rel=1e-5
    )


def test_auxk_trains_dead_features_and_only_them(pairs) -> None:
    """The auxiliary gradient reaches encoder, bias and decoder rows of dead features, and no other."""
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in pairs)
    sae, objective = TopKSAE(16, 48, 5), SAEObjective(aux_k=3, aux_weight=1.0)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[2, 7, 11, 30]] = True
    with torch.no_grad():
        sae.b_enc[dead] = -0.05  # rather not among the first five, still above zero at times
    objective.measure(image, text)

    def grads(mask: torch.Tensor) -> list[torch.Tensor]:
        sae.zero_grad()
        objective.loss(sae, image, text, mask).loss.backward()
        return [p.grad.clone() for p in (sae.W_enc, sae.b_enc, sae.W_dec)]

    for with_aux, without in zip(grads(dead), grads(torch.zeros_like(dead)), strict=True):
        moved = (
            (with_aux - without).flatten(1).abs().sum(1) if with_aux.ndim > 1 else (with_aux - without).abs()
        )
        assert bool((moved[dead] > 1e-7).all())
        assert float(moved[~dead].max()) < 1e-6


def test_auxk_revives_features_that_start_dead(pairs) -> None:
    def dead_after_training(weight: float) -> float:
        sae = TopKSAE(16, 64, 4)
        with torch.no_grad():
            sae.b_enc[:24] = -0.3
        objective = SAEObjective(aux_weight=weight)
        train_head(sae, *pairs, epochs=60, batch_size=100, lr=3e-3, objective=objective, progress=False)
        return reconstruction(sae, *pairs).dead

    without, with_aux = dead_after_training(0.0), dead_after_training(1 / 32)
    assert without > 0.1
    assert with_aux < without / 3


def test_rows_stay_on_the_sphere_and_fvu_falls(pairs, held_out) -> None:
    sae = TopKSAE(16, 48, 5)
    before = reconstruction(sae, held_out[0]).fvu
    train_head(sae, *pairs, epochs=40, batch_size=100, lr=3e-3, progress=False)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert reconstruction(sae, held_out[0]).fvu < min(0.3, before / 4)
