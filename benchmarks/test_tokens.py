"""Tokens: a store by token and a stream beside the bare encoder, training beside both, eight heads beside one.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_tokens.py --benchmark-only

Every case asserts first that the contenders give the same numbers; ``race.py`` says how they are timed: processor time, with
images decoded in the same process. Beside them a mixing buffer as SAELens has it (fill, shuffle, give half, fill again), written
down here, over the same forwards. ``MMHOOKS_BENCH_ROUNDS`` (default 5), ``MMHOOKS_BENCH_PAIRS`` (default 512).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from race import TABLE, race

import mmhooks as mm
from mmhooks.data.loading import load_batches, plan_batches
from mmhooks.heads.training.feeds import TableFeed
from mmhooks.heads.training.processes import Processes
from mmhooks.models.site_runner import SiteRunner, chosen_places

ROUNDS = int(os.environ.get("MMHOOKS_BENCH_ROUNDS", "5"))
PAIRS = int(os.environ.get("MMHOOKS_BENCH_PAIRS", "512"))
FIXED = (ROUNDS, ROUNDS)
BATCH = 2048  # rows of a training step


class Subject:
    """A model, its pairs already decoded, and one site: what differs between contenders is what they do with the rows."""

    def __init__(self, name: str, pairs: int, batch: int) -> None:
        torch.manual_seed(0)
        self.name, self.batch = name, batch
        self.model = mm.load(name)
        self.pairs = mm.data.pairs("mini", limit=pairs)
        self.site = "image.blocks.4.resid_post" if name == "mini" else "image.blocks.8.resid_post"
        reader = SiteRunner(self.model, chosen_places(self.model, self.site), self.pairs, sparse=False)
        plans = plan_batches(self.pairs, batch_size=batch, shard_rows=2**30)
        self.pixels = [
            b.images for b in load_batches(reader.decoder(self.pairs), plans, workers=0, pin=False)
        ]
        self.width = self.model.run_with_cache(images=self.pixels[0][:1], sites=self.site)[1][
            self.site
        ].shape[-1]

    @torch.no_grad()
    def bare(self) -> int:
        """Only the forwards, and the decoding of their images."""
        seen = 0
        decoded = load_batches(
            SiteRunner(self.model, chosen_places(self.model, self.site), self.pairs, sparse=False).decoder(self.pairs),
            plan_batches(self.pairs, batch_size=self.batch, shard_rows=2**30), workers=0, pin=False,
        )  # fmt: skip
        for batch in decoded:
            self.model.model.encode_image(batch.images)
            seen += len(batch.ids)
        return seen

    def stream(self, **options: Any) -> Any:
        return mm.stream(
            self.model, self.pairs, self.site, tokens="patch", batch_size=self.batch, workers=0, **options
        )

    def read_stream(self) -> int:
        return sum(len(b[self.site]) for b in self.stream().batches(BATCH))

    def heads(self, count: int) -> list[Any]:
        return [mm.TopKSAE(self.width, 256, k=8, seed=seed) for seed in range(count)]

    def train(self, count: int) -> list[Any]:
        return mm.train_heads(
            self.heads(count), self.stream(), sites=(self.site,), epochs=1, batch_size=BATCH, progress=False
        )

    @torch.no_grad()
    def buffer_of_saelens(self) -> int:
        """The rows through a mixing buffer: filled, shuffled, half of it given, filled again; the other half stays."""
        size, given = 65_536, 0
        held: list[torch.Tensor] = []
        for batch in self.forwards():
            held.append(batch)
            if sum(map(len, held)) >= size:
                rows = torch.cat(held)
                rows = rows[torch.randperm(len(rows))]
                half = len(rows) // 2 // BATCH * BATCH
                for part in rows[:half].split(BATCH):
                    given += len(part.clone())
                held = [rows[half:]]
        rows = torch.cat(held)
        for part in rows[torch.randperm(len(rows))].split(BATCH):
            given += len(part.clone())
        return given

    @torch.no_grad()
    def forwards(self) -> Iterator[torch.Tensor]:
        decoded = load_batches(
            SiteRunner(self.model, chosen_places(self.model, self.site), self.pairs, sparse=False).decoder(self.pairs),
            plan_batches(self.pairs, batch_size=self.batch, shard_rows=2**30), workers=0, pin=False,
        )  # fmt: skip
        kept: list[torch.Tensor] = []
        block = self.model.model.visual.transformer.resblocks[int(self.site.split(".")[2])]
        handle = block.register_forward_hook(lambda module, args, out: kept.append(out))
        try:
            for batch in decoded:
                self.model.model.encode_image(batch.images)
                yield kept.pop()[:, 1:].flatten(0, 1)
        finally:
            handle.remove()


@pytest.fixture(
    scope="module", params=[("mini", 2 * PAIRS, 128), ("ViT-B-32", PAIRS // 2, 32)], ids=lambda p: p[0]
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(*request.param)


def test_rows_by_token_at_the_encoders_speed(
    benchmark: BenchmarkFixture, subject: Subject, tmp_path: Path
) -> None:
    """The bare encoder, a stream, a stream that trains one SAE, a store by token, and a mixing buffer."""
    wanted = torch.cat(list(subject.forwards()))
    number = iter(range(10**6))

    def store() -> Any:
        out = tmp_path / str(next(number))
        found = mm.extract(
            subject.model, subject.pairs, subject.site, out, tokens="patch", dtype="fp16", batch_size=subject.batch,
            workers=0, progress=False,
        )  # fmt: skip
        shutil.rmtree(out)
        return found

    out = tmp_path / "kept"
    kept = mm.extract(
        subject.model,
        subject.pairs,
        subject.site,
        out,
        tokens="patch",
        batch_size=subject.batch,
        workers=0,
        progress=False,
    )
    assert torch.allclose(kept[subject.site].tensor(), wanted, atol=1e-4)
    stream = subject.stream()
    order = torch.cat(list(stream.windows.batches(kept.pairs, BATCH, 0)))
    assert torch.allclose(
        torch.cat([b[subject.site] for b in stream.batches(BATCH)]), wanted[order], atol=1e-4
    )
    assert subject.buffer_of_saelens() == len(wanted)
    result = race(
        benchmark,
        f"{subject.name}, {len(subject.pairs)} images, {len(wanted)} patches of width {subject.width}",
        {
            "bare encoder": subject.bare,
            "mm.stream, read": subject.read_stream,
            "a mixing buffer (SAELens' way)": subject.buffer_of_saelens,
            "mm.extract by token, fp16": store,
            "mm.stream, one SAE (n 256, K 8) trained": lambda: subject.train(1),
        },
        rounds=FIXED,
        amount=len(subject.pairs),
        timer=time.process_time,
    )
    for name in ("mm.stream, read", "mm.extract by token, fp16", "mm.stream, one SAE (n 256, K 8) trained"):
        share = 1 / result.within_rounds(name)[1]
        verdict = "met" if share >= 0.9 else "MISSED"
        TABLE.append(
            f"| {subject.name}, {name}, of the bare encoder's speed | | {share:.3f}, goal at least .9: {verdict} | | | |"
        )


def test_eight_heads_in_one_pass(benchmark: BenchmarkFixture, subject: Subject) -> None:
    """One small head over a stream against eight of them in the same pass."""
    one, eight = subject.train(1), subject.train(8)
    for a, b in zip(one[0].head.parameters(), eight[0].head.parameters(), strict=True):
        assert torch.equal(a, b)
    result = race(
        benchmark,
        f"{subject.name}, training over a stream",
        {"one head": lambda: subject.train(1), "eight heads": lambda: subject.train(8)},
        rounds=FIXED,
        amount=len(subject.pairs),
        timer=time.process_time,
    )
    ratio = result.within_rounds("eight heads")[1]
    verdict = "met" if ratio <= 2 else "MISSED"
    TABLE.append(
        f"| {subject.name}, eight heads in one pass | | {ratio:.2f} of one, goal at most 2: {verdict} | | | |"
    )


def test_the_trainer_does_not_wait_for_the_store(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Random rows of a store by token, read one batch ahead: the share of a training step that is spent waiting for them."""
    subject = Subject("mini", 2 * PAIRS, 128)
    store = mm.extract(
        subject.model,
        subject.pairs,
        subject.site,
        tmp_path / "acts",
        tokens="patch",
        batch_size=128,
        workers=0,
        progress=False,
    )
    head = mm.TopKSAE(subject.width, 1024, k=16)
    waits, steps = [], []

    def epoch() -> None:
        feed = TableFeed({subject.site: store[subject.site]}, BATCH, 0, Processes(head))
        adam = torch.optim.Adam(head.parameters())
        batches = feed.batches(0, 0)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            got = time.perf_counter()
            if batch is None:
                return
            x = head.scaled(batch[subject.site])[0]
            out = head.bare().training_pass(x)
            (x - out.recons[0]).square().mean().backward()
            adam.step()
            adam.zero_grad()
            waits.append(got - start)
            steps.append(time.perf_counter() - start)

    race(
        benchmark,
        "an epoch of random rows from a store by token",
        {"n 1,024, K 16": epoch},
        rounds=FIXED,
        amount=len(store),
        unit="rows/s",
    )
    share = sum(waits) / sum(steps)
    TABLE.append(
        f"| waiting for rows | | {share:.3f} of a step, goal at most .1: {'met' if share <= 0.1 else 'MISSED'} | | | |"
    )
