"""One TopK training step of ours and of the other libraries, interleaved; loss and gradients are checked first.

    pip install "mmhooks[bench]"; export MMHOOKS_SAELENS_PYTHON=...   # see benchmarks/peers.py
    OMP_NUM_THREADS=2 python -m pytest benchmarks/test_heads.py --benchmark-only

The table (see ``race.py``) has samples per second, the ratio to our step, our speed against the fastest peer, and the
roofline: the time of the encoder's product ``[b, d] x [d, n]``, by torch's default and by the fastest routine there is
here. It is the one product that no TopK step can avoid: the decoder, its gradient, the encoder's gradient and that of
the selected values have ``K`` of ``n`` terms per row, and cost ``2 b K d`` each.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from peers import available
from pytest_benchmark.fixture import BenchmarkFixture
from race import Contender, goal, race

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


@pytest.mark.parametrize("threads", [2])
@pytest.mark.parametrize(("n", "batch"), CASES)
def test_topk_step(benchmark: BenchmarkFixture, n: int, batch: int, threads: int) -> None:
    torch.manual_seed(0)
    mine, dense = TopKSAE(D, n, K), DenseSAE(D, n, K)
    dense.load_state_dict(mine.state_dict())
    with torch.no_grad():
        x = separated(mine, batch)
    for ours, theirs in zip(gradients(mine, x), gradients(dense, x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)

    found, missing = available()
    w, bias = torch.randn(n, D), torch.randn(n)
    peers = [build(D, n, K, LR, x, 1000) for build in found]
    steppers = [Ours(TopKSAE(D, n, K), x), Ours(DenseSAE(D, n, K), x), *peers]
    contenders: dict[str, Contender] = {s.name: lambda s=s: s.step(x) for s in steppers}
    contenders["encoder's product alone, torch's default"] = lambda: torch.addmm(bias, x, w.T)
    contenders["encoder's product alone, here"] = lambda: sparse.affine(x, w, bias)
    rounds = 7 if n * batch < 1 << 24 else 5
    case = f"TopK step, n = {n:,}, batch {batch:,} (d = {D}, K = {K})"
    result = race(benchmark, case, contenders, rounds=(rounds, rounds), amount=batch, unit="samples/s")
    for peer in peers:
        getattr(peer, "close", lambda: None)()
    if peers:
        rival = min((peer.name for peer in peers), key=result.median.__getitem__)
        ratio = result.median[rival] / result.median["mmhooks"]
        goal(benchmark, f"{case}: times faster than {rival}, by medians", ratio, 1.4 if n == 1024 else 2.2)
    for line in missing:
        warnings.warn(line, stacklevel=1)
