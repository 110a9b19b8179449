"""Whether memory stays flat from 10⁴ to 10⁵ images: extraction by token, a stream, and measures of its pooled features.

    python benchmarks/token_memory.py        # about five minutes on one core; one process a size and task

A synthetic encoder (two layers, width 32, 16 patches) on images that are made when they are read, so that nothing but the
toolkit's own buffers can grow. Peak memory is the process's, above what it held after its first thousand images.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SIZES = (10_000, 100_000)
TASKS = ("extract", "stream", "measure")
SITE = "image.blocks.1.resid_post"


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def encoder() -> Any:
    from open_clip import CLIP

    import mmhooks as mm

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    return mm.HookedCLIP(CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval(), name="synthetic")


class Made:
    """Pixels of ``n`` images, made from their numbers."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(i)))


def pairs_of(n: int) -> Any:
    from mmhooks.data.pair_set import Row
    from mmhooks.data.tensor_pairs import TensorPairs, _Tensors

    rows = [Row(f"i{i}", "made", i) for i in range(n)]
    return TensorPairs(rows, _Tensors(Made(n)), name="made", content="made")  # type: ignore[arg-type]


def once(task: str, n: int, folder: Path) -> None:
    import mmhooks as mm

    model = encoder()
    options = {"tokens": "patch", "batch_size": 64, "workers": 0}
    if task == "extract":
        mm.extract(model, pairs_of(n), SITE, folder, dtype="fp16", progress=False, **options)
    elif task == "stream":
        for _ in mm.stream(model, pairs_of(n), SITE, **options).batches(2048):
            pass
    else:
        sae = mm.TopKSAE(32, 256, k=8)
        model.attach(sae, at=SITE, name="sae")
        latents = f"{SITE}.sae.latents"
        store = mm.extract(model, pairs_of(n), latents, folder, dtype="fp16", progress=False, **options)
        pooled = store.pool("max")
        other = store.pool("mean")[latents]
        total = sum(float(rows.sum()) for _, rows in other.chunks(1024))
        scores = mm.mds(pooled, image=latents, text=latents)
        assert total > 0 and bool((scores.R[~scores.dead] - 0.5).abs().max() < 1e-6)


def measured(task: str, n: int) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        once(task, 1_000, Path(base) / "small")
        start, begin = megabytes(), time.process_time()
        once(task, n, Path(base) / "large")
        return {"start": start, "peak": megabytes(), "seconds": time.process_time() - begin}


def main() -> None:
    print(
        "| Task | images | seconds of processor time | peak, MB above the first 1,000 images |\n|---|--:|--:|--:|"
    )
    for task in TASKS:
        for n in SIZES:
            done = subprocess.run(
                [sys.executable, __file__, task, str(n)], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {task} | {n:,} | {found['seconds']:.0f} | {found['peak'] - found['start']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
