"""The sparse training step against autograd on the dense formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmhooks.heads import TopKSAE
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.training.sae_objective import SAEObjective


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 5),
    groups=st.integers(1, 24),
    k=st.integers(1, 8),
    seed=st.integers(0, 999),
    ties=st.booleans(),
)
def test_fast_topk_selects_what_topk_selects(b: int, groups: int, k: int, seed: int, ties: bool) -> None:
    x = torch.randn(b, groups * 8, generator=torch.Generator().manual_seed(seed))
    x = x.round() if ties else x
    values, indices = sparse.fast_topk(x, k)
    assert torch.equal(values.sort().values, x.topk(k).values.sort().values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def small_problem() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    shapes = ((5, 6), (40, 6), (40,))
    return tuple(torch.randn(s, dtype=torch.float64, generator=g).requires_grad_() for s in shapes)


def test_gradcheck_of_encode_and_decode() -> None:
    x, w, bias = small_problem()
    decoder = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)

    def through(x, w, bias, decoder):
        values, places = sparse.encode(x, w, bias, 3)
        return sparse.decode(values, places, decoder), values

    assert torch.autograd.gradcheck(through, (x, w, bias, decoder), eps=1e-6, atol=1e-6)


def test_clipped_values_pass_no_gradient() -> None:
    x, w, bias = small_problem()
    values, _ = sparse.encode(x, w, bias - 100, 3)
    assert float(values.detach().abs().max()) == 0
    values.sum().backward()
    assert all(float(t.grad.abs().max()) == 0 for t in (x, w) if t.grad is not None) and w.grad is not None


@pytest.mark.parametrize("mkl", [True, False])
def test_products_equal_the_dense_ones(mkl, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    g = torch.Generator().manual_seed(2)
    indices = torch.stack([torch.randperm(50, generator=g)[:4] for _ in range(9)])
    values, w, d = torch.randn(9, 4), torch.randn(50, 7), torch.randn(9, 7)
    dense = torch.zeros(9, 50).scatter(1, indices, values)
    places = sparse.Selection(50, indices)
    torch.testing.assert_close(places.times(values, w), dense @ w)
    torch.testing.assert_close(places.transposed_times(values, d), dense.T @ d)
    torch.testing.assert_close(places.sample(d, w), (d @ w.T).gather(1, indices))


def test_whole_training_loss_and_every_gradient_equal_the_dense_step(pairs) -> None:
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in pairs)
    sae, objective = TopKSAE(16, 96, 4), SAEObjective()
    objective.start(sae, image, text)
    objective.measure(image, text)
    dead = torch.zeros(96, dtype=torch.bool)
    dead[::7] = True

    def run() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        sae.zero_grad()
        loss, fired, _ = objective.loss(sae, image, text, dead)
        loss.backward()
        return loss.detach(), fired, [p.grad.clone() for p in sae.parameters() if p.grad is not None]

    assert sparse.sparse_is_faster(4, 96, torch.device("cpu"))
    loss, fired, grads = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopKSAE, "training_pass", SAE.training_pass)
        dense_loss, dense_fired, dense_grads = run()
    torch.testing.assert_close(loss, dense_loss)
    assert torch.equal(fired, dense_fired) and len(grads) == len(dense_grads) == 4
    for mine, theirs in zip(grads, dense_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
