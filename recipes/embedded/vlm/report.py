"""Scores of a run of embedded.vlm.train for its card: does it truly look, and what does it refuse?

    PYTHONPATH=recipes python -m embedded.vlm.report --run runs/vlm --out runs/vlm/scores.json

Evaluated are the weights rounded to half precision. The unit is the picture: each is asked at most one question of a
kind. A kind of question *is looked at* if, on taught scenes, the 95 % interval with the right picture lies above that
with a wrong picture and above chance. All kinds of `questions.KINDS` are primary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor

from embedded.clip.ship import rate
from embedded.vlm import requests
from embedded.vlm.evaluate import picture_accuracy, right_answers
from embedded.vlm.train import VlmPlan, VlmTrainer, pixels
from mmhooks.data.synthetic.questions import KINDS, Question, ask
from mmhooks.data.synthetic.scenes import (
    COMBINATIONS,
    FONTS,
    SHAPES,
    UNSEEN_FONTS,
    Combination,
    Scene,
    sample_scene,
)
from mmhooks.utils.files import write_text

PICTURES = 1200  # a set
SETS: tuple[tuple[str, Combination, Sequence[str]], ...] = (
    *((name, name, FONTS) for name in COMBINATIONS),
    ("taught, unseen fonts", "taught", UNSEEN_FONTS),
)


def load_run(run: Path) -> tuple[VlmTrainer, Any]:
    """Returns the trainer at its checkpoint, and the running average, rounded to half precision, as a whole model."""
    trainer = VlmTrainer(VlmPlan(**json.loads((run / "plan.json").read_text())), run)
    trainer.resume()
    trainer.average = {k: v.half().float() for k, v in trainer.average.items()}
    return trainer, trainer.averaged_model()


@torch.no_grad()
def projected(model: Any, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b t d"]:
    """Returns what the Llama gets of each picture."""
    parts = [
        model.multi_modal_projector(model.vision_tower(part, output_hidden_states=True).hidden_states[-1])
        for part in images.split(100)
    ]
    return torch.cat(parts)


def picture_scores(trainer: VlmTrainer, model: Any, n: int = PICTURES) -> dict[str, dict[str, Any]]:
    """Returns accuracy with the right and with a wrong picture by set of scenes and kind of question."""
    found = {}
    for name, combination, fonts in SETS:
        rng = random.Random(f"report {name}")
        scenes = [sample_scene(rng, combination, fonts=fonts) for _ in range(n)]
        rows = [[q for kind in KINDS if (q := ask(kind, scene, rng, combination))] for scene in scenes]
        if (
            combination == "unseen concept"
        ):  # what is asked for there is a drawing never seen, not a shape beside it
            rows = [[q for q in row if q.answer not in SHAPES] for row in rows]
        scored = picture_accuracy(model, trainer.packer, rows, projected(model, pixels(scenes)))
        found[name] = {kind: _with_intervals(row) for kind, row in scored.items()}
    return found


def _with_intervals(row: dict[str, float]) -> dict[str, Any]:
    n = int(row["n"])
    return {"n": n, "chance": row["chance"]} | {
        name: rate(round(row[name] * n), n) for name in ("right", "wrong")
    }


def not_looked_at(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the kinds of question whose answers on taught scenes are not shown to depend on the picture."""
    return [
        kind
        for kind, row in scores["taught"].items()
        if row["right"]["low"] <= max(row["wrong"]["high"], row["chance"])
    ]


def request_scores(trainer: VlmTrainer, model: Any, n: int = PICTURES) -> dict[str, Any]:
    """Returns how often requests are answered as taught, word for word: in text by set of names, and about pictures."""
    rng = random.Random("requests")
    found: dict[str, Any] = {}
    for name, names in requests.split_names().items():
        rows = [[requests.text_request(one, rng)] for one in names]
        right = right_answers(model, trainer.packer, rows, None)
        found[f"{name}, in text"] = rate(sum(r[0] for r in right), len(rows)) | {"n": len(rows)}
    scenes = [sample_scene(rng) for _ in range(n)]
    shown = projected(model, pixels(scenes))
    asking: dict[str, Callable[[Scene, random.Random], Question | None]] = {
        "act on the thing shown": requests.act_on_thing,
        "act on the word written": requests.act_on_word,
    }
    for name, make in asking.items():
        made = [(i, q) for i, scene in enumerate(scenes) if (q := make(scene, rng))]
        found[name] = {"n": len(made)} | {
            side: _request_rate(model, trainer, [q for _, q in made], images)
            for side, images in (
                ("right", shown[[i for i, _ in made]]),
                ("wrong", shown[[i for i, _ in made]].roll(1, 0)),
            )
        }
    return found


def _request_rate(
    model: Any, trainer: VlmTrainer, asked: Sequence[Question], images: Float[Tensor, "b t d"]
) -> dict[str, float]:
    right = right_answers(model, trainer.packer, [[q] for q in asked], images)
    return rate(sum(r[0] for r in right), len(asked))


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Returns the scores as lines of text, in per cent."""
    lines = []
    for name, kinds in scores.items():
        lines.append(name)
        lines += [
            f"  {kind:12} right {100 * row['right']['value']:5.1f} wrong {100 * row['wrong']['value']:5.1f} "
            f"chance {100 * row['chance']:4.1f} n {row['n']}"
            for kind, row in kinds.items()
        ]
    return "\n".join(lines)


def main(
    run: Annotated[Path, typer.Option(help="folder of a run of embedded.vlm.train")] = Path("runs/vlm"),
    out: Annotated[Path, typer.Option(help="the scores as JSON")] = Path("runs/vlm/scores.json"),
    pictures: Annotated[int, typer.Option(help="pictures a set")] = PICTURES,
) -> None:
    """Evaluates a run, finished or not."""
    torch.set_num_threads(1)
    trainer, llava = load_run(run)
    scores = picture_scores(trainer, llava.model, pictures)
    asked = request_scores(trainer, llava.model, pictures)
    unseen = not_looked_at(scores)
    write_text(out, json.dumps({"step": trainer.step, "pictures": scores, "requests": asked,
                                "not looked at": unseen}, indent=1) + "\n")  # fmt: skip
    typer.echo(table(scores))
    for name, row in asked.items():
        values = {side: f"{100 * row[side]['value']:.1f}" for side in ("right", "wrong") if side in row}
        typer.echo(f"{name} (n = {row['n']}): {values or round(100 * row['value'], 1)}")
    typer.echo(f"step {trainer.step}; not looked at: {', '.join(unseen) or 'none'}")


if __name__ == "__main__":
    typer.run(main)
