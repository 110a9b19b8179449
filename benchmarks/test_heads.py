"""One TopK training step of ours and of the other libraries, interleaved; loss and gradients are checked first.

    pip install "mmhooks[bench]"; export MMHOOKS_SAELENS_PYTHON=...   # see benchmarks/peers.py
    OMP_NUM_THREADS=2 python -m pytest benchmarks/test_heads.py -s

Prints a Markdown table: samples a second (median of the rounds; the minimum in brackets), our ratio to the
fastest peer, and the roofline: the time of the encoder's product ``[b, d] x [d, n]``, by torch's default and by
the fastest routine there is here. It is the one product no TopK step can avoid: the decoder, its gradient, the
encoder's gradient and that of the selected values have ``K`` of ``n`` terms a row, and cost ``2 b K d`` each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from peers import available

from mmhooks.heads import TopKSAE
from mmhooks.heads.sae import topk_kernels as sparse
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.training.sae_objective import SAEObjective

D, K, LR = 512, 32, 1e-4
CASES = [(n, batch) for n in (1024, 8192, 16384) for batch in (1024, 4096)]


class DenseSAE(TopKSAE):
    """The same head on the dense formula: plain autograd, plain ``topk``."""

    training_pass = SAE.training_pass


class Ours:
    """``train_head``'s step: loss with its bookkeeping, backward, projection, Adam, norm."""

    def __init__(self, sae: TopKSAE, x: torch.Tensor) -> None:
        self.name = "mmhooks" if type(sae) is TopKSAE else "mmhooks, dense formula"
        self.sae, self.objective = sae, SAEObjective()
        self.objective.measure(x, None)
        self.adam = torch.optim.Adam(sae.parameters(), lr=LR, eps=6.25e-10, fused=True)
        self.silent = torch.zeros(sae.n_features, dtype=torch.long)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        dead = self.silent > 10_000_000
        loss, fired, _ = self.objective.loss(self.sae, x, None, dead)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.objective.before_step(self.sae)
        self.adam.step()
        self.objective.after_step(self.sae)
        self.silent += len(x)
        self.silent[fired] = 0
        return loss.detach()


def gradients(sae: TopKSAE, x: torch.Tensor) -> list[torch.Tensor]:
    """Loss and the gradient of every parameter, before projection."""
    objective = SAEObjective()
    objective.measure(x, None)
    loss = objective.loss(sae, x, None, torch.zeros(sae.n_features, dtype=torch.bool)).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(sae.parameters()))]


def separated(sae: TopKSAE, batch: int) -> torch.Tensor:
    """Random unit rows whose K-th and next pre-activation differ by more than rounding does.

    Where they tie, one kernel keeps the one and another the other, and both are right: such rows (about one in a
    thousand) can say nothing about gradients.
    """
    x = torch.nn.functional.normalize(torch.randn(batch + batch // 16, D), dim=1)
    pre = (x - sae.b_pre).double() @ sae.W_enc.double().T + sae.b_enc.double()
    top = pre.topk(K + 1, dim=1).values
    clear = top[:, -2] - top[:, -1] > 1e-6
    assert int(clear.sum()) >= batch
    return x[clear][:batch].contiguous()


def interleaved(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round; a call that returns a float has timed itself."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            own = call()
            kept.append(own if isinstance(own, float) else time.perf_counter() - start)
    return [kept[1:] for kept in times]


@pytest.mark.parametrize(("n", "batch"), CASES)
def test_topk_step(n: int, batch: int) -> None:
    torch.manual_seed(0)
    mine, dense = TopKSAE(D, n, K), DenseSAE(D, n, K)
    dense.load_state_dict(mine.state_dict())
    with torch.no_grad():
        x = separated(mine, batch)
    for ours, theirs in zip(gradients(mine, x), gradients(dense, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)

    found, missing = available()
    w, bias = torch.randn(n, D), torch.randn(n)
    contenders = [Ours(TopKSAE(D, n, K), x), Ours(DenseSAE(D, n, K), x)]
    peers = [build(D, n, K, LR, x, 1000) for build in found]
    calls = [lambda c=c: c.step(x) for c in [*contenders, *peers]]
    calls += [lambda: torch.addmm(bias, x, w.T), lambda: sparse.affine(x, w, bias)]
    times = interleaved(calls, rounds=7 if n * batch < 1 << 24 else 5)
    for peer in peers:
        getattr(peer, "close", lambda: None)()

    *steps, default, best = [(median(t), min(t)) for t in times]
    print(f"\n### n = {n:,}, batch {batch:,} (d = {D}, K = {K}, {torch.get_num_threads()} threads)\n")
    print("| step | ms, median (min) | samples/s | of ours |\n|:--|--:|--:|--:|")
    for who, (middle, least) in zip([*contenders, *peers], steps, strict=True):
        share = steps[0][0] / middle
        print(
            f"| {who.name} | {1e3 * middle:.1f} ({1e3 * least:.1f}) | {batch / middle:,.0f} | {share:.2f} |"
        )
    for name, (middle, least) in (("torch's default", default), ("here", best)):
        print(f"| encoder's product alone, {name} | {1e3 * middle:.1f} ({1e3 * least:.1f}) | | |")
    if peers:
        rival = min(range(len(peers)), key=lambda i: steps[2 + i][0])
        ratios = [steps[2 + rival][i] / steps[0][i] for i in (0, 1)]
        print(f"\n{ratios[0]:.2f}x the fastest peer, {peers[rival].name} (of minima {ratios[1]:.2f}x)")
    print("\n".join(missing))
