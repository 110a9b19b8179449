"""Trains `mini-vlm`: a Llama that answers questions about composed pictures, on mini-reader's image tower, trained on.

    PYTHONPATH=recipes python -m embedded.vlm.train --out runs/vlm

Pictures and questions are `mmhooks.data.synthetic`'s, made anew in every step; nothing but pip packages is needed. First
the tower alone learns to say what stands on each patch (`embedded.vlm.senses`), then tower and Llama learn together
to answer, up to eight questions a picture (`embedded.vlm.packing`). The loss is on answers only. `curve.jsonl` records
the accuracy with the right picture and with a wrong one.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from torch import Tensor

from embedded.checkpoints import starting_point
from embedded.clip.train import Trainer, fit
from embedded.reader.evaluate import embed_texts
from embedded.training import cosine_rate, keep_plan, optimise, parameter_groups, update_average
from embedded.vlm import requests
from embedded.vlm.evaluate import picture_accuracy
from embedded.vlm.packing import Packed, Packer, answer_logits
from embedded.vlm.senses import Senses
from embedded.vlm.tokenizer import tokenizer_of
from mmhooks.data.synthetic import scenes
from mmhooks.data.synthetic.questions import KINDS, Question, ask
from mmhooks.data.synthetic.scenes import UNSEEN_FONTS, Scene, sample_scene
from mmhooks.errors import MMHooksError
from mmhooks.models.embedded import mini, mini_vlm


@dataclass(frozen=True)
class VlmPlan:
    tower_steps: int = 1200  # first: the tower alone
    steps: int = 3600
    batch: int = 32  # pictures a step
    blind: int = 3  # rows of requests without a picture a step
    questions: int = 8  # a row
    lr: float = 1.2e-3
    tower_lr: float = 4e-4  # while it learns alone
    tower_share: float = 0.1  # of the Llama's learning rate, afterwards
    senses: float = 0.3  # weight of the patches' loss beside the answers'
    weight_decay: float = 0.05
    word_lr: float = 0.6
    warmup: int = 100
    ema: float = 0.998
    width: int = 192
    layers: int = 4
    seed: int = 0

    def rates(self, step: int) -> dict[str, float]:
        """Returns the learning rates of the tower, of projector and words ("bridge"), and of the Llama's layers."""
        if step < self.tower_steps:
            alone = cosine_rate(self.tower_lr, step, steps=self.tower_steps, warmup=self.warmup)
            return {"tower": alone, "bridge": 2 * alone, "llama": 0.0}
        lr = cosine_rate(
            self.lr, step - self.tower_steps, steps=self.steps - self.tower_steps, warmup=self.warmup
        )
        return {"tower": lr * self.tower_share, "bridge": lr, "llama": lr}

    def senses_at(self, step: int) -> float:
        """Returns the weight of the patches' loss: whole at first, none from the middle of the second stage on."""
        if step < self.tower_steps:
            return 1.0
        return self.senses * max(0.0, 1 - 2 * (step - self.tower_steps) / (self.steps - self.tower_steps))


def pixels(made: list[Scene]) -> Float[Tensor, "b 3 64 64"]:
    """Renders scenes, from -1 to 1."""
    images = np.stack([scenes.render(scene, scenes.openmoji_drawing) for scene in made])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def questions_about(scene: Scene, rng: random.Random, most: int) -> list[Question]:
    """Draws at most one question of each kind, and now and then a request to act, ``most`` in all."""
    made = [ask(kind, scene, rng) for kind in KINDS]
    if rng.random() < 0.3:
        made.append(requests.act_on_thing(scene, rng))
    if rng.random() < 0.15:
        made.append(requests.act_on_word(scene, rng))
    if rng.random() < 0.15:
        made.append(requests.taught_request(rng))
    found = [question for question in made if question is not None]
    rng.shuffle(found)
    return found[:most]


class VlmTrainer(Trainer):
    """Tower, projector, Llama and the heads that teach the tower; resumes with the bits of an uninterrupted run."""

    plan: VlmPlan  # type: ignore[assignment]

    def __init__(self, plan: VlmPlan, out: Path, *, until: float = float("inf")) -> None:
        self.plan, self.out, self.step, self.until = plan, out, 0, until
        torch.manual_seed(plan.seed)
        self.tokenizer = tokenizer_of()
        self.packer = Packer(self.tokenizer)
        self.llava = self.build_model()
        self.model, self.extra = self.llava.model, Senses(self.packer.vocabulary)
        self.initialise()
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=plan.lr, betas=(0.9, 0.98), fused=True
        )
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.started = starting_point(asdict(plan), [self.model, self.extra])

    def build_model(self, *, patch_dropout: float = 0.0) -> Any:
        plan = mini_vlm.config(width=self.plan.width, layers=self.plan.layers, vocabulary=len(self.tokenizer),
                                 image_token=self.packer.vocabulary["<image>"])  # fmt: skip
        plan._attn_implementation = "eager"  # torch's fused attention is slow backward on CPUs
        return mini_vlm.build(plan)

    @torch.no_grad()
    def initialise(self) -> None:
        """Words start from mini-reader's text embeddings (PCA to the width), so that similar words are close; the tower
        is trained, but for the convolutions that find letters."""
        model, tokenizer, _ = mini.load_embedded(mini_vlm.TOWER)
        words = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        vectors = F.normalize(embed_texts(model, tokenizer, words), dim=-1)
        vectors = vectors - vectors.mean(0)
        table = self.model.language_model.embed_tokens.weight
        placed = vectors @ torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -table.shape[1] :]
        table.copy_(placed / placed.std() * 0.02)
        self.model.vision_tower.requires_grad_(True)
        stem = self.model.vision_tower.embeddings.patch_embedding
        stem.letters.requires_grad_(False)
        stem.word.requires_grad_(False)

    def _parameter_groups(self) -> list[dict]:
        parts: dict[str, list] = {"tower": [], "bridge": [*self.extra.named_parameters()], "llama": []}
        for name, p in self.model.named_parameters():
            tower, layers = name.startswith("vision_tower."), name.startswith("language_model.layers.")
            if p.requires_grad:
                parts["tower" if tower else "llama" if layers else "bridge"].append((name, p))
        plan = self.plan
        return [
            group | {"part": part}
            for part, named in parts.items()
            for group in parameter_groups(
                named, "embed_tokens.weight", weight_decay=plan.weight_decay, word_lr=plan.word_lr
            )
        ]

    # -- one step --------------------------------------------------------------------------------------
    def run_step(self) -> float:
        """Takes one step.

        Raises:
            Stopped: the time given to this run is over; the checkpoint is written.
        """
        if time.time() > self.until:
            self.save()
            raise Stopped(
                f"expected more time, got the end of this run's at step {self.step}; start it again to go on"
            )
        plan = self.plan
        rng = random.Random(plan.seed * 1_000_003 + self.step)
        rates = plan.rates(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["part"]] * group["share"]
        made = [sample_scene(rng) for _ in range(plan.batch)]
        features = self.features(pixels(made))
        projected = self.model.multi_modal_projector(features)
        senses = self.extra.loss(projected, self.model.language_model.embed_tokens.weight, made)
        loss = plan.senses_at(self.step) * senses
        if self.step >= plan.tower_steps:
            rows = [questions_about(scene, rng, plan.questions) for scene in made]
            rows += [[requests.taught_request(rng) for _ in range(plan.questions)] for _ in range(plan.blind)]
            packed = self.packer(rows, sees=[True] * plan.batch + [False] * plan.blind)
            loss = loss + self.answer_loss(packed, projected)
        trained = [*self.model.parameters(), *self.extra.parameters()]
        optimise(loss, trained, self.optimizer, self.step)
        self.step += 1
        update_average(self.average, self.model.state_dict(), plan.ema, self.step)
        self.note = f"(patches {senses.item():.3f})"
        return loss.item()

    def features(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b t d"]:
        return self.model.vision_tower(images, output_hidden_states=True).hidden_states[-1]

    def answer_loss(self, packed: Packed, projected: Float[Tensor, "b t d"] | None) -> Float[Tensor, ""]:
        """Returns the cross-entropy of the answers' tokens; each answer weighs the same, however long."""
        logits, truth = answer_logits(self.model, packed, projected, self.packer.vocabulary["<image>"])
        owners = packed.owners()
        weight = 1 / torch.bincount(owners)[owners].float()
        losses = F.cross_entropy(logits.float(), truth, reduction="none")
        return (losses * weight).sum() / weight.sum()

    # -- evaluation ----------------------------------------------------------------------------------
    def averaged_model(self) -> Any:
        """Returns the running average as a whole LLaVA in evaluation mode, which is shipped."""
        llava = self.build_model()
        llava.model.load_state_dict(self.average)
        return llava.eval()

    @torch.no_grad()
    def evaluate(self, n: int = 200) -> dict:
        """Returns what the patches say of ``n`` new pictures, and answers with the right and with a wrong one."""
        rng = random.Random("curve")
        model = self.averaged_model().model
        made = [sample_scene(rng, fonts=UNSEEN_FONTS) for _ in range(n)]
        features = model.vision_tower(pixels(made), output_hidden_states=True).hidden_states[-1]
        projected = model.multi_modal_projector(features)
        found: dict[str, Any] = {
            "patches": self.extra.accuracy(projected, model.language_model.embed_tokens.weight, made)
        }
        if self.step > self.plan.tower_steps:
            rows = [[q for kind in KINDS if (q := ask(kind, scene, rng))] for scene in made]
            found["answers"] = picture_accuracy(model, self.packer, rows, projected)
        return found


class Stopped(MMHooksError):
    """A training that stopped because its time was over."""


def main(
    out: Annotated[Path, typer.Option(help="checkpoint, tokenizer and curve")] = Path("runs/vlm"),
    steps: int = VlmPlan.steps,
    tower_steps: int = VlmPlan.tower_steps,
    seed: int = 0,
    threads: int = 1,
    minutes: Annotated[float, typer.Option(help="stop after that long, with a checkpoint")] = float("inf"),
    every: Annotated[int, typer.Option(help="steps between evaluations")] = 500,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 100,
) -> None:
    """Trains mini-vlm, or goes on where --out has a checkpoint."""
    until = time.time() + 60 * minutes
    torch.set_num_threads(threads)
    plan = VlmPlan(steps=steps, tower_steps=tower_steps, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, out / "plan.json")
    trainer = VlmTrainer(plan, out, until=until)
    trainer.tokenizer.save_pretrained(out / "tokenizer")
    try:
        fit(trainer, every, save_every)
    except Stopped as end:
        typer.echo(str(end))


if __name__ == "__main__":
    typer.run(main)
