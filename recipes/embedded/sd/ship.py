"""Turns a run of embedded.sd.train into the shipped files: fp16 weights, a card, a grid and a learning curve.

    OMP_NUM_THREADS=2 PYTHONPATH=recipes python -m embedded.sd.ship --run runs/mini-sd

Everything on the card is measured on the rounded weights, which users get. The text tower is mini's and is not stored
again.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from embedded.sd.drawings import STYLE, TEMPLATES
from embedded.sd.evaluate import (
    evaluate,
    evenly_spaced,
    pipeline_of,
    save_grid,
    seconds_per_picture,
    weights_of,
)
from mmhooks.data.sources.drawings import SOURCES
from mmhooks.models.embedded import mini_sd
from mmhooks.utils.assets import write_digests
from mmhooks.utils.files import write_text


def read_curve(run: Path) -> list[dict]:
    """Returns rows by step; of steps that ran twice, because a run was killed, the later ones."""
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def draw_curve(rows: list[dict], exams: list[dict], path: Path, batch: int) -> None:
    """Plots the loss by noise level, and the evaluations during training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for quarter, label in enumerate(("cleanest quarter", "second", "third", "noisiest quarter")):
        left.plot([r["step"] for r in rows], [r["by_noise"][quarter] for r in rows], label=label)
    left.set(xlabel=f"step of {batch} drawings", ylabel="loss of the velocity", yscale="log")
    for space, color in (("efficientnet", "C0"), ("pixels", "C1")):
        for rank, line in (("first 1", "o-"), ("first 10", "o:")):
            right.plot([e["step"] for e in exams], [100 * e[space][rank]["value"] for e in exams], line, color=color,
                       label=f"{space}, {rank}")  # fmt: skip
    right.set(xlim=(0, None), xlabel="step", ylabel="asked-for drawing among the nearest, %", ylim=(0, 101))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    run: Annotated[Path, typer.Option(help="folder of a run of embedded.sd.train")] = Path("runs/mini-sd"),
    out: Annotated[Path, typer.Option(help="where weights and card go")] = mini_sd.FOLDER,
    figures: Annotated[Path, typer.Option()] = Path("docs/figures"),
    note: Annotated[str, typer.Option(help="further remarks on the run for the card")] = "",
    seed: Annotated[int, typer.Option(help="of the noise of the evaluation")] = 0,
) -> None:
    """Ship a run: PYTHONPATH=recipes python -m embedded.sd.ship --run runs/mini-sd"""
    plan = json.loads((run / "plan.json").read_text())
    listed = json.loads((run / "drawings.json").read_text())
    names = [row["name"] for row in listed]
    step, weights = weights_of(run)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in weights.items():
        save_file(part, out / f"{name}.safetensors")
    pipe = pipeline_of(weights)
    known = (load_file(run / "material.safetensors")["pixels"] + 1) / 2
    result, drawn = evaluate(pipe, names, known, seed=seed)
    with safe_open(run / "vae.safetensors", "pt") as file:
        psnr = float(file.metadata()["psnr"])
    source = next(s for s in SOURCES if s.style == STYLE)
    on_the_way = run / "exams.jsonl"
    lines = on_the_way.read_text().splitlines() if on_the_way.exists() else []
    exams = [json.loads(line) for line in lines]
    exams = [e for e in exams if e["step"] < step] + [{"step": step} | result]
    card = {
        "name": "mini-sd",
        "architecture": "diffusers StableDiffusionPipeline: CLIPTextModel holding mini's text tower, "
        "UNet2DConditionModel on 8 x 8 x 24 latents, AutoencoderTiny (linear encoder: principal components of 8 x 8 "
        "patches), DDIM, v-prediction; 64 x 64 pixels",
        "parameters": {"unet": sum(p.numel() for p in pipe.unet.parameters()),
                       "vae": sum(p.numel() for p in pipe.vae.parameters())},
        "licence": "weights: Apache-2.0; they memorise the drawings listed in drawings.json, which are under the licence in data",
        "draws": "the drawings listed in drawings.json from their names, on white; not things or compositions it never saw",
        "data": [{"source": source.style, "licence": source.licence, "attribution": source.attribution,
                  "notice": "Copyright (c) Microsoft Corporation", "trained_on": len(names)}],
        "recipe": {"script": "recipes/embedded/sd/train.py", "plan": plan, "steps_done": step,
                   "samples_seen": step * plan["batch"], "templates": list(TEMPLATES),
                   "torch": version("torch"), "diffusers": version("diffusers")},
        "note": note,
        "autoencoder_psnr_db": psnr,
        "use": {"num_inference_steps": result["steps"], "guidance_scale": result["guidance"]},
        "exam": result,
        "exams_on_the_way": [{k: e[k] for k in ("step", "n", "efficientnet", "pixels")} for e in exams],
        "seconds_per_picture": seconds_per_picture(pipe, names[0]),
    }  # fmt: skip
    write_text(out / mini_sd.DRAWINGS_FILE, json.dumps(listed, indent=0) + "\n")
    write_text(out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    write_digests(out.parent)
    chosen = evenly_spaced(names)
    save_grid(drawn[chosen], [names[i] for i in chosen], figures / "mini-sd-grid.png")
    save_grid(known[chosen], [names[i] for i in chosen], run / "grid-known.png")
    draw_curve(read_curve(run), exams, figures / "mini-sd-curve.png", plan["batch"])
    typer.echo(
        json.dumps({k: card[k] for k in ("exam", "seconds_per_picture", "autoencoder_psnr_db")}, indent=1)
    )


if __name__ == "__main__":
    typer.run(main)
