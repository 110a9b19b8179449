"""Evaluates whether `mini-sd` draws what its prompt asks for: the nearest training drawing of each image, in two spaces.

    PYTHONPATH=recipes python -m embedded.sd.evaluate --run runs/mini-sd --every 8

Mini itself cannot judge, because the U-Net is conditioned on its text embeddings: the judges are EfficientNet-Lite0
(cosine) and the principal components of the training images' pixels (distance). A drawing passes if the nearest of all
training images is the one that was asked for.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from embedded.checkpoints import read_part
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.models.embedded import mini_sd
from mmhooks.models.embedders import image_embedder

STEPS, GUIDANCE = 25, 3.0
COMPONENTS = 64  # of the pixels of all training images


def weights_of(run: Path) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Returns the step of a run and its shipped weights in half precision: the U-Net's running average, the autoencoder."""
    step, average = read_part(run / "unet.safetensors", "average")
    unet = {name: value.half().contiguous() for name, value in average.items()}
    return step, {"unet": unet, "vae": {k: v.half() for k, v in load_file(run / "vae.safetensors").items()}}


def pipeline_of(weights: dict[str, dict[str, Tensor]]) -> Any:
    parts: dict[str, Any] = {"unet": mini_sd.unet(), "vae": mini_sd.autoencoder()}
    for name, part in parts.items():
        part.load_state_dict({k: v.float() for k, v in weights[name].items()})
    return mini_sd.assemble(parts["vae"], parts["unet"])


def draw(pipe: Any, prompts: list[str], *, seed: int = 0, steps: int = STEPS, guidance: float = GUIDANCE,
         batch: int = 32) -> Float[Tensor, "n 3 64 64"]:  # fmt: skip
    """Generates one image per prompt, pixels from 0 to 1; a prompt's noise depends only on the seed and its index."""
    done = []
    for begin in track(range(0, len(prompts), batch), description="draw"):
        some = prompts[begin : begin + batch]
        noise = [torch.Generator().manual_seed(seed * 1_000_003 + begin + i) for i in range(len(some))]
        out = pipe(
            some, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="pt"
        )
        done.append(out.images.float().cpu())
    return torch.cat(done)


def to_pil(pixels: Float[Tensor, "n 3 h w"]) -> list[Image.Image]:
    values = pixels.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in values]


def pixel_ranks(
    drawn: Float[Tensor, "m 3 h w"], known: Float[Tensor, "n 3 h w"], own: Int[Tensor, " m"]
) -> Int[Tensor, " m"]:
    """Returns how many training images are nearer than the one asked for, along the first principal components."""
    flat, mean = known.flatten(1), known.flatten(1).mean(0)
    basis = torch.linalg.svd(flat - mean, full_matrices=False).Vh[: min(COMPONENTS, len(known) - 1)]
    distance = torch.cdist((drawn.flatten(1) - mean) @ basis.T, (flat - mean) @ basis.T)
    return (distance < distance.gather(1, own[:, None])).sum(1)


def seen_ranks(
    drawn: Float[Tensor, "m 3 h w"], known: Float[Tensor, "n 3 h w"], own: Int[Tensor, " m"]
) -> Int[Tensor, " m"]:
    """Returns the same by cosine of EfficientNet-Lite0's features, minus their mean over the training images."""
    embed = image_embedder(progress=False)
    theirs, ours = embed(to_pil(known)), embed(to_pil(drawn))
    mean = theirs.mean(0)
    near = F.normalize(ours - mean, dim=1) @ F.normalize(theirs - mean, dim=1).T
    return (near > near.gather(1, own[:, None])).sum(1)


def rates(ranks: Int[Tensor, " m"]) -> dict[str, dict]:
    n = len(ranks)
    return {f"first {k}": vars(wilson(int((ranks < k).sum()), n)) for k in (1, 10)}


def judge(drawn: Float[Tensor, "m 3 h w"], known: Float[Tensor, "n 3 h w"], own: Int[Tensor, " m"]) -> dict:
    """Returns the rates of rank 1 and of ranks up to 10 in both spaces, with Wilson intervals and chance."""
    return {
        "efficientnet": rates(seen_ranks(drawn, known, own)),
        "pixels": rates(pixel_ranks(drawn, known, own)),
        "chance": {f"first {k}": k / len(known) for k in (1, 10)},
        "n": len(drawn),
    }


def evaluate(pipe: Any, names: list[str], known: Float[Tensor, "n 3 64 64"], *, every: int = 1, seed: int = 0,
            steps: int = STEPS, guidance: float = GUIDANCE) -> tuple[dict, Float[Tensor, "m 3 64 64"]]:  # fmt: skip
    """Generates every ``every``-th name and judges the images; judges the decoded training images too, as a ceiling."""
    own = torch.arange(0, len(names), every)
    drawn = draw(pipe, [names[i] for i in own.tolist()], seed=seed, steps=steps, guidance=guidance)
    with torch.no_grad():
        latents = pipe.vae.encode(known[own] * 2 - 1).latents
        decoded = torch.cat([pipe.vae.decode(part).sample for part in latents.split(32)])
    result = judge(drawn, known, own)
    result["decoded training pictures"] = judge(((decoded + 1) / 2).clamp(0, 1), known, own)
    return result | {"seed": seed, "steps": steps, "guidance": guidance}, drawn


def seconds_per_picture(pipe: Any, prompt: str, repeats: int = 5) -> dict:
    """Returns seconds per image, with one prompt per call and with eight; best of ``repeats``."""

    def best(prompts: list[str]) -> float:
        took = []
        for _ in range(repeats):
            begin = time.perf_counter()
            pipe(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np")
            took.append((time.perf_counter() - begin) / len(prompts))
        return min(took)

    return {
        "alone": best([prompt]),
        "of eight": best([prompt] * 8),
        "steps": STEPS,
        "threads": torch.get_num_threads(),
    }


def save_grid(drawn: Float[Tensor, "n 3 64 64"], names: list[str], path: Path, columns: int = 8) -> None:
    """Saves the images as a grid, with their prompts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(columns * 1.05, rows * 1.22), squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for axes, image, name in zip(panels.flat, to_pil(drawn), names, strict=False):
        axes.imshow(image)
        axes.set_title(name, fontsize=7, y=-0.2)
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.995, 0.06, 0.18)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def evenly_spaced(names: list[str], count: int = 64) -> list[int]:
    """Returns ``count`` evenly spaced indices into the sorted list, so that none is selected by hand."""
    count = min(count, len(names))
    return [i * len(names) // count for i in range(count)]


def main(
    run: Annotated[Path, typer.Option(help="folder of embedded.sd.train")] = Path("runs/mini-sd"),
    every: Annotated[int, typer.Option(help="evaluate every n-th prompt")] = 8,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> None:
    """Evaluates a checkpoint: PYTHONPATH=recipes python -m embedded.sd.evaluate --run runs/mini-sd --every 8"""
    step, weights = weights_of(run)
    pipe = pipeline_of(weights)
    names = [row["name"] for row in json.loads((run / "drawings.json").read_text())]
    known = (load_file(run / "material.safetensors")["pixels"] + 1) / 2
    result, drawn = evaluate(pipe, names, known, every=every, seed=seed, steps=steps, guidance=guidance)
    with (run / "exams.jsonl").open("a") as file:
        file.write(json.dumps({"step": step} | result) + "\n")
    save_grid(drawn[:64], names[::every][:64], run / f"grid-{step}.png")
    typer.echo(json.dumps({"step": step} | result, indent=1))


if __name__ == "__main__":
    typer.run(main)
