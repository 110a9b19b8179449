"""The activation store: extraction beside bare forwards, reading beside numpy, loaders beside others.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_store.py --benchmark-only

Every case asserts first that the contenders give the same numbers; ``race.py`` says how they are timed.
``MMHOOKS_BENCH_ROUNDS`` (default 5), ``MMHOOKS_BENCH_PAIRS`` (default 512), ``MMHOOKS_PEER_PYTHON`` (an interpreter
that has ``saev``; without it that row is left out and says so).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from race import TABLE, Contender, Race, goal, race

import mmhooks as mm
from mmhooks.data.loading import Decoder, load_batches, plan_batches
from mmhooks.data.store import order
from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.writer import ShardWriter, begin, finish

ROUNDS = int(os.environ.get("MMHOOKS_BENCH_ROUNDS", "5"))
PAIRS = int(os.environ.get("MMHOOKS_BENCH_PAIRS", "512"))
FIXED = (ROUNDS, ROUNDS)
ROWS, WIDTH, BATCH = 200_000, 512, 4096


def against_the_first(result: Race) -> dict[str, float]:
    """Speed of each contender against the first's, by medians."""
    median = result.median
    return {name: next(iter(median.values())) / seconds for name, seconds in median.items()}


# -- extraction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pairs", "batch"), [("mini", 2 * PAIRS, 128), ("ViT-B-32", PAIRS, 32)])
def test_extraction_runs_at_the_encoders_speed(
    benchmark: BenchmarkFixture, name: str, pairs: int, batch: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = mm.load(name)
    found = mm.data.pairs("mini", limit=pairs)
    assert model.preprocess is not None and model.tokenizer is not None
    decoder = Decoder(found, model.preprocess, model.tokenizer)
    bare_rows: list[torch.Tensor] = []

    @torch.no_grad()
    def bare() -> None:
        bare_rows.clear()
        work = plan_batches(found, batch_size=batch, shard_rows=8 * batch)
        for part in load_batches(decoder, work, workers=0, pin=False):
            bare_rows.append(model.forward(part.images, part.texts).image)  # noqa: PERF401 - a loop, as one writes it

    def stored() -> mm.Store:
        shutil.rmtree(tmp_path / "acts", ignore_errors=True)
        return mm.extract(
            model,
            found,
            out=tmp_path / "acts",
            batch_size=batch,
            shard_rows=8 * batch,
            workers=0,
            progress=False,
        )

    bare()
    store = stored()
    assert torch.equal(store["image.embed"].tensor(), torch.cat(bare_rows)) and len(store) == pairs
    case = f"extraction, {name}, {pairs} pairs, batches of {batch}, decoding in the same process"
    contenders: dict[str, Contender] = {"bare loop, nothing written": bare, "mm.extract": stored}
    speed = against_the_first(race(benchmark, case, contenders, rounds=FIXED, amount=pairs, unit="pairs/s"))
    goal(benchmark, f"{case}: speed against the bare loop", speed["mm.extract"], 0.93)


TWO = """
import sys, time, torch, mmhooks as mm
from mmhooks.utils.distributed import Ranks
torch.set_num_threads(1)
model, pairs = mm.load("mini"), mm.data.pairs("mini", limit=int(sys.argv[2]))
mm.extract(model, pairs[:128], out=sys.argv[1] + "/warm", workers=0, progress=False, shard_rows=64, batch_size=64)
start = time.perf_counter()
mm.extract(model, pairs, out=sys.argv[1] + "/acts", workers=0, progress=False, shard_rows=128, batch_size=64)
if Ranks().rank == 0:
    print("seconds", time.perf_counter() - start)
"""


def test_two_processes(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """The wall-clock time of two ranks with a thread each against one; needs two idle cores."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pairs = 4 * PAIRS

    turns = {n: itertools.count() for n in ("1", "2", "apart")}

    def seconds(processes: int) -> float:
        launch = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        )
        out = tmp_path / f"{processes}-{next(turns[str(processes)])}"
        command = [sys.executable, *launch, str(script), str(out), str(pairs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split("seconds")[1])

    def apart() -> float:
        """Two extractions of half the pairs each, at the same time, in processes that share nothing."""
        turn = next(turns["apart"])
        commands = [
            [sys.executable, str(script), str(tmp_path / f"apart-{turn}-{half}"), str(pairs // 2)]
            for half in "ab"
        ]
        running = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
        return max(float(process.communicate()[0].split("seconds")[1]) for process in running)

    for processes in (1, 2):
        seconds(processes)
    one, two = (tmp_path / f"{n}-0" / "acts" for n in (1, 2))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
    contenders: dict[str, Contender] = {
        "1 process": lambda: seconds(1),
        "2 processes": lambda: seconds(2),
        "2 processes that share nothing": apart,
    }
    few = max(2, ROUNDS // 2)
    result = race(
        benchmark, f"mini, {pairs} pairs", contenders, rounds=(few, few), amount=pairs, unit="pairs/s"
    )
    goal(benchmark, "2 processes, times faster", against_the_first(result)["2 processes"], 1.7)


# -- reading -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random rows of both sides, 512 wide in fp32: 820 MB."""
    place = tmp_path_factory.mktemp("bench") / "acts"
    place.mkdir()
    specs = [SiteSpec("image.embed", (WIDTH,), "fp32"), SiteSpec("text.embed", (WIDTH,), "fp32")]
    plan = {
        "model": {"name": "random", "weights": ""},
        "sites": {spec.name: spec.to_json() for spec in specs},
        "data": {"name": "random", "fingerprint": "", "pairs": ROWS},
        "settings": {"shard_rows": 8192},
    }
    with Lock(place):
        begin(place, plan, {})
        writer, rng = ShardWriter(place), torch.Generator().manual_seed(0)
        for number, first in enumerate(range(0, ROWS, 8192)):
            n = min(8192, ROWS - first)
            rows = {spec.name: torch.randn(n, WIDTH, generator=rng) for spec in specs}
            writer.add([str(first + i) for i in range(n)], rows, {})
            writer.close(number)
        finish(place)
    return place


GIGABYTES = ROWS * WIDTH * 4 / 1e9


def test_reading_beside_numpy(benchmark: BenchmarkFixture, folder: Path) -> None:
    """Copying every row of a site into one buffer: mapped by numpy, and through the store."""
    store = mm.Store(folder)
    rows = store["image.embed"]
    buffer = np.empty((BATCH, WIDTH), np.float32)
    target = torch.from_numpy(buffer)
    mapped = []
    for number, entry in enumerate(store.manifest["shards"]):
        shard = rows._shards[number]  # type: ignore[attr-defined]
        offset = shard._columns["image.embed"][1]
        mapped.append(
            np.memmap(folder / entry["file"], np.float32, "r", offset=offset, shape=(entry["rows"], WIDTH))
        )

    def by_numpy() -> None:
        for table in mapped:
            for first in range(0, len(table), BATCH):
                part = table[first : first + BATCH]
                np.copyto(buffer[: len(part)], part)

    def by_store() -> None:
        for _, chunk in rows.chunks(BATCH):
            target[: len(chunk)].copy_(chunk)  # type: ignore[arg-type]

    assert np.array_equal(mapped[-1], rows[ROWS - len(mapped[-1]) :].numpy())  # type: ignore[union-attr]
    case = f"reading {ROWS:,} rows of {WIDTH} x fp32, chunks of {BATCH}"
    contenders: dict[str, Contender] = {"numpy.memmap, copied": by_numpy, "store.chunks, copied": by_store}
    speed = against_the_first(race(benchmark, case, contenders, rounds=FIXED, amount=GIGABYTES, unit="GB/s"))
    goal(benchmark, "reading: speed against numpy", speed["store.chunks, copied"], 0.7)


@pytest.mark.parametrize("sites", [["image.embed"], ["image.embed", "text.embed"]])
def test_shuffled_batches(
    benchmark: BenchmarkFixture, folder: Path, sites: list[str], tmp_path: Path
) -> None:
    store = mm.Store(folder)

    def sums(shuffle: bool) -> torch.Tensor:
        total = torch.zeros(WIDTH, dtype=torch.float64)
        for batch in store.batches(BATCH, sites=sites, shuffle=shuffle, seed=1):
            total += batch[sites[0]].double().sum(0)  # type: ignore[union-attr]
        return total

    torch.testing.assert_close(sums(False), sums(True))

    def read(**options: object) -> None:
        for _ in store.batches(BATCH, sites=sites, **options):  # type: ignore[arg-type]
            pass

    # What the machine can do: the same gathers with the order drawn beforehand, out of the map and out of memory.
    rows = [store[site] for site in sites]
    rng = order.generator(1, 0)
    plan = list(order.batches(order.windows(rows[0].cuts, order.WINDOW, rng), BATCH, rng, drop_last=False))
    plain, target = torch.randn(ROWS, WIDTH), torch.empty(BATCH, WIDTH)

    def gather_mapped() -> None:
        for one, site in zip(rows, sites, strict=True):
            for _, index, counts in plan:
                outs = target[: len(index)].split(counts)
                for part, out in zip(index.split(counts), outs, strict=True):
                    number = one._shard_of(int(part[0]))  # type: ignore[attr-defined]
                    source = one._shards[number].tensor(site)  # type: ignore[attr-defined]
                    torch.index_select(source, 0, part - one.cuts[number], out=out)

    def gather() -> None:
        for _ in sites:
            for _, index, _ in plan:
                torch.index_select(plain, 0, index, out=target[: len(index)])

    contenders: dict[str, Contender] = {
        "store.batches, in order": lambda: read(),
        "store.batches, shuffled": lambda: read(shuffle=True, seed=1),
        "index_select alone, mapped rows": gather_mapped,
        "index_select alone, rows in memory": gather,
    }
    amount = GIGABYTES * len(sites)
    case = f"batches of {BATCH}, sites: {len(sites)}, {ROWS:,} rows of {WIDTH} x fp32"
    result = race(benchmark, case, contenders, rounds=FIXED, amount=amount, unit="GB/s")
    goal(
        benchmark,
        f"{case}: shuffled against in order",
        against_the_first(result)["store.batches, shuffled"],
        0.5,
    )
    for shuffle in (False, True):
        start = time.perf_counter()
        share = by_datasets(folder, sites, shuffle=shuffle)
        rate = amount * share / (time.perf_counter() - start)
        name = f"datasets (SAELens' shards), {'shuffled' if shuffle else 'in order'}"
        TABLE.append(f"| {case} | {name} | {rate:,.2f} GB/s | | | 1 |")
    if len(sites) == 1:
        by_saev(case, store, tmp_path)


def by_datasets(folder: Path, sites: list[str], *, shuffle: bool) -> float:
    """The store as SAELens reads cached activations: an Arrow data set in torch format, batch by batch.

    Returns the share of the rows that it read: a twentieth when shuffled, whose rate stands for the whole.
    """
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_from_disk(str(folder)).select_columns(sites).with_format("torch")
    order = np.random.default_rng(0).permutation(ROWS)[: ROWS // 20]
    if not shuffle:
        for first in range(0, ROWS, BATCH):
            _ = found[first : first + BATCH]
        return 1.0
    for first in range(0, len(order), BATCH):
        _ = found[order[first : first + BATCH]]
    return len(order) / ROWS


def by_saev(case: str, store: mm.Store, place: Path) -> None:
    """The loaders of ``saev`` on the same bytes, in the interpreter that has it."""
    python = os.environ.get("MMHOOKS_PEER_PYTHON")
    if not python:
        warnings.warn("saev is left out: MMHOOKS_PEER_PYTHON names no interpreter that has it", stacklevel=1)
        return
    script = Path(__file__).parent / "saev_loaders.py"
    np.save(place / "rows.npy", store["image.embed"].tensor().numpy())  # type: ignore[union-attr]
    share = 0.1  # its rate stands for the whole
    command = [python, str(script), str(place / "rows.npy"), str(BATCH), str(share)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        warnings.warn(f"saev does not run here: {done.stderr.strip().splitlines()[-1]}", stacklevel=1)
        return
    for name, seconds in json.loads(done.stdout.splitlines()[-1]).items():
        TABLE.append(f"| {case} | saev, {name} | {GIGABYTES * share / seconds:,.2f} GB/s | | | 1 |")
