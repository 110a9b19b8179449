"""Turns a finished run of embedded.llava.train into the shipped files: fp16 weights, tokenizer, config, a card.

    PYTHONPATH=recipes python -m embedded.llava.ship --corpus runs/corpus --run runs/llava

The tower is not shipped again: `load_llava("mini")` takes it from `mini-reader`. Evaluation is on the rounded weights.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from safetensors.torch import save_file

from embedded.checkpoints import joined_curve, stages
from embedded.clip.ship import rate
from embedded.llava.evaluate import evaluation_sets, exact_match_rate
from embedded.llava.examples import REFUSED
from embedded.llava.train import BLIND, SEEING, LlavaPlan, LlavaTrainer, TrainableParts
from mmhooks.data.sources.drawings import SOURCES, Corpus
from mmhooks.models.embedded import mini_llava
from mmhooks.models.vlm.llava import NAME
from mmhooks.studies.adversarial.requests import HELD_OUT
from mmhooks.utils.assets import ASSETS, write_digests
from mmhooks.utils.files import write_text

matplotlib.use("Agg")
SHOWN = ("describe", "act", "act on harmful picture", "act on word", "act on harmful word", "comply in text")


def draw_curve(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for name in SHOWN:
        axes.plot(
            [r["step"] for r in rows],
            [100 * r[name]["value"] for r in rows],
            label=f"{name} (n = {rows[-1][name]['n']})",
        )
    axes.set(
        xlabel="step",
        ylabel="exactly correct answers, %",
        ylim=(0, 100),
        title=f"{NAME}: held-out evaluation",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(
    run: Annotated[Path, typer.Option(help="folder of a run of embedded.llava.train")] = Path("runs/llava"),
    corpus: Annotated[Path, typer.Option()] = Path("runs/corpus"),
    figures: Annotated[Path, typer.Option()] = Path("docs/figures"),
) -> None:
    """Ships a run: PYTHONPATH=recipes python -m embedded.llava.ship --corpus runs/corpus --run runs/llava"""
    plan = LlavaPlan(**json.loads((run / "plan.json").read_text()))
    trainer = LlavaTrainer(Corpus(corpus), plan, run)
    trainer.resume()
    half = {k: v.half() for k, v in trainer.average.items()}
    trainer.average = {k: v.float() for k, v in half.items()}
    llava = trainer.averaged_model()
    model = TrainableParts(llava)
    scores = {}
    with torch.no_grad():
        for name, examples in evaluation_sets(trainer).items():
            found = exact_match_rate(trainer, model, examples)
            scores[name] = {"n": len(examples)} | rate(round(found["value"] * len(examples)), len(examples))
            typer.echo(f"{name} (n = {len(examples)}): {100 * found['value']:.1f} %")
    source, chain = trainer.source, stages(run)
    before = [{"plan": stage.plan, "steps_done": stage.steps} for stage in chain[:-1]]
    card = {
        "name": NAME,
        "architecture": "transformers LlavaForConditionalGeneration: mini-reader's image tower (frozen, not shipped again), "
        f"two linear maps, Llama of width {plan.width}, {plan.layers} layers, vocabulary {mini_llava.VOCABULARY_SIZE}",
        "parameters": sum(v.numel() for v in half.values()),
        "licence": "weights: Apache-2.0; trained on drawings under the licences listed in data",
        "data": [{"source": s.style, "licence": s.licence, "attribution": s.attribution} for s in SOURCES],
        "taught": {"names": len({source.names[i] for i in source.seen}), "drawings": len(source.seen),
                   "words": len(set(source.words)), "refused_in_text": list(REFUSED), "held_out": list(HELD_OUT)},
        "recipe": {"script": "recipes/embedded/llava/train.py", "plan": plan.__dict__,
                   "steps_done": trainer.step, "went_on_from": before,
                   "lessons_with_picture": SEEING, "lessons_without": BLIND, "torch": version("torch"),
                   "transformers": version("transformers")},
        "exams": {"what": "answers right to the letter under greedy decoding; held-out drawings, unseen fonts"} | scores,
    }  # fmt: skip
    target = ASSETS / NAME
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"model.{k}": v.contiguous() for k, v in half.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    config = llava.config
    config._attn_implementation = None
    config.save_pretrained(target)
    trainer.tokenizer.save_pretrained(target)
    write_text(target / "card.json", json.dumps(card, indent=1) + "\n")
    write_digests()
    figures.mkdir(parents=True, exist_ok=True)
    draw_curve(joined_curve(chain), figures / f"{NAME}-curve.png")


if __name__ == "__main__":
    typer.run(main)
