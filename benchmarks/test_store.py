"""The activation store: extraction beside bare forwards, reading beside numpy, loaders beside others.

    OMP_NUM_THREADS=1 python -m pytest -o addopts= benchmarks/test_store.py -s

Every case asserts first that the contenders give the same numbers. They take turns, round by round; printed are
medians and minima. ``MMHOOKS_BENCH_ROUNDS`` (default 5), ``MMHOOKS_BENCH_PAIRS`` (default 512),
``MMHOOKS_PEER_PYTHON`` (an interpreter that has ``saev``; without it that row is left out and says so).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

import mmhooks as mm
from mmhooks.data.loading import Decoder, loader, works
from mmhooks.data.store import order
from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.store.lock import Lock
from mmhooks.data.store.writer import ShardWriter, begin, finish

ROUNDS = int(os.environ.get("MMHOOKS_BENCH_ROUNDS", "5"))
PAIRS = int(os.environ.get("MMHOOKS_BENCH_PAIRS", "512"))
ROWS, WIDTH, BATCH = 200_000, 512, 4096


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def race(contenders: dict[str, Callable[[], object]], amount: float, unit: str) -> dict[str, float]:
    """Runs all in turn; prints rates, and each against the first; returns the ratios of medians."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    base = next(iter(times.values()))
    ratios = {}
    for name, taken in times.items():
        ratios[name] = median(base) / median(taken)
        print(
            f"  {name:<44} {amount / median(taken):10,.1f} {unit} (best {amount / min(taken):,.1f}); ratio "
            f"{ratios[name]:.3f} (of the best {min(base) / min(taken):.3f})"
        )
    return ratios


# -- extraction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pairs", "batch"), [("mini", 2 * PAIRS, 128), ("ViT-B-32", PAIRS, 32)])
def test_extraction_runs_at_the_encoders_speed(name: str, pairs: int, batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mm.load(name)
    found = mm.data.pairs("mini", limit=pairs)
    assert model.preprocess is not None and model.tokenizer is not None
    decoder = Decoder(found, model.preprocess, model.tokenizer)
    bare_rows: list[torch.Tensor] = []

    @torch.no_grad()
    def bare() -> None:
        bare_rows.clear()
        work = works(found, batch_size=batch, shard_rows=8 * batch)
        for part in loader(decoder, work, workers=0, pin=False):
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
    print(f"\n{name}, {pairs} pairs, batches of {batch}, one thread, decoding in the same process:")
    ratio = race({"bare loop, nothing written": bare, "mm.extract": stored}, pairs, "pairs/s")["mm.extract"]
    print(f"  target 0.93: {'met' if ratio >= 0.93 else 'missed'}")


TWO = """
import sys, time, torch, mmhooks as mm
torch.set_num_threads(1)
model, pairs = mm.load("mini"), mm.data.pairs("mini", limit=int(sys.argv[2]))
mm.extract(model, pairs[:128], out=sys.argv[1] + "/warm", workers=0, progress=False, shard_rows=64, batch_size=64)
start = time.perf_counter()
mm.extract(model, pairs, out=sys.argv[1] + "/acts", workers=0, progress=False, shard_rows=128, batch_size=64)
if mm.data.ranks.Ranks().rank == 0:
    print("seconds", time.perf_counter() - start)
"""


def test_two_processes(tmp_path: Path) -> None:
    """The wall-clock time of two ranks with a thread each against one; needs two idle cores."""
    script = tmp_path / "two.py"
    script.write_text(TWO.replace("mmhooks as mm", "mmhooks as mm, mmhooks.utils.distributed", 1))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pairs = 4 * PAIRS

    def seconds(processes: int, turn: int) -> float:
        launch = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        )
        command = [sys.executable, *launch, str(script), str(tmp_path / f"{processes}-{turn}"), str(pairs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split("seconds")[1])

    def apart(turn: int) -> float:
        """Two extractions that know nothing of each other, of half the pairs each, at the same time."""
        commands = [
            [sys.executable, str(script), str(tmp_path / f"apart-{turn}-{half}"), str(pairs // 2)]
            for half in "ab"
        ]
        running = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
        return max(float(process.communicate()[0].split("seconds")[1]) for process in running)

    times: dict[object, list[float]] = {n: [] for n in (1, 2, "apart")}
    for turn in range(max(2, ROUNDS // 2)):
        for n in (1, 2):
            times[n].append(seconds(n, turn))
        times["apart"].append(apart(turn))
    one, two = (tmp_path / f"{n}-0" / "acts" for n in (1, 2))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
    ratio = median(times[1]) / median(times[2])
    print(
        f"\nmini, {pairs} pairs: 1 process {pairs / median(times[1]):,.0f} pairs/s, 2 processes "
        f"{pairs / median(times[2]):,.0f} pairs/s; ratio {ratio:.2f} (of the best {min(times[1]) / min(times[2]):.2f}); "
        f"target 1.7: {'met' if ratio >= 1.7 else 'missed'}; two that know nothing of each other: "
        f"{median(times[1]) / median(times['apart']):.2f}"
    )


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


def test_reading_beside_numpy(folder: Path) -> None:
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
    print(f"\nreading {ROWS} rows of {WIDTH} x fp32, chunks of {BATCH}:")
    ratio = race({"numpy.memmap, copied": by_numpy, "store.chunks, copied": by_store}, GIGABYTES, "GB/s")
    print(f"  target 0.7: {'met' if ratio['store.chunks, copied'] >= 0.7 else 'missed'}")


@pytest.mark.parametrize("sites", [["image.embed"], ["image.embed", "text.embed"]])
def test_shuffled_batches(folder: Path, sites: list[str], tmp_path: Path) -> None:
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

    contenders: dict[str, Callable[[], object]] = {
        "store.batches, in order": lambda: read(),
        "store.batches, shuffled": lambda: read(shuffle=True, seed=1),
        "index_select alone, mapped rows": gather_mapped,
        "index_select alone, rows in memory": gather,
    }
    amount = GIGABYTES * len(sites)
    print(f"\nbatches of {BATCH}, {len(sites)} sites, {ROWS} rows of {WIDTH} x fp32:")
    ratio = race(contenders, amount, "GB/s")["store.batches, shuffled"]
    print(f"  target 0.5: {'met' if ratio >= 0.5 else 'missed'}")
    for shuffle in (False, True):
        start = time.perf_counter()
        share = by_datasets(folder, sites, shuffle=shuffle)
        name = f"datasets (SAELens' shards), {'shuffled' if shuffle else 'in order'}"
        print(f"  {name:<44} {amount * share / (time.perf_counter() - start):10,.2f} GB/s")
    if len(sites) == 1:
        by_saev(store, tmp_path)


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


def by_saev(store: mm.Store, place: Path) -> None:
    """The loaders of ``saev`` on the same bytes, in the interpreter that has it."""
    python = os.environ.get("MMHOOKS_PEER_PYTHON")
    if not python:
        print("  saev: left out, MMHOOKS_PEER_PYTHON names no interpreter that has it")
        return
    script = Path(__file__).parent / "saev_loaders.py"
    np.save(place / "rows.npy", store["image.embed"].tensor().numpy())  # type: ignore[union-attr]
    share = 0.1  # its rate stands for the whole
    command = [python, str(script), str(place / "rows.npy"), str(BATCH), str(share)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        print(f"  saev: does not run here: {done.stderr.strip().splitlines()[-1]}")
        return
    for name, seconds in json.loads(done.stdout.splitlines()[-1]).items():
        print(f"  {f'saev, {name}':<44} {GIGABYTES * share / seconds:10,.2f} GB/s")
