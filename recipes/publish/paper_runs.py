"""Runs every study with ``--paper`` on its full-size architecture with random weights, and writes what that took into
docs/paper-settings.md.

    PYTHONPATH=recipes python -m publish.paper_runs runs/paper      # about 16 minutes on one core

A study whose results are there already is not run again. Where no library builds a model without weights by its name
(Stable Diffusion 2, LLaVA 1.5), a checkpoint with random weights is written first: the widths of the published model,
fewer layers and smaller images, so that a CPU can run it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from mmhooks.report import Table
from publish.marked_block import fill

ROOT = Path(__file__).parents[2]
TEXTS = "# place\na beach\na forest\na lake\na desert\n# colour\nred\ngreen\nblue\n# animal\na dog\na cat\na bird\n"


@dataclass(frozen=True)
class PaperRun:
    """A study, its options beside ``--paper``, and what of the paper's model is smaller.

    ``{here}`` in an option is the folder of the runs.
    """

    study: str
    options: str
    model: str

    def words(self, here: Path) -> list[str]:
        """Returns the command's words."""
        return [f"recipes/{self.study}.py", "--paper", *self.options.format(here=here).split()]


RUNS = (
    PaperRun("modality", "--pretrained= --data mini --limit 32 --image-embedder efficientnet-lite0 --epochs 2 --draws 4",
             "CLIP ViT-B/32"),
    PaperRun("gender", "--pretrained= --data mini --labels codepoints --confidence 0 --person 0 --limit 48 --epochs 2 --draws 4",
             "CLIP ViT-B/32"),
    PaperRun("adversarial", "--pretrained= --data mini --victim {here}/llava --judge rules --limit 8 --calibration 4 "
             "--repeats 1 --answer-tokens 2 --steps 2",
             "CLIP ViT-B/32; LLaVA-1.5-7b's widths with 2 of 32 layers, 4 of 24 vision layers, images of 112 px"),
    PaperRun("generation", "--pretrained= --pipeline {here}/sd2 --data mini --limit 16 --pairs 2 --curve-pairs 1 --random-sets 8 "
             "--strength 0.9 --steps 2 --epochs 2",
             "CLIP ViT-H/14; Stable Diffusion 2's widths with 1 of 2 layers a block, 2 of 23 text layers, images of 64 px"),
    PaperRun("decomposition", "--pretrained= --pool {here}/texts.txt --limit 16 --evaluate 3", "CLIP ViT-L/14"),
    PaperRun("segmentation", "--pretrained= --limit 4 --classes predicted", "CLIP ViT-L/14"),
    PaperRun("spurious", "--pretrained= --pool {here}/texts.txt --limit 8 --draws 2 --direct-draws 20", "CLIP ViT-L/14"),
)  # fmt: skip


def random_sd2(folder: Path) -> None:
    """Writes a pipeline with the widths of Stable Diffusion 2 and random weights; its tokenizer is mini's."""
    import torch

    from mmhooks.models.blueprints import SD2_TEXT, SD2_UNET, SD_VAE
    from mmhooks.models.embedded.mini_sd import mini_pipeline

    torch.manual_seed(0)
    pipe, diffusers, hf = mini_pipeline(), import_module("diffusers"), import_module("transformers")
    pipe.register_modules(
        unet=diffusers.UNet2DConditionModel(sample_size=8, **SD2_UNET | {"layers_per_block": 1}),
        vae=diffusers.AutoencoderKL(**SD_VAE | {"layers_per_block": 1, "sample_size": 64}),
        text_encoder=hf.CLIPTextModel(hf.CLIPTextConfig(**SD2_TEXT | {"num_hidden_layers": 2})),
    )
    pipe.save_pretrained(folder)


def random_llava(folder: Path) -> None:
    """Writes a LLaVA with the widths of LLaVA-1.5-7b and random weights in bfloat16; its tokenizer is mini-vlm's."""
    import torch

    from mmhooks.models.blueprints import LLAVA_SHAPES, LLAVA_TEXT, LLAVA_VISION
    from mmhooks.models.vlm.llava import load_llava

    mini: Any = load_llava()
    hf = import_module("transformers")
    torch.manual_seed(0)
    text = hf.LlamaConfig(
        **LLAVA_TEXT | LLAVA_SHAPES["llava-hf/llava-1.5-7b-hf"] | {"num_hidden_layers": 2}, pad_token_id=0
    )
    vision = hf.CLIPVisionConfig(**LLAVA_VISION | {"num_hidden_layers": 4, "image_size": 112})
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=64,
        image_token_index=mini.model.config.image_token_index,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    processor: Any = mini.processor
    side = {"height": 112, "width": 112}
    processor.image_processor = hf.CLIPImageProcessor(size=side, crop_size=side)
    processor.patch_size, processor.vision_feature_select_strategy = 14, "default"
    processor.save_pretrained(folder)


def texts(path: Path) -> None:
    """Writes a pool of few texts: random weights say nothing about more."""
    path.write_text(TEXTS, encoding="utf-8")


INPUTS: dict[str, Callable[[Path], None]] = {"sd2": random_sd2, "llava": random_llava, "texts.txt": texts}


def prepare(here: Path, options: str) -> None:
    """Writes those inputs that the options name and that are not there yet."""
    for name, write in INPUTS.items():
        path = here / name
        if f"{{here}}/{name}" in options and not path.exists():
            write(path)


def block(here: Path) -> str:
    """Returns a row a study: its options, what of the model is smaller, and seconds and peak memory of a run that ended."""
    rows = []
    for run in RUNS:
        path, took = here / run.study / "results.json", ["–", "–"]
        if path.exists():
            env = json.loads(path.read_text(encoding="utf-8"))["environment"]
            took = [f"{env['seconds']:.0f}", f"{env['peak_memory_gb']:.1f}"]
        rows.append([run.study, run.model, run.options.format(here="runs/paper"), *took])
    columns = ["Study", "Random weights of", "Options beside --paper", "seconds", "peak memory, GB"]
    return Table(
        columns, rows, "--paper at full size, random weights",
        "A run with seconds ended and wrote its results, tables and page; no number in them means anything. –: not run here. One "
        "thread; the other core did other work.",
        text_columns=(0, 1, 2),
    ).markdown()  # fmt: skip


def main(
    here: Annotated[Path, typer.Argument(help="Folder of the runs, a folder a study.")],
    page: Annotated[Path, typer.Option(help="The page with the two markers.")] = ROOT
    / "docs/paper-settings.md",
) -> None:
    """Runs what has no results yet, then fills the page."""
    here.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        out = here / run.study
        if not (out / "results.json").exists():
            prepare(here, run.options)
            subprocess.run([sys.executable, *run.words(here), "--out", str(out)], cwd=ROOT, check=True)
    fill(page, block(here), slot="runs")


if __name__ == "__main__":
    typer.run(main)
