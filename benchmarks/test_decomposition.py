"""TextSpan from covariances against the algorithm by the letter; sparse text codes by three solvers. Equality first.

    python -m pytest -o addopts= benchmarks/test_decomposition.py -s

50,000 pictures, 3,500 texts, width 512, a head of width 64 plus its mean, 20 texts, rank 80, one thread, fp32 data.
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmhooks as mm
from mmhooks.analysis.decomposition.head_moments import HeadMoments
from mmhooks.analysis.decomposition.lasso import nonnegative_lasso
from mmhooks.analysis.decomposition.sparse_text_code import centred
from mmhooks.analysis.decomposition.text_span import text_span
from mmhooks.models.clip.embed_texts import embed_texts

N, T, D, WIDTH, K, RANK = 50_000, 3_500, 512, 64, 20, 80
PENALTY = 0.1


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


def timed(call: Callable[[], object]) -> tuple[object, float]:
    begin = time.perf_counter()
    value = call()
    return value, time.perf_counter() - begin


@torch.no_grad()
def test_text_span_against_the_algorithm_by_the_letter() -> None:
    torch.set_num_threads(1)
    outputs, pool, names = data()

    def streamed() -> object:
        moments = HeadMoments(1, D)
        for part in outputs[:, None].split(1024):
            moments.update(part)
        return text_span(moments, pool, names)

    fast, stream = [], []
    found, seconds = timed(lambda: text_span(outputs, pool, names))
    fast.append(seconds)
    expected, naive = timed(lambda: naive_text_span(outputs, pool))
    for _ in range(2):
        fast.append(timed(lambda: text_span(outputs, pool, names))[1])
        also, seconds = timed(streamed)
        stream.append(seconds)
    assert list(found.indices[0]) == list(also.indices[0]) == expected  # type: ignore[attr-defined]
    print(f"\nnaive {naive:.1f} s; text_span {min(fast):.2f} s, {naive / min(fast):.0f}x; streamed in batches of 1,024 "
          f"{min(stream):.2f} s, {naive / min(stream):.0f}x")  # fmt: skip
    assert naive / min(fast) > 20 and naive / min(stream) > 20


def lasso_data() -> tuple[Tensor, Tensor]:
    """Pictures made of a few of the texts each; texts share a direction and cluster, as those of a CLIP do."""
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


@torch.no_grad()
def test_sparse_codes_by_three_solvers() -> None:
    torch.set_num_threads(1)
    z, dictionary = lasso_data()
    exact = nonnegative_lasso(z.double(), dictionary.double(), PENALTY, tolerance=1e-9)
    full = torch.zeros(len(z), len(dictionary)).scatter_add(1, exact.indices, exact.values.float())
    best = objective(full, z, dictionary)

    def good(w: Tensor) -> bool:
        return float((objective(w, z, dictionary) - best).max()) <= 1e-5

    ours, ours_s = timed(lambda: nonnegative_lasso(z, dictionary, PENALTY, tolerance=1e-5))
    assert float(ours.gap.max()) <= 1e-5  # type: ignore[attr-defined]
    rows = {"working sets": ours_s, "FISTA with restarts": timed(lambda: fista(z, dictionary, good))[1]}
    for rho in (0.3, 1.0, 3.0):
        rows[f"ADMM, rho {rho}"] = timed(lambda rho=rho: admm(z, dictionary, good, rho))[1]
    print(f"\nL0 {float((exact.values > 0).sum(1).float().mean()):.1f}; "
          + "; ".join(f"{name} {s:.2f} s ({s / ours_s:.1f}x)" for name, s in rows.items()))  # fmt: skip
    assert ours_s == min(rows.values())


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


@torch.no_grad()
@pytest.mark.parametrize("source", [lasso_data, of_mini])
def test_sparse_codes_are_not_slower_than_scikit_learn(source: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Correctness first, by the same certificate; then in turns, least processor time of each."""
    from sklearn.linear_model import Lasso

    torch.set_num_threads(1)
    z, dictionary = (x.double() for x in source())
    z, atoms = z[:64], dictionary.numpy()

    def theirs(penalty: float) -> Tensor:
        # It divides the squares by the number of "samples", here the width.
        model = Lasso(penalty / atoms.shape[1], positive=True, fit_intercept=False, precompute=atoms @ atoms.T,
                      tol=1e-6, max_iter=10**6)  # fmt: skip
        return torch.from_numpy(model.fit(atoms.T, z.numpy().T).coef_)

    for penalty in (0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005):
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(3 if penalty > 0.02 else 2):
            for name, call in (
                ("ours", lambda p: nonnegative_lasso(z, dictionary, p)),
                ("theirs", theirs),
            ):
                begin = time.process_time()
                found = call(penalty)
                times[name].append(time.process_time() - begin)
                if name == "ours":
                    ours = torch.zeros(len(z), len(dictionary), dtype=torch.float64)
                    found = ours.scatter_add(1, found.indices, found.values)
                assert worst_gap(found, z, dictionary, penalty) <= 2e-6, name
        best = {name: min(seconds) for name, seconds in times.items()}
        print(f"\n{source.__name__}, penalty {penalty}: ours {best['ours']:.2f} s, scikit-learn {best['theirs']:.2f} s, "
              f"ratio {best['ours'] / best['theirs']:.2f}", end="")  # fmt: skip
        assert best["ours"] <= 1.5 * best["theirs"]


if __name__ == "__main__":
    pytest.main([__file__, "-s", "-o", "addopts="])
