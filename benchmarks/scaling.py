"""Cost per million pairs of every stage, and whether time and memory stay linear and flat from 10³ to 10⁶ pairs.

    python benchmarks/scaling.py --write        # under 8 minutes on two cores; one thread a process

Every size of the measures runs in a process of its own (peak memory is a process's), on synthetic sparse pairs
(1,024 features, K = 32) that are made row by row. Extraction runs on drawings with the embedded mini and with
ViT-B/32 of random weights (the cost does not depend on them). ``--write`` puts tables and figure into docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1_000, 10_000, 100_000, 1_000_000)
SHARED = max(SIZES)  # pairs of the run on two processes
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(n: int) -> dict[str, Any]:
    """All measures of ``n`` synthetic pairs, in this process (or in those of torchrun's environment)."""
    torch.set_num_threads(1)
    import mmhooks as mm
    from benchmarks.synthetic import LATENTS, SyntheticStore, head

    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        torch.distributed.init_process_group("gloo")
    small, sae = SyntheticStore(1_000), head()
    mm.measure(small, head=sae, **LATENTS, progress=False)  # libraries are loaded by now
    start = megabytes()
    if together:
        torch.distributed.barrier()
    begin = time.process_time()
    result = mm.measure(SyntheticStore(n), head=sae, **LATENTS, progress=False)
    cpu = time.process_time() - begin
    if together:
        torch.distributed.destroy_process_group()
    values = {f"{r['measure']} {r['side']}": r["value"] for r in result.table()}
    used = {"cpu": cpu, "start_mb": start, "peak_mb": megabytes()}
    return {"n": n, "seconds": result.seconds, "values": values, **used}


def run(n: int, processes: int = 1) -> list[dict[str, Any]]:
    """:func:`one` in fresh processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        env |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, __file__, "--one", str(n)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    out = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"measuring {n} pairs failed")
    return [json.loads(text.splitlines()[-1]) for text in out]


def stages() -> dict[str, tuple[float, str]]:
    """Seconds per million pairs of what comes before the measures, and what was measured."""
    torch.set_num_threads(1)
    import mmhooks as mm
    from mmhooks.heads import TopKSAE

    found: dict[str, tuple[float, str]] = {}
    pairs = mm.data.pairs("mini")

    def timed(name: str, count: int, what: str, call: Any) -> None:
        begin = time.perf_counter()
        call()
        found[name] = ((time.perf_counter() - begin) / count * 1e6, what)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, label, count in (("mini", "mini", 768), ("ViT-B-32", "ViT-B/32", 64)):
            model = mm.load(name)
            chosen = pairs.select(range(count))
            mm.extract(model, pairs.select(range(8)), out=f"{folder}/warm-{name}", progress=False, workers=0)
            timed(
                f"extraction, {label}",
                count,
                f"{count} pairs: images drawn, both encoders, written",
                lambda m=model, c=chosen, d=f"{folder}/{name}": mm.extract(
                    m, c, out=d, progress=False, workers=0
                ),
            )
        jpegs = []
        from io import BytesIO

        for i in range(64):
            buffer = BytesIO()
            pairs.image(i).convert("RGB").resize((320, 256)).save(buffer, format="JPEG", quality=90)
            jpegs.append(buffer.getvalue())
        from mmhooks.data.sources.images import open_image

        timed(
            "decoding, JPEG 320×256 to 224 px",
            64,
            "64 images, PIL and the model's preprocessing",
            lambda: [model.preprocess(open_image(j)) for j in jpegs],
        )
    sae, x = TopKSAE(512, 1024, 32), torch.nn.functional.normalize(torch.randn(4096, 512), dim=1)
    with torch.no_grad():
        sae.encode_topk(x)
        timed(
            "head, TopK SAE 512 to 1,024, both sides",
            4 * 4096,
            "4 × 2 × 4,096 vectors",
            lambda: [sae.encode_topk(x) for _ in range(8)],
        )
    return found


def figure(runs: list[dict[str, Any]], path: Path) -> None:
    """Time and peak memory against the number of pairs."""
    from matplotlib.figure import Figure

    from mmhooks.report.style import draw

    def make(palette: Any) -> Figure:
        drawn = Figure(figsize=(7.6, 3.0), layout="constrained")
        left, right = drawn.subplots(1, 2)
        n = [r["n"] for r in runs]
        seconds = [r["cpu"] for r in runs]
        left.plot(n, [seconds[-1] * k / n[-1] for k in n], color=palette.soft, linestyle=(0, (3, 3)))
        left.plot(n, seconds, "o-", color=palette.img, linewidth=2)
        left.set(xscale="log", yscale="log", xlabel="pairs", ylabel="CPU seconds")
        left.set_title("Time (dashed: proportional)")
        right.plot(n, [r["peak_mb"] for r in runs], "o-", color=palette.text, linewidth=2, label="peak")
        right.plot(n, [r["start_mb"] for r in runs], "o-", color=palette.soft, label="before the pass")
        right.set(xscale="log", xlabel="pairs", ylabel="resident MB", ylim=(0, None))
        right.set_title("Memory")
        right.legend()
        return drawn

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw(make, alt="time and memory", dark=False)[0].data)


def tables(
    runs: list[dict[str, Any]], two: list[dict[str, Any]], before: dict[str, tuple[float, str]]
) -> str:
    """The measured numbers as Markdown."""
    last, tenth = runs[-1], runs[-2]
    alone = next(r for r in runs if r["n"] == SHARED)
    slope = (last["cpu"] - tenth["cpu"]) / (last["n"] - tenth["n"])
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    lines = [
        f"Measured on {time.strftime('%Y-%m-%d')}: {machine}; one thread a process.",
        "",
        "| Stage | seconds per 10⁶ pairs | measured on |",
        "|:--|--:|:--|",
        *(f"| {name} | {value:,.0f} | {what} |" for name, (value, what) in before.items()),
    ]
    growing = {
        k: (v - tenth["seconds"][k]) / (last["n"] - tenth["n"]) * 1e6
        for k, v in last["seconds"].items()
        if k not in ("all", "latents", "intervals and tests")
    }
    measured = f"{last['n']:,} − {tenth['n']:,} synthetic pairs"
    lines += [f"| {name} | {max(value, 0):,.1f} | {measured} |" for name, value in growing.items()]
    lines += [f"| all measures (CPU) | {slope * 1e6:,.0f} | {measured}, making the rows included |", ""]
    lines += [
        "| pairs | seconds | CPU seconds | CPU µs a pair | peak MB | peak ÷ peak at 10⁵ |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for r in runs:
        seconds = r["seconds"]["all"]
        lines.append(
            f"| {r['n']:,} | {seconds:,.1f} | {r['cpu']:,.1f} | {1e6 * r['cpu'] / r['n']:,.0f} | {r['peak_mb']:,.0f} | "
            f"{r['peak_mb'] / tenth['peak_mb']:.2f} |"
        )
    time_two = max(r["seconds"]["all"] for r in two)
    apart = max(abs(two[0]["values"][k] - v) for k, v in alone["values"].items())
    lines += [
        "",
        f"From {tenth['n']:,} to {last['n']:,} pairs CPU time grows by {last['cpu'] / tenth['cpu']:.1f} (10 is "
        f"linear; smaller, because intervals, pools and controls cost the same for any number) and peak memory by "
        f"{last['peak_mb'] / tenth['peak_mb']:.2f}. What the pass itself takes above the libraries: "
        f"{tenth['peak_mb'] - tenth['start_mb']:,.0f} MB and {last['peak_mb'] - last['start_mb']:,.0f} MB.",
        "",
        f"Two processes over {SHARED:,} pairs: {time_two:,.1f} s against {alone['seconds']['all']:,.1f} s of one "
        f"({alone['seconds']['all'] / time_two:.2f} times the throughput); the largest difference of a measure "
        f"is {apart:.1e}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", type=int, help="(one size, in this process)")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md and docs/img/scaling.png")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.one:
        print(json.dumps(one(options.one)))
        return
    runs = []
    for n in options.sizes:
        runs += run(n)
        r = runs[-1]
        print(f"{n:>9,} pairs: {r['seconds']['all']:7.1f} s, peak {r['peak_mb']:,.0f} MB", file=sys.stderr)
    text = tables(runs, run(SHARED, processes=2), stages())
    print(text)
    if options.write:
        figure(runs, ROOT / "docs/img/scaling.png")
        page = ROOT / "docs/scaling.md"
        content = page.read_text(encoding="utf-8")
        head, rest = content.split(BEGIN)
        page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
