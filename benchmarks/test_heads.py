"""One TopK training step, sparse against dense, in one process; loss and gradients are compared before timing.

    python -m pytest benchmarks/test_heads.py -s

prints samples a second, the ratio, and the roofline: the time of the one product that no step can avoid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch

from mmhooks.heads import TopKSAE
from mmhooks.heads.sae import SAE
from mmhooks.heads.sae_objective import SAEObjective

CASES = [(512, 1024, 32, 1024), (512, 1024, 128, 1024), (512, 1024, 256, 1024), (512, 8192, 32, 1024)]


class DenseSAE(TopKSAE):
    """The same head on the dense formula: plain autograd, plain ``topk``."""

    training_pass = SAE.training_pass


def step(sae: TopKSAE, adam: torch.optim.Optimizer, objective: SAEObjective, x: torch.Tensor) -> torch.Tensor:
    dead = torch.zeros(sae.n_features, dtype=torch.bool)
    loss = objective.loss(sae, x, None, dead).loss
    adam.zero_grad(set_to_none=True)
    loss.backward()
    objective.before_step(sae)
    adam.step()
    objective.after_step(sae)
    return loss.detach()


def interleaved(calls: list[Callable[[], object]], rounds: int = 7) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return [median(kept[1:]) for kept in times]


@pytest.mark.parametrize(("d", "n", "k", "batch"), CASES)
def test_topk_step(d: int, n: int, k: int, batch: int) -> None:
    x = torch.nn.functional.normalize(torch.randn(batch, d), dim=1)
    objective = SAEObjective()
    objective.measure(x, None)
    contenders, losses, grads = [], [], []
    for kind in (TopKSAE, DenseSAE):
        sae = kind(d, n, k)
        adam = torch.optim.Adam(sae.parameters(), lr=1e-4, eps=6.25e-10, fused=True)
        losses.append(step(sae, adam, objective, x))
        grads.append([p.grad.clone() for p in sae.parameters() if p.grad is not None])
        contenders.append(lambda s=sae, a=adam: step(s, a, objective, x))
    torch.testing.assert_close(losses[0], losses[1])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-3)
    w = torch.randn(n, d)
    ours, dense, product = interleaved([*contenders, lambda: x @ w.T])
    print(
        f"\nd={d} n={n} k={k} batch={batch}: {batch / ours:,.0f} samples/s, dense {batch / dense:,.0f}, "
        f"ratio {dense / ours:.2f}; encoder product {1e3 * product:.1f} of {1e3 * ours:.1f} ms"
    )
