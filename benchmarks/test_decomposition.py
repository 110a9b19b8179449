"""TextSpan from covariances against the algorithm by the letter; the same texts first.

    python -m pytest -o addopts= benchmarks/test_decomposition.py -s

50,000 pictures, 3,500 texts, width 512, a head of width 64 plus its mean, 20 texts, rank 80, one thread, fp32 data.
The goal is a ratio of 20.
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

from mmhooks.analysis.moments_metric import HeadMoments
from mmhooks.analysis.text_span import text_span

N, T, D, WIDTH, K, RANK = 50_000, 3_500, 512, 64, 20, 80


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


if __name__ == "__main__":
    pytest.main([__file__, "-s", "-o", "addopts="])
