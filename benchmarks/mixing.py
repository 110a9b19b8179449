"""What it costs to mix rows in memory: our windows beside SAELens' own buffer, over the same rows, in one process.

    python benchmarks/mixing.py       # in an environment with sae-lens (tests/environments/saelens.py builds one)

Rows of width 768 arrive in chunks, as an encoder gives them, and leave as batches of 4,096 out of a buffer of 65,536. Processor
time, one thread, contenders in turn; first it is asserted that each gives every row at most once, and ours all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from mmhooks.data.store.layout import SiteSpec
from mmhooks.data.windows import Windows, whole_batches
from mmhooks.models.stream import _Table

ROWS, WIDTH, CHUNK, BUFFER, BATCH, ROUNDS = 262_144, 768, 3_136, 65_536, 4_096, 5


def windows(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """As ``mm.stream`` deals them: 64 images of 49 patches a chunk."""
    spec, order = SiteSpec("x", (rows.shape[1],), "fp32"), Windows(BUFFER)
    table = _Table([spec], rows.device)
    held: dict[str, torch.Tensor] = {}
    parts = rows.split(BUFFER)
    for window, part in enumerate(parts):
        table.begin(held)
        for chunk in part.split(CHUNK):
            table.add([""], {"x": chunk}, [len(chunk)])
        whole = table.end()["x"]
        count = len(held["x"]) if held else 0
        dealt = order.deal(0, window, count, len(whole) - count, BATCH, last=window == len(parts) - 1)
        for chosen in whole_batches(dealt.order, BATCH, drop_last=True):
            yield whole.index_select(0, chosen)
        held = {"x": whole.index_select(0, dealt.held)}


def saelens(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Their buffer, half of it kept."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    yield from mixing_buffer(BUFFER, BATCH, iter(rows.split(CHUNK)))


def main() -> None:
    torch.set_num_threads(1)
    numbered = torch.arange(ROWS, dtype=torch.float32)[:, None]
    contenders: dict[str, Callable[[torch.Tensor], Iterator[torch.Tensor]]] = {
        "mm.stream's windows": windows,
        "SAELens' mixing_buffer": saelens,
    }
    for name, mix in contenders.items():
        found = torch.cat(list(mix(numbered))).flatten().long()
        assert len(found.unique()) == len(found), name
        assert mix is saelens or len(found) == ROWS // BATCH * BATCH
    rows = torch.randn(ROWS, WIDTH)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, mix in contenders.items():
            begin = time.process_time()
            for _ in mix(rows):
                pass
            seconds[name].append(time.process_time() - begin)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print("| Contender | best | million rows/s |\n|---|--:|--:|")
    for name, found in seconds.items():
        print(f"| {name} | {min(found):.2f} s | {ROWS / min(found) / 1e6:.2f} |")
    print(
        f"\nTheirs over ours within rounds, median: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
