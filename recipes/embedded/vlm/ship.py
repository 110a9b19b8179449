"""Turns a run of embedded.vlm.train that truly looks into the shipped files: fp16 weights, tokenizer, config, a card.

    PYTHONPATH=recipes python -m embedded.vlm.ship --run runs/vlm

Refuses a run in which some kind of question is answered no better with the right picture than with a wrong one.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from safetensors.torch import save_file

from embedded.vlm import requests
from embedded.vlm.report import PICTURES, load_run, not_looked_at, picture_scores, request_scores
from embedded.vlm.train import pixels
from mmhooks.data.sources import openmoji
from mmhooks.data.synthetic.questions import KINDS, ask
from mmhooks.data.synthetic.scenes import TAUGHT, UNSEEN, UNSEEN_FONTS, WORDS, sample_scene
from mmhooks.errors import MMHooksError
from mmhooks.models.embedded import mini_vlm
from mmhooks.models.vlm.model import HookedVLM
from mmhooks.utils.assets import ASSETS, write_digests
from mmhooks.utils.files import write_text

matplotlib.use("Agg")
NAME = "mini-vlm"
LARGEST = 14e6  # bytes of the weights


def write_model(llava: Any, tokenizer: Any, target: Path) -> int:
    """Writes what `mini_vlm.load_from` reads; returns the bytes of the weights.

    Raises:
        MMHooksError: the weights are larger than the package allows.
    """
    state = llava.state_dict()
    del state["lm_head.weight"]  # the token table
    half = {k: v.half().contiguous() for k, v in state.items()}
    size = sum(2 * v.numel() for v in half.values())
    if size > LARGEST:
        raise MMHooksError(
            f"expected at most {LARGEST:.0f} bytes of weights, got {size}; choose a smaller plan"
        )
    target.mkdir(parents=True, exist_ok=True)
    save_file(half, target / "model.safetensors", {"format": "pt"})
    config = deepcopy(llava.config)
    config._attn_implementation = None  # that of the training is not the user's
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return size


def draw_curve(rows: list[dict], path: Path) -> None:
    """Draws, by kind of question, accuracy with the right picture minus that with a wrong one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for kind, last in rows[-1]["answers"].items():
        gain = [100 * (row["answers"][kind]["right"] - row["answers"][kind]["wrong"]) for row in rows]
        axes.plot([row["step"] for row in rows], gain, label=f"{kind} (n = {last['n']:.0f})")
    axes.set(
        xlabel="step", ylabel="right minus wrong picture, points", title=f"{NAME}: new pictures, unseen fonts"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


@torch.no_grad()
def draw_answers(shipped: Path, path: Path, n: int = 15) -> None:
    """Draws pictures with a question of each kind in turn and the answer, red where it is wrong; none is chosen by hand."""
    import matplotlib.pyplot as plt

    rng, made = random.Random("gallery"), []
    while len(made) < n:
        scene = sample_scene(rng, fonts=UNSEEN_FONTS)
        question = ask(KINDS[len(made) % len(KINDS)], scene, rng)
        if question is not None:
            made.append((scene, question))
    images = pixels([scene for scene, _ in made])
    speaker = HookedVLM(*mini_vlm.load_from(shipped))
    said = speaker.answer(images / 2 + 0.5, [question.text for _, question in made], max_new_tokens=4)
    figure, grid = plt.subplots(-(-n // 5), 5, figsize=(10, 2.4 * -(-n // 5)), layout="constrained")
    for axes, (_, question), picture, answer in zip(grid.flat, made, images, said, strict=True):
        axes.imshow(picture.permute(1, 2, 0) / 2 + 0.5)
        right = answer == question.answer
        axes.set_title(f"{question.text}\n{answer}", fontsize=8, color="black" if right else "firebrick")
        axes.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    run: Annotated[Path, typer.Option(help="folder of a run of embedded.vlm.train")] = Path("runs/vlm"),
    assets: Annotated[Path, typer.Option(help="where the folder mini-vlm goes")] = ASSETS,
    pictures: Annotated[int, typer.Option(help="pictures a set")] = PICTURES,
    figures: Annotated[Path, typer.Option()] = Path("docs/figures"),
) -> None:
    """Ships a run: PYTHONPATH=recipes python -m embedded.vlm.ship --run runs/vlm"""
    torch.set_num_threads(1)
    trainer, llava = load_run(run)
    scores = picture_scores(trainer, llava.model, pictures)
    unseen = not_looked_at(scores)
    if unseen:
        raise MMHooksError(
            f"expected answers that depend on the picture, got none such for {', '.join(unseen)} at step {trainer.step}; "
            "train on (python -m embedded.vlm.train), and see python -m embedded.vlm.report"
        )
    size = write_model(llava, trainer.tokenizer, assets / NAME)
    plan, names = trainer.plan, requests.split_names()
    card = {
        "name": NAME,
        "architecture": "transformers LlavaForConditionalGeneration: mini-reader's image tower, trained on and shipped, two "
        f"linear maps, Llama of width {plan.width}, {plan.layers} layers, {len(trainer.tokenizer)} whole words",
        "parameters": size // 2,
        "licence": "weights: Apache-2.0; trained on drawings under the licence listed in data",
        "data": [{"source": openmoji.STYLE, "licence": openmoji.LICENCE, "attribution": openmoji.ATTRIBUTION}],
        "taught": {"drawings": list(TAUGHT), "drawings_never_seen": list(UNSEEN), "words": list(WORDS),
                   "names_in_requests": {name: len(row) for name, row in names.items()}},
        "recipe": {"script": "recipes/embedded/vlm/train.py", "plan": plan.__dict__, "steps_done": trainer.step,
                   "first_stage": "until tower_steps, and fading beside the answers until the middle of the rest, projected "
                   "patches are pulled towards the words for what stands on them: that a lens reads names off image tokens "
                   "was taught",
                   "torch": version("torch"), "transformers": version("transformers")},
        "exams": {"what": "answers right to the last word under greedy decoding, new pictures; right: the picture asked about, "
                  "wrong: another one; chance: a guess among equally likely answers",
                  "pictures": scores, "requests": request_scores(trainer, llava.model, pictures)},
    }  # fmt: skip
    write_text(assets / NAME / "card.json", json.dumps(card, indent=1) + "\n")
    write_digests(assets)
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    figures.mkdir(parents=True, exist_ok=True)
    draw_answers(assets / NAME, figures / f"{NAME}-answers.png")
    draw_curve([row for row in rows if "answers" in row], figures / f"{NAME}-curve.png")


if __name__ == "__main__":
    typer.run(main)
