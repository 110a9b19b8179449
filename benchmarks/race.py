"""Races: contenders take turns in one process, round by round, and pytest-benchmark times the first of them.

A slow moment of the machine then hits every contender alike. The ratio of the minima says what the code costs; the
median of the ratios within a round and its quartiles say how steady that is. ``MMHOOKS_BENCH_SECONDS`` (default 8)
scales the time that each race gets. Every case asserts that its contenders compute the same before it calls
:func:`race`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pytest_benchmark.fixture import BenchmarkFixture

SECONDS = float(os.environ.get("MMHOOKS_BENCH_SECONDS", "8"))
HEADER = (
    "| Case | Contender | Best | Ratio of minima | Ratio within rounds: median (quartiles) | Rounds |\n"
    "|---|---|---|---|---|---|"
)
TABLE: list[str] = []  # rows of the session, printed at its end by conftest.py

Contender = Callable[[], object]


@dataclass(frozen=True)
class Race:
    """Seconds per call, ``{contender: one entry per round}``, in the order of the contenders."""

    seconds: dict[str, list[float]]

    @property
    def best(self) -> dict[str, float]:
        return {name: min(rounds) for name, rounds in self.seconds.items()}

    @property
    def median(self) -> dict[str, float]:
        return {name: statistics.median(rounds) for name, rounds in self.seconds.items()}

    def within_rounds(self, name: str) -> tuple[float, float, float]:
        """Quartiles of this contender's time over the first contender's, round by round."""
        first = next(iter(self.seconds.values()))
        ratios = [a / b for a, b in zip(self.seconds[name], first, strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return low, middle, high


def race(
    benchmark: BenchmarkFixture,
    case: str,
    contenders: dict[str, Contender],
    *,
    loops: int = 1,
    rounds: tuple[int, int] = (5, 60),
    seconds: float = SECONDS,
    amount: float = 0,
    unit: str = "images/s",
    notes: dict[str, str] | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> Race:
    """Runs the contenders in turn and appends a row for each to ``TABLE``; ratios are against the first.

    Args:
        benchmark: pytest-benchmark's fixture. It times the first contender; the others take their turns in its
            ``setup``.
        case: The name in the table; the number of threads is added.
        contenders: What to call. A contender that returns a float has measured its own seconds (a child process).
        loops: Calls per round of each contender.
        rounds: At least and at most so many rounds, as many as fit into ``seconds``.
        amount: Items per call; prints ``amount / seconds`` in ``unit``.
        notes: A remark per contender, printed behind its time.
        timer: ``time.process_time`` counts processor time only, for cases that run beside something else.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    first, *others = contenders

    def turn(name: str) -> None:
        start = timer()
        for _ in range(loops):
            own = contenders[name]()
        taken = timer() - start
        times[name].append(own if isinstance(own, float) else taken / loops)

    def turns_of_the_others() -> None:
        for name in others:
            turn(name)

    start = time.perf_counter()
    for name in contenders:  # to warm up, and to see how many rounds there is time for
        turn(name)
        times[name].clear()
    least, most = rounds
    count = max(least, min(most, int(seconds / (time.perf_counter() - start))))
    benchmark.pedantic(turn, (first,), setup=turns_of_the_others, rounds=count)
    result = Race(times)
    report(benchmark, case, result, amount=amount, unit=unit, notes=notes or {})
    return result


def report(
    benchmark: BenchmarkFixture, case: str, result: Race, *, amount: float, unit: str, notes: dict[str, str]
) -> None:
    """Appends the rows to ``TABLE`` and keeps them in the benchmark's ``extra_info``."""
    best, first = result.best, next(iter(result.best.values()))
    case = f"{case}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    for name, least in best.items():
        low, middle, high = result.within_rounds(name)
        speed = in_words(least)
        speed += f", {amount / least:,.1f} {unit}" if amount else ""
        speed += f", {notes[name]}" if name in notes else ""
        ratio = f"{least / first:.3f} | {middle:.3f} ({low:.3f}–{high:.3f})"
        TABLE.append(f"| {case} | {name} | {speed} | {ratio} | {len(result.seconds[name])} |")
        benchmark.extra_info[name] = f"{speed}; x{ratio}"


def in_words(seconds: float) -> str:
    """Seconds in a unit that suits them: ``"3.5 µs"``, ``"12.04 ms"``, ``"3.21 s"``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def goal(benchmark: BenchmarkFixture, what: str, value: float, at_least: float) -> None:
    """Says in the table whether a goal was met."""
    said = f"{value:.2f}, goal at least {at_least:g}: {'met' if value >= at_least else 'MISSED'}"
    TABLE.append(f"| {what} | | {said} | | | |")
    benchmark.extra_info[what] = said
