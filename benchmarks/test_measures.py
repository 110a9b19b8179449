"""Streaming measures against their definitions written out, on the same synthetic pairs; equality comes first.

    python -m pytest benchmarks/test_measures.py --benchmark-only

The definitions are vectorised where that is how one would write them down (a table of cosines, a column sorted), and
run where they still do, 1,024 features, K = 32: those of tables over 20,000 pairs, those of all pairs of samples over
2,500. The goal is a ratio of 20 over all measures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from race import TABLE, Contender, race
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic import FEATURES, D, Latents, Vectors, head
from mmhooks.analysis.measures.bridges import Bridge
from mmhooks.analysis.measures.density import FeatureDensity
from mmhooks.analysis.measures.embed_sim import EmbedSim
from mmhooks.analysis.measures.mds import MDS
from mmhooks.analysis.measures.monosemanticity import MonoSemanticity
from mmhooks.analysis.measures.top_activating import TopSamples
from mmhooks.analysis.measures.win_rate import WinRate

WIDE, N, M, POOL = 20_000, 2_500, 20, 128
Cases = dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]
pytestmark = pytest.mark.usefixtures("no_grad")


def naive_mds(a: Tensor, b: Tensor) -> Tensor:
    ratio = torch.where(a + b > 0, a / (a + b), torch.nan)
    return ratio.double().nanmean(0)


def naive_top(a: Tensor, x: Tensor) -> Tensor:
    best = torch.full((a.shape[1], M), -1)
    for k in range(a.shape[1]):
        order = a[:, k].argsort(descending=True, stable=True)[:M]
        order = order[a[order, k] > 0]
        best[k, : len(order)] = order
    return best


def naive_density(a: Tensor) -> Tensor:
    return (a != 0).double().mean(0)


def naive_embed_sim(a: Tensor, x: Tensor) -> Tensor:
    unit = normalize(x, dim=1)
    cosines = (unit @ unit.T).double()
    s_minus = (cosines.sum() - cosines.diagonal().sum()) / (len(x) ** 2 - len(x))
    values = torch.full((a.shape[1],), torch.nan, dtype=torch.float64)
    paper = values.clone()
    for k, row in enumerate(naive_top(a, x)):
        top = row[row >= 0]
        if len(top) > 1:
            block = cosines[top][:, top]
            s_plus = (block.sum() - block.diagonal().sum()) / (len(top) ** 2 - len(top))
            values[k] = (s_plus - s_minus) / s_minus.abs()
            # The paper's form, which the result also holds: m random samples of the feature's own.
            i, j = torch.triu_indices(len(top), len(top), 1)
            other = torch.randperm(len(x))[: len(top)]
            random = cosines[other][:, other][i, j]
            paper[k] = ((block[i, j] - random) / random)[random.abs() > 1e-3].mean()
    return values


def naive_win_rate(a: Tensor, x: Tensor, pool: Tensor) -> Tensor:
    unit = normalize(x, dim=1)
    i, j = torch.triu_indices(len(pool), len(pool), 1)
    other = (unit[pool] @ unit[pool].T)[i, j]
    values = torch.full((a.shape[1],), torch.nan, dtype=torch.float64)
    for k, row in enumerate(naive_top(a, x)):
        top = row[row >= 0]
        if len(top) > 1:
            i, j = torch.triu_indices(len(top), len(top), 1)
            own = (unit[top] @ unit[top].T)[i, j]
            values[k] = (own[:, None] > other[None, :]).double().mean()
    return values


def naive_monosemanticity(a: Tensor, x: Tensor) -> Tensor:
    unit = normalize(x, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    values = torch.empty(
        a.shape[1], dtype=torch.float64
    )  # a list of scalars would leave holes among large blocks
    for k in range(a.shape[1]):
        w = (a[:, k] - a[:, k].min()) / (a[:, k].max() - a[:, k].min())
        weights = torch.outer(w, w).fill_diagonal_(0)
        values[k] = (weights * cosines).sum().double() / weights.sum().double()
    return values


def naive_bridge(a: Tensor, b: Tensor, decoder: Tensor) -> Tensor:
    together = torch.zeros(a.shape[1], a.shape[1])
    for one, other in zip(a, b, strict=True):
        together += torch.outer(one, other)
    unit = normalize(decoder, dim=1)
    return (together / len(a) * (unit @ unit.T)).diagonal().double()


@pytest.fixture(scope="module")
def cases() -> Cases:
    """The definition and the streaming metric of each measure, on the same synthetic pairs."""
    wide = Latents(WIDE, 2)[0:WIDE], Latents(WIDE, 3)[0:WIDE]
    wide_a, wide_b = (x.dense() for x in wide)
    image, text = wide[0][:N], wide[1][:N]
    a, b, x = image.dense(), text.dense(), Vectors(N, 0)[0:N]
    decoder = head().W_dec

    def stream(metric, *inputs):
        for begin in range(0, len(inputs[0]), 4096):
            metric.update(*(x[begin : begin + 4096] for x in inputs))
        return metric

    wins = stream(WinRate(FEATURES, D, m=M, pool=POOL), image, x)
    pool = wins.pool[:, 1].long()
    return {
        "MDS": (lambda: naive_mds(wide_a, wide_b), lambda: stream(MDS(FEATURES), *wide).compute()["R"]),
        "top samples": (
            lambda: naive_top(wide_a, x),
            lambda: stream(TopSamples(FEATURES, m=M), wide[0]).compute()["indices"],
        ),
        "density": (
            lambda: naive_density(wide_a),
            lambda: stream(FeatureDensity(FEATURES), wide[0]).compute()["values"],
        ),
        "EmbedSim": (
            lambda: naive_embed_sim(a, x),
            lambda: stream(EmbedSim(FEATURES, D, m=M), image, x).result().values,
        ),
        "WinRate": (
            lambda: naive_win_rate(a, x, pool),
            lambda: stream(WinRate(FEATURES, D, m=M, pool=POOL), image, x).result().values,
        ),
        "MonoSemanticity": (
            lambda: naive_monosemanticity(a, x),
            lambda: stream(MonoSemanticity(FEATURES, D), image, x).compute()["values"],
        ),
        "bridges": (
            lambda: naive_bridge(a, b, decoder),
            lambda: stream(Bridge(FEATURES), image, text).result(decoder).own,
        ),
    }


@pytest.fixture(scope="module")
def spent() -> Iterator[list[tuple[float, float]]]:
    """Seconds of (definition, streaming) per measure; their sums close the table."""
    seconds: list[tuple[float, float]] = []
    yield seconds
    slow, fast = (sum(column) for column in zip(*seconds, strict=True))
    TABLE.append(f"| {len(seconds)} measures together | streaming | {fast:.3f} s | {fast / slow:.4f} | | |")
    TABLE.append(f"| times faster, goal at least 20 | | {slow / fast:.1f} | | | |")


@pytest.mark.parametrize(
    "measure", ["MDS", "top samples", "density", "EmbedSim", "WinRate", "MonoSemanticity", "bridges"]
)
def test_streaming_against_definitions(
    benchmark: BenchmarkFixture, cases: Cases, spent: list[tuple[float, float]], measure: str
) -> None:
    naive, ours = cases[measure]
    torch.testing.assert_close(ours().double(), naive().double(), equal_nan=True, rtol=2e-3, atol=1e-4)
    contenders: dict[str, Contender] = {"definition": naive, "streaming": ours}
    result = race(benchmark, measure, contenders, rounds=(1, 5))
    spent.append((result.best["definition"], result.best["streaming"]))


if __name__ == "__main__":
    pytest.main([__file__])
