"""TextSpan from covariances against the algorithm written out; sparse text codes by three solvers. Equality first.

    python -m pytest benchmarks/test_decomposition.py --benchmark-only

50,000 images, 3,500 texts, width 512, a head of width 64 plus its mean, 20 texts, rank 80, one thread, fp32 data.
The goal is a ratio of 20. Sparse codes: 256 embeddings of width 512, 2,000 texts, until the worst objective of the
rows is within 1e-5 of the best known; and against scikit-learn's Lasso on a Gram matrix, in turns, at penalties down
to 0.005, on these and on 64 images of mini against its text pool, whose texts are nearly dependent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from race import Contender, goal, race
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmhooks as mm
from mmhooks.analysis.decomposition.head_moments import HeadMoments
from mmhooks.analysis.decomposition.lasso import nonnegative_lasso
from mmhooks.analysis.decomposition.sparse_text_code import centred
from mmhooks.analysis.decomposition.text_span import TextSpan, text_span
from mmhooks.models.clip.embed_texts import embed_texts

N, T, D, WIDTH, K, RANK = 50_000, 3_500, 512, 64, 20, 80
PENALTY = 0.1
pytestmark = pytest.mark.usefixtures("no_grad")


def data() -> tuple[Tensor, Tensor, list[str]]:
    g = torch.Generator().manual_seed(0)
    strength = torch.linspace(3, 0.1, WIDTH)
    outputs = (torch.randn(N, WIDTH, generator=g) * strength) @ torch.randn(WIDTH, D, generator=g) / D**0.5
    texts = torch.randn(T, D, generator=g)
    return outputs + torch.randn(D, generator=g), texts, [str(i) for i in range(T)]


def naive_text_span(outputs: Tensor, pool: Tensor) -> list[int]:
    _, values, vh = torch.linalg.svd(outputs, full_matrices=False)
    vh = vh[: min(RANK, int((values > 1e-5 * values[0]).sum()))]
    pool = pool @ vh.T @ vh
    outputs = outputs - outputs.mean(0)
    chosen: list[int] = []
    for _ in range(K):
        lengths = pool.norm(dim=1)
        lengths[chosen] = torch.inf
        best = int((outputs @ (pool / lengths[:, None]).T).std(0).argmax())
        chosen.append(best)
        u = pool[best] / pool[best].norm()
        outputs = outputs - torch.outer(outputs @ u, u)
        pool = pool - torch.outer(pool @ u, u)
    return chosen


def test_text_span_against_the_algorithm_written_out(benchmark: BenchmarkFixture) -> None:
    outputs, pool, names = data()

    def streamed() -> TextSpan:
        moments = HeadMoments(1, D)
        for part in outputs[:, None].split(1024):
            moments.update(part)
        return text_span(moments, pool, names)

    def whole() -> TextSpan:
        return text_span(outputs, pool, names)

    expected = naive_text_span(outputs, pool)
    assert list(whole().indices[0]) == list(streamed().indices[0]) == expected
    contenders: dict[str, Contender] = {
        "text_span": whole,
        "text_span, streamed in batches of 1,024": streamed,
        "algorithm written out": lambda: naive_text_span(outputs, pool),
    }
    best = race(benchmark, f"TextSpan, {N:,} images, {T:,} texts", contenders, rounds=(1, 3)).best
    fast, stream, naive = best.values()
    goal(benchmark, "TextSpan, times faster", naive / fast, 20)
    goal(benchmark, "TextSpan streamed, times faster", naive / stream, 20)
    assert naive / fast > 20 and naive / stream > 20


def lasso_data() -> tuple[Tensor, Tensor]:
    """Images made of a few of the texts each; texts share a direction and cluster, as those of a CLIP do."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(100, D, generator=g)
    texts = centres[torch.randint(100, (2000,), generator=g)] + 1.2 * torch.randn(2000, D, generator=g)
    picks = torch.rand(256, 2000, generator=g).topk(8, dim=1).indices
    return centred(texts[picks].sum(1) + torch.randn(256, D, generator=g)), centred(texts)


def objective(w: Tensor, z: Tensor, dictionary: Tensor) -> Tensor:
    return 0.5 * (w @ dictionary - z).square().sum(1) + PENALTY * w.sum(1)


def admm(z: Tensor, dictionary: Tensor, good: Callable[[Tensor], bool], rho: float) -> Tensor:
    """Woodbury: ``(CCᵀ + rho)⁻¹ = (1 - C (CᵀC + rho)⁻¹ Cᵀ) / rho`` needs a factor of width d alone."""
    inverse = torch.linalg.inv(dictionary.T @ dictionary + rho * torch.eye(D))
    alike = z @ dictionary.T
    w = u = torch.zeros_like(alike)
    for step in range(5000):
        right = alike + rho * (w - u)
        x = (right - right @ dictionary @ inverse @ dictionary.T) / rho
        w = (x + u - PENALTY / rho).clamp_min(0)
        u = u + x - w
        if step % 10 == 9 and good(w):
            return w
    raise AssertionError("ADMM did not get there")


def fista(z: Tensor, dictionary: Tensor, good: Callable[[Tensor], bool]) -> Tensor:
    length = float(torch.linalg.matrix_norm(dictionary, 2)) ** 2
    w = y = torch.zeros(len(z), len(dictionary))
    t = 1.0
    for step in range(5000):
        new = (y - ((y @ dictionary - z) @ dictionary.T + PENALTY) / length).clamp_min(0)
        if float(((y - new) * (new - w)).sum()) > 0:  # restart
            t = 1.0
        further = (1 + (1 + 4 * t * t) ** 0.5) / 2
        w, y, t = new, new + (t - 1) / further * (new - w), further
        if step % 10 == 9 and good(w):
            return w
    raise AssertionError("FISTA did not get there")


def test_sparse_codes_by_three_solvers(benchmark: BenchmarkFixture) -> None:
    z, dictionary = lasso_data()
    exact = nonnegative_lasso(z.double(), dictionary.double(), PENALTY, tolerance=1e-9)
    full = torch.zeros(len(z), len(dictionary)).scatter_add(1, exact.indices, exact.values.float())
    best = objective(full, z, dictionary)

    def good(w: Tensor) -> bool:
        return float((objective(w, z, dictionary) - best).max()) <= 1e-5

    ours = nonnegative_lasso(z, dictionary, PENALTY, tolerance=1e-5)
    assert float(ours.gap.max()) <= 1e-5
    contenders: dict[str, Contender] = {
        "working sets": lambda: nonnegative_lasso(z, dictionary, PENALTY, tolerance=1e-5),
        "FISTA with restarts": lambda: fista(z, dictionary, good),
    }
    for rho in (0.3, 1.0, 3.0):
        contenders[f"ADMM, rho {rho}"] = lambda rho=rho: admm(z, dictionary, good, rho)
    benchmark.extra_info["texts per code"] = float((exact.values > 0).sum(1).float().mean())
    seconds = race(benchmark, "sparse codes of 256 embeddings", contenders, rounds=(2, 10)).best
    assert seconds["working sets"] == min(seconds.values())


def of_mini() -> tuple[Tensor, Tensor]:
    model, pairs = mm.load("mini"), mm.data.pairs("mini", limit=64)
    pixels = torch.stack([model.preprocess(pairs.image(i)) for i in range(len(pairs))])  # type: ignore[misc]
    return centred(model.encode_image(pixels)), centred(
        embed_texts(model, mm.data.text_pool("general").texts)
    )


def worst_gap(w: Tensor, z: Tensor, dictionary: Tensor, penalty: float) -> float:
    """Certified distance from the best objective, of whoever made ``w``, in double precision."""
    left = z - w @ dictionary
    scale = (penalty / (left @ dictionary.T).amax(1)).clamp_max(1)
    value = 0.5 * left.square().sum(1) + penalty * w.sum(1)
    return float(
        (value - scale * (z * left).sum(1) + 0.5 * scale.square() * left.square().sum(1)).max().clamp_min(0)
    )


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("penalty", [0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
@pytest.mark.parametrize("source", [lasso_data, of_mini])
def test_sparse_codes_are_not_slower_than_scikit_learn(
    benchmark: BenchmarkFixture, source: Callable[[], tuple[Tensor, Tensor]], penalty: float
) -> None:
    """Correctness first, by the same certificate; then in turns, least processor time of each."""
    from sklearn.linear_model import Lasso

    z, dictionary = (x.double() for x in source())
    z, atoms = z[:64], dictionary.numpy()

    def ours() -> Tensor:
        code = nonnegative_lasso(z, dictionary, penalty)
        full = torch.zeros(len(z), len(dictionary), dtype=torch.float64)
        return full.scatter_add(1, code.indices, code.values)

    def theirs() -> Tensor:
        # It divides the squares by the number of "samples", here the width.
        model = Lasso(penalty / atoms.shape[1], positive=True, fit_intercept=False, precompute=atoms @ atoms.T,
                      tol=1e-6, max_iter=10**6)  # fmt: skip
        return torch.from_numpy(model.fit(atoms.T, z.numpy().T).coef_)

    for name, solve in (("ours", ours), ("scikit-learn", theirs)):
        assert worst_gap(solve(), z, dictionary, penalty) <= 2e-6, name
    contenders: dict[str, Contender] = {"scikit-learn": theirs, "ours": ours}
    case = f"sparse codes, {source.__name__}, penalty {penalty}"
    best = race(benchmark, case, contenders, rounds=(2, 3), timer=time.process_time).best
    assert best["ours"] <= 1.5 * best["scikit-learn"]


if __name__ == "__main__":
    pytest.main([__file__])
