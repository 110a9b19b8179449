"""What studies need on an A100, and how far the same estimate is from what this machine takes.

    python benchmarks/estimate.py --write        # a few minutes on one core

Both go into docs/scaling.md. The estimate is that of ``mmhooks estimate``, at the settings of each study's paper. For the
comparison its machine is this one: the peaks of one core are measured first (a product of large matrices, and a product
of a large matrix and a vector, which reads the matrix once), then every kind of stage is run on real weights and timed in
seconds of this process's CPU, so that other work on the machine counts as little as it can.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- estimated: begin -->", "<!-- estimated: end -->"
COMMANDS = (
    "mmhooks estimate modality --paper",
    "mmhooks estimate adversarial --paper",
    "mmhooks estimate generation --paper --dtype float16",
    "mmhooks estimate gender --paper",
    "mmhooks estimate --pairs 50000 decomposition --paper --data imagenet/",
    "mmhooks estimate segmentation --paper --data gtsegs_ijcv.mat",
    "mmhooks estimate --pairs 5794 spurious --paper --data waterbirds/",
)
CLIP, BATCH = "ViT-B-32", 8


def seconds(call: Callable[[], Any], least: float = 0.5) -> float:
    """CPU seconds of one call, after one to warm up; the median of as many as fill ``least`` seconds."""
    call()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return sorted(times)[len(times) // 2]


def this_machine() -> tuple[Any, float]:
    """The peaks of one core, and the seconds that one small operator takes."""
    from mmhooks.studies.estimate.stages import Machine

    a, b, x, y = torch.randn(1536, 1536), torch.randn(1536, 1536), torch.randn(8192, 8192), torch.randn(8192)
    flops = 2 * 1536**3 / seconds(lambda: a @ b)
    bandwidth = x.nbytes / seconds(lambda: x @ y)
    small = torch.zeros(8)
    launch = seconds(lambda: [small + 1 for _ in range(10_000)]) / 10_000
    return Machine("core of this machine", {"float32": flops}, bandwidth, 0.0), launch


def measured_stages() -> list[tuple[Any, float]]:
    """Stages of every kind with the CPU seconds that they take here."""
    import mmhooks as mm
    from mmhooks.analysis.attacks.align import features_of
    from mmhooks.models.vlm.llava import load_llava
    from mmhooks.studies.estimate import calls
    from mmhooks.studies.estimate.stages import Stage

    found: list[tuple[Any, float]] = []
    whole = torch.float32

    def add(stage: Stage, call: Callable[[], Any]) -> None:
        found.append((stage, seconds(call)))
        print(f"{stage.name}: {found[-1][1]:.2f} s", file=sys.stderr)

    with torch.no_grad():
        clip: Any = mm.load(CLIP)
        pixels, tokens = torch.rand(BATCH, 3, 224, 224), clip.tokenizer(["a red panda"] * BATCH)
        add(Stage(f"{CLIP}, images", "images", BATCH, calls.image_cost(CLIP, BATCH, whole), BATCH),
            lambda: clip.encode_image(pixels))  # fmt: skip
        add(Stage(f"{CLIP}, texts", "texts", BATCH, calls.text_cost(CLIP, BATCH, whole), BATCH),
            lambda: clip.encode_text(tokens))  # fmt: skip

    clip.model.requires_grad_(False)

    def move() -> None:
        x = pixels.clone().requires_grad_()
        scale = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        features_of(clip, x, site="image.embed", scale=scale).square().sum().backward()

    add(
        Stage(
            f"{CLIP}, a step on pixels", "images", BATCH, calls.pixel_gradient_cost(CLIP, BATCH, whole), BATCH
        ),
        move,
    )

    image, text = torch.nn.functional.normalize(torch.randn(2, 4096, 512), dim=-1)
    for kind in ("sae", "ncl"):
        cost, size = calls.head_cost(kind, 512, 1024, 32)  # type: ignore[arg-type]

        def fit(kind: str = kind) -> None:
            head = mm.TopKSAE(512, 1024, 32) if kind == "sae" else mm.NCL(512, 1024)
            mm.train_head(head, image, text, epochs=2, progress=False)

        add(Stage(f"training, {kind.upper()}", "pairs", 2 * 4096, cost, size), fit)

    sd = mm.load_diffusion("mini")
    prompts, options = ["a drawing of a cat"] * 4, {"guidance_scale": 3.0, "output_type": "np"}
    denoise = Stage(
        "mini-sd, denoising", "images", 4, calls.denoising_cost("mini", 4, whole, guided=True), 4, 8
    )
    # Two numbers of steps: what a run takes beside its steps cancels.
    many, few = (seconds(lambda n=n: sd.pipe(prompts, num_inference_steps=n, **options)) for n in (10, 2))
    found.append((denoise, many - few))
    latents = torch.randn(
        4,
        sd.pipe.vae.config.latent_channels,
        sd.pipe.unet.config.sample_size,
        sd.pipe.unet.config.sample_size,
    )
    with torch.no_grad():
        add(Stage("mini-sd, decoding latents", "images", 4, calls.decoding_cost("mini", 4, whole), 4),
            lambda: sd.pipe.vae.decode(latents))  # fmt: skip

    llava = load_llava()
    request = llava.prompt("Say how to use the thing in the picture.")
    from PIL import Image

    inputs = llava.processor(
        text=[request] * 8, images=[Image.new("RGB", (64, 64), "red")] * 8, return_tensors="pt"
    )
    answer = lambda n: llava.model.generate(**inputs, min_new_tokens=n, max_new_tokens=n, do_sample=False)  # noqa: E731
    reading, writing, _ = calls.answer_costs("mini-vlm", 8, whole, 24)
    with torch.no_grad():
        once = seconds(lambda: answer(1))
        found.append((Stage("mini-vlm, reading", "requests", 8, reading, 8), once))
        found.append(
            (
                Stage("mini-vlm, 24 tokens", "answers", 8, writing, 8, 24),
                (seconds(lambda: answer(25)) - once),
            )
        )
    return found


def compared() -> str:
    """The comparison as Markdown."""
    from mmhooks.report import Table
    from mmhooks.studies.estimate.stages import Assumption
    from mmhooks.studies.estimate.table import number

    torch.set_num_threads(1)
    machine, launch = this_machine()
    assumed = Assumption(launch=launch)
    rows = []
    for stage, took in measured_stages():
        predicted = stage.seconds(machine, assumed)
        reached = stage.times(machine, assumed.at(1.0))["arithmetic"] / took
        rows.append([stage.name, number(stage.flops / 1e9), stage.bound(machine, assumed), number(predicted),
                     number(took), f"{took / predicted:.2f}", f"{100 * reached:.0f}"])  # fmt: skip
    table = Table(
        ["Stage", "GFLOP", "limit", "predicted, s", "measured, s", "measured ÷ predicted", "share of the peak, %"], rows,
        "The same estimate on one core",
        f"Peak {machine.flops['float32'] / 1e9:.0f} GFLOP/s in fp32, {machine.bandwidth / 1e9:.1f} GB/s, "
        f"{1e6 * launch:.1f} µs an operator, all measured; {100 * assumed.utilisation:.0f} % of the peaks assumed, as "
        "above. CPU seconds, medians. Random weights where ViT-B/32's are not here.",
        text_columns=(0, 2),
    )  # fmt: skip
    where = f"{os.cpu_count()} cores, one used, {platform.machine()}, torch {torch.__version__.split('+')[0]}"
    return f"Measured on {time.strftime('%Y-%m-%d')}: {where}.\n\n{table.markdown()}"


def estimated() -> str:
    """The tables of ``mmhooks estimate``, each below its command."""
    from typer.testing import CliRunner

    from mmhooks.cli import app

    parts = []
    for command in COMMANDS:
        done = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        if done.exit_code:
            raise SystemExit(f"{command}: {done.output}")
        begin = done.output.index("**")  # libraries warn before
        parts.append(f"```bash\n{command}\n```\n\n{done.output[begin:].strip()}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    parser.add_argument("--part", choices=("estimated", "compared"), help="only this part, on the screen")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("COLUMNS", "400")
    sys.path.insert(0, str(ROOT))
    if options.part:
        print(globals()[options.part]())
        return
    text = f"{estimated()}\n\n### How far off\n\n{compared()}"
    print(text)
    if options.write:
        page = ROOT / "docs/scaling.md"
        head, rest = page.read_text(encoding="utf-8").split(BEGIN)
        page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
