"""Trains the embedded CLIPs, `mini` and `mini-declip`, on free drawings: resumable, seeded, on CPU cores.

    PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules --out runs/corpus
    PYTHONPATH=recipes python -m embedded.clip.train --corpus runs/corpus --out runs/mini
    PYTHONPATH=recipes python -m embedded.clip.train --corpus runs/corpus --out runs/mini-declip --declip

Every step draws its random numbers from (seed, step), so a run that was killed at any moment and resumed ends with the
same weights. `curve.jsonl` records the loss and the held-out retrieval.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedded import losses
from embedded.checkpoints import load_checkpoint, save_checkpoint, starting_point
from embedded.training import (
    cosine_rate,
    keep_plan,
    optimise,
    parameter_groups,
    progress_bar,
    small_attention,
    update_average,
)
from mmhooks.data.sources.drawings import SOURCES, Corpus
from mmhooks.models.embedded import mini


@dataclass(frozen=True)
class Plan:
    """All settings of a run: two runs with equal plans end with equal weights."""

    steps: int = 2800
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 150
    relational: float = 1.0
    word_init: bool = True
    word_lr: float = 0.5
    patch_dropout: float = 0.5
    declip: bool = False
    toned: float = 0.3
    ema: float = 0.998
    seed: int = 0

    def lr_at(self, step: int) -> float:
        return cosine_rate(self.lr, step, steps=self.steps, warmup=self.warmup)


class Trainer:
    """The model, its running average, the optimiser and the data of one plan."""

    model: Any  # open_clip's CLIP, whose attributes are not annotated
    extra: Any
    note = ""  # a step's remark, printed with its loss

    def __init__(self, corpus: Corpus, plan: Plan, out: Path) -> None:
        self.corpus, self.plan, self.out, self.step = corpus, plan, out, 0
        torch.manual_seed(plan.seed)
        self.model = self.build_model(patch_dropout=plan.patch_dropout)
        self.extra = self.build_auxiliary()
        self.tokenizer = mini.tokenizer()
        self.train = corpus.where("train")
        names = sorted({corpus.rows[i]["name"] for i in self.train})
        self.name_ids = {name: i for i, name in enumerate(names)}
        self.teacher = (
            teacher_embeddings(names, out.parent / "teacher.safetensors") if plan.relational else None
        )
        self.initialise()
        weights = {source.style: source.weight for source in SOURCES}
        self.weights = torch.tensor([
            weights.get(row["style"], 1.0) * (plan.toned if row["toned"] else 1.0)
            for row in (corpus.rows[i] for i in self.train)
        ])  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=plan.lr, betas=(0.9, 0.98), fused=True
        )
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.started = starting_point(asdict(plan), [self.model, self.extra], corpus.rows, corpus.rgba)

    # -- hooks for other trainings ---------------------------------------------------------------------
    def build_model(self, *, patch_dropout: float = 0.0) -> Any:
        return mini.build(patch_dropout=patch_dropout)

    def build_auxiliary(self) -> nn.Module:
        """Returns modules that are needed only in training."""
        return losses.SelfSupervision(mini.vocabulary_size()) if self.plan.declip else nn.Identity()

    def initialise(self) -> None:
        if self.plan.word_init:
            init_words(self.model, self.tokenizer, self.out.parent / "words.safetensors")

    def _parameter_groups(self) -> list[dict]:
        named = [*self.model.named_parameters(), *self.extra.named_parameters()]
        return parameter_groups(
            named, "token_embedding.weight", weight_decay=self.plan.weight_decay, word_lr=self.plan.word_lr
        )

    def run_step(self) -> float:
        plan, rows = self.plan, self.corpus.rows
        seed = plan.seed * 1_000_003 + self.step
        g = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        torch.manual_seed(seed)  # patch dropout draws from the global generator
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(self.step) * group["share"]
        chosen = [self.train[i] for i in torch.multinomial(self.weights, plan.batch, generator=g).tolist()]
        rgba = self.corpus.rgba[chosen]
        flip = torch.tensor([losses.may_flip(rows[i]) for i in chosen])
        ids = torch.tensor([self.name_ids[rows[i]["name"]] for i in chosen])
        same = ids[:, None] == ids[None, :]
        tokens = self.tokenizer([losses.caption(rows[i], rng) for i in chosen])
        loss = self._loss(rgba, flip, ids, same, tokens, [rows[i] for i in chosen], rng, g)
        optimise(loss, self.model.parameters(), self.optimizer, self.step)
        self.step += 1
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        update_average(self.average, self.model.state_dict(), plan.ema, self.step)
        return loss.item()

    def _loss(self, rgba, flip, ids, same, tokens, rows, rng, g) -> Float[Tensor, ""]:
        model, plan = self.model, self.plan
        with torch.autocast("cpu", torch.bfloat16):
            images = [model.encode_image(losses.augment(rgba, flip, g)).float()]
            texts = [model.encode_text(tokens).float()]
            if plan.declip:
                images.append(model.encode_image(losses.augment(rgba, flip, g)).float())
                other = self.tokenizer([losses.caption(row, rng) for row in rows])
                masked, where = losses.mask_words(other, mini.mask_id(), g)
                hidden: list[Tensor] = []
                handle = model.ln_final.register_forward_hook(lambda m, args, out: hidden.append(out))
                texts.append(model.encode_text(masked).float())
                handle.remove()
        scale = model.logit_scale.exp()
        pairs = [(i, t) for i in images for t in texts]
        loss = torch.stack([losses.contrastive(i, t, scale, same) for i, t in pairs]).mean()
        if self.teacher is not None:
            loss = loss + plan.relational * losses.relational(texts[0], self.teacher[ids])
        if plan.declip:
            loss = loss + 0.2 * self.extra.image_image(*images)
            loss = loss + 0.2 * self.extra.text_text(hidden[0], other, where)
        return loss

    # -- checkpoints ---------------------------------------------------------------------------------
    def save(self) -> None:
        parts = {"average": self.average, "model": self.model.state_dict(), "extra": self.extra.state_dict()}
        save_checkpoint(self.out / "checkpoint.safetensors", self.step, parts, self.optimizer, self.started)

    def resume(self) -> None:
        self.step, parts = load_checkpoint(self.out / "checkpoint.safetensors", self.optimizer, self.started)
        self.model.load_state_dict(parts["model"])
        self.extra.load_state_dict(parts.get("extra", {}))
        self.average = parts["average"]

    # -- evaluation ----------------------------------------------------------------------------------
    def averaged_model(self):
        """Returns the running average as a model in evaluation mode, which is shipped."""
        model = self.build_model().eval()
        model.load_state_dict(self.average)
        return model

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        averaged_model = self.averaged_model()
        result = {}
        for name, chosen in galleries(self.corpus).items():
            image, text = embed(averaged_model, self.tokenizer, self.corpus, chosen)
            rank = ranks(image, text)
            result[name] = {"n": len(chosen)} | {
                f"R@{k}": (rank < k).float().mean().item() for k in (1, 5, 10)
            }
        return result


def galleries(corpus: Corpus) -> dict[str, list[int]]:
    """Returns the galleries of the card's retrieval: one image per concept, without skin tones and silhouettes.

    Unseen images: the concept was trained on in other styles. Unseen concepts: in no style. Unseen style: 1,000
    drawings of the style that no training image has, whose concepts were trained on.
    """
    seen = {corpus.rows[i]["concept"] for i in corpus.where("train")}
    chosen: dict[str, dict[str, int]] = {"heldout_pictures": {}, "heldout_concepts": {}, "unseen_style": {}}
    order = list(range(len(corpus.rows)))
    random.Random(0).shuffle(order)
    for i in order:
        row = corpus.rows[i]
        split, drawn = row["split"], not row["toned"] and row["style"] != "game-icons"
        if split in chosen and drawn and (row["concept"] in seen) == (split != "heldout_concepts"):
            chosen[split].setdefault(row["concept"], i)
    return {name: list(rows.values())[:1000] for name, rows in chosen.items()}


@torch.no_grad()
def embed(model, tokenizer, corpus: Corpus, chosen: list[int]) -> tuple[Tensor, Tensor]:
    image, text = [], []
    for start in range(0, len(chosen), 512):
        part = chosen[start : start + 512]
        image.append(model.encode_image(losses.plain(corpus.rgba[part])))
        text.append(model.encode_text(tokenizer([corpus.rows[i]["name"] for i in part])))
    return torch.cat(image), torch.cat(text)


def ranks(image: Float[Tensor, "n d"], text: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Returns, for each image, how many texts are closer than its own."""
    scores = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return (scores > scores.diagonal()[:, None]).sum(1).float()


def teacher_embeddings(texts: list[str], cache: Path) -> Float[Tensor, "n 384"]:
    """Returns MiniLM's unit vectors of the training names; cached, because every start needs the same list."""
    if cache.exists():
        found = load_file(cache)["teacher"]
        if len(found) == len(texts):
            return found
    from mmhooks.models.embedders import text_embedder

    vectors = text_embedder("minilm")(texts)
    save_file({"teacher": vectors.contiguous()}, cache)
    return vectors


@torch.no_grad()
def init_words(model, tokenizer, cache: Path) -> None:
    """Initialises each word piece with its MiniLM vector (PCA to the tower's width), so that words that never occur in
    training captions lie near words of similar meaning."""
    width = model.token_embedding.weight.shape[1]
    ordinary = tokenizer.vocab_size - 2
    pieces = [tokenizer.decoder[i].replace("</w>", "") for i in range(ordinary)]
    vectors = teacher_embeddings(pieces, cache)
    vectors = vectors - vectors.mean(0)
    basis = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -width:]
    placed = vectors @ basis
    model.token_embedding.weight[:ordinary] = placed / placed.std() * 0.02


def fit(trainer: Trainer, every: int, save_every: int | None = None) -> None:
    """Runs to the plan's last step, from the checkpoint if there is one; evaluates and saves on the way.

    A run that was killed between two evaluations resumes from its checkpoint; the next row of the curve then averages
    the losses since the resume.
    """
    save_every = save_every or every
    out, steps, batch = trainer.out, trainer.plan.steps, trainer.plan.batch
    if (out / "checkpoint.safetensors").exists():
        trainer.resume()
        typer.echo(f"resumed at step {trainer.step}")
    with progress_bar() as bar, (out / "curve.jsonl").open("a") as curve:
        task = bar.add_task("train", total=steps, completed=trainer.step, note="")
        began, recent = time.perf_counter(), []
        while trainer.step < steps:
            recent.append(trainer.run_step())
            bar.update(task, completed=trainer.step, note=f"loss {recent[-1]:.3f}")
            if trainer.step % every == 0 or trainer.step == steps:
                seconds = time.perf_counter() - began
                row = {"step": trainer.step, "loss": sum(recent) / len(recent),
                       "pairs_per_second": len(recent) * batch / seconds} | trainer.evaluate()  # fmt: skip
                curve.write(json.dumps(row) + "\n")
                curve.flush()
                trainer.save()
                began, recent = time.perf_counter(), []
            elif trainer.step % save_every == 0:
                trainer.save()
                bar.console.print(f"step {trainer.step}: loss {recent[-1]:.3f} {trainer.note}".rstrip())


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    out: Annotated[Path, typer.Option(help="checkpoints and curve")] = Path("runs/mini"),
    declip: Annotated[bool, typer.Option(help="add DeCLIP's image-image and text-text tasks")] = False,
    steps: int = Plan.steps,
    batch: int = Plan.batch,
    relational: Annotated[float, typer.Option(help="weight of MiniLM's neighbourhoods")] = Plan.relational,
    word_init: bool = Plan.word_init,
    word_lr: float = Plan.word_lr,
    patch_dropout: float = Plan.patch_dropout,
    lr: float = Plan.lr,
    seed: int = 0,
    threads: int = 1,
    every: Annotated[int, typer.Option(help="steps between evaluations and checkpoints")] = 100,
) -> None:
    """Trains mini (or, with --declip, mini-declip): PYTHONPATH=recipes python -m embedded.clip.train --corpus runs/corpus"""
    torch.set_num_threads(threads)
    small_attention()
    plan = Plan(steps=steps, batch=batch, lr=lr, relational=relational, word_init=word_init, word_lr=word_lr,
                patch_dropout=patch_dropout, declip=declip, seed=seed)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, out / "plan.json")
    trainer = Trainer(Corpus(corpus), plan, out)
    fit(trainer, every)


if __name__ == "__main__":
    typer.run(main)
