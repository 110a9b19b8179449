"""Train the embedded CLIPs, `mini` and `mini-declip`, on free drawings: resumable, seeded, on CPU cores.

    PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules --out runs/corpus
    PYTHONPATH=recipes python -m embedded.clip.train --corpus runs/corpus --out runs/mini
    PYTHONPATH=recipes python -m embedded.clip.train --corpus runs/corpus --out runs/mini-declip --declip

Every step draws its own random numbers from (seed, step), so a run killed at any moment and started again
ends with the same weights. `curve.jsonl` keeps the loss and the held-out retrieval as they rise.
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedded import losses
from embedded.checkpoints import load_checkpoint, save_checkpoint, starting_point
from mmhooks.data.sources.drawings import SOURCES, Corpus
from mmhooks.models.embedded import mini


@dataclass(frozen=True)
class Plan:
    """What a run is: two runs of one plan end with the same weights."""

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
        ramp = min(1.0, (step + 1) / self.warmup)
        return self.lr * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))


class Trainer:
    """The model, its running average, the optimiser and the data of one plan."""

    model: Any  # open_clip's CLIP, whose parts its annotations do not know
    extra: Any
    note = ""  # what a step wants to say beside its loss

    def __init__(self, corpus: Corpus, plan: Plan, out: Path) -> None:
        self.corpus, self.plan, self.out, self.step = corpus, plan, out, 0
        torch.manual_seed(plan.seed)
        self.model = self.fresh(patch_dropout=plan.patch_dropout)
        self.extra = self.auxiliary()
        self.tokenizer = mini.tokenizer()
        self.train = corpus.where("train")
        names = sorted({corpus.rows[i]["name"] for i in self.train})
        self.name_ids = {name: i for i, name in enumerate(names)}
        self.teacher = (
            teacher_embeddings(names, out.parent / "teacher.safetensors") if plan.relational else None
        )
        self.start()
        weights = {source.style: source.weight for source in SOURCES}
        self.weights = torch.tensor([
            weights.get(row["style"], 1.0) * (plan.toned if row["toned"] else 1.0)
            for row in (corpus.rows[i] for i in self.train)
        ])  # fmt: skip
        self.optimizer = torch.optim.AdamW(self._groups(), lr=plan.lr, betas=(0.9, 0.98), fused=True)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.started = starting_point(asdict(plan), [self.model, self.extra], corpus.rows, corpus.rgba)

    # -- what a kind of training changes ---------------------------------------------------------------
    def fresh(self, *, patch_dropout: float = 0.0) -> Any:
        return mini.build(patch_dropout=patch_dropout)

    def auxiliary(self) -> nn.Module:
        """Modules that only the training needs."""
        return losses.SelfSupervision(mini.vocabulary_size()) if self.plan.declip else nn.Identity()

    def start(self) -> None:
        if self.plan.word_init:
            init_words(self.model, self.tokenizer, self.out.parent / "words.safetensors")

    def _groups(self) -> list[dict]:
        decay, plain, words = [], [], []
        for name, p in [*self.model.named_parameters(), *self.extra.named_parameters()]:
            (words if name == "token_embedding.weight" else decay if p.ndim > 1 else plain).append(p)
        return [{"params": decay, "weight_decay": self.plan.weight_decay, "share": 1.0},
                {"params": plain, "weight_decay": 0.0, "share": 1.0},
                {"params": words, "weight_decay": 0.0, "share": self.plan.word_lr}]  # fmt: skip

    def run_step(self) -> float:
        plan, rows = self.plan, self.corpus.rows
        seed = plan.seed * 1_000_003 + self.step
        g = torch.Generator().manual_seed(seed)
        dice = random.Random(seed)
        torch.manual_seed(seed)  # patch dropout draws from the global generator
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(self.step) * group["share"]
        chosen = [self.train[i] for i in torch.multinomial(self.weights, plan.batch, generator=g).tolist()]
        rgba = self.corpus.rgba[chosen]
        flip = torch.tensor([losses.may_flip(rows[i]) for i in chosen])
        ids = torch.tensor([self.name_ids[rows[i]["name"]] for i in chosen])
        same = ids[:, None] == ids[None, :]
        tokens = self.tokenizer([losses.caption(rows[i], dice) for i in chosen])
        loss = self._loss(rgba, flip, ids, same, tokens, [rows[i] for i in chosen], dice, g)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.step}; the last checkpoint is whole"
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            keep = min(plan.ema, (1 + self.step) / (10 + self.step))
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        return loss.item()

    def _loss(self, rgba, flip, ids, same, tokens, rows, dice, g) -> Float[Tensor, ""]:
        model, plan = self.model, self.plan
        with torch.autocast("cpu", torch.bfloat16):
            images = [model.encode_image(losses.augment(rgba, flip, g)).float()]
            texts = [model.encode_text(tokens).float()]
            if plan.declip:
                images.append(model.encode_image(losses.augment(rgba, flip, g)).float())
                other = self.tokenizer([losses.caption(row, dice) for row in rows])
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

    # -- what it learned -----------------------------------------------------------------------------
    def judge(self):
        """The running average as a model in evaluation mode: what ships."""
        model = self.fresh().eval()
        model.load_state_dict(self.average)
        return model

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        judge = self.judge()
        result = {}
        for name, chosen in galleries(self.corpus).items():
            image, text = embed(judge, self.tokenizer, self.corpus, chosen)
            rank = ranks(image, text)
            result[name] = {"n": len(chosen)} | {
                f"R@{k}": (rank < k).float().mean().item() for k in (1, 5, 10)
            }
        return result


def galleries(corpus: Corpus) -> dict[str, list[int]]:
    """One picture a concept, no skin tones or silhouettes: what the card's retrieval is measured on.

    Unseen pictures: the concept was trained on in other styles. Unseen concepts: in no style. Unseen style:
    1,000 drawings of the style that no training picture comes from, whose concepts were trained on.
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
    """For each picture, how many texts lie closer than its own."""
    scores = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return (scores > scores.diagonal()[:, None]).sum(1).float()


def teacher_embeddings(texts: list[str], cache: Path) -> Float[Tensor, "n 384"]:
    """MiniLM's unit vectors of the training names; kept, since the same list comes back at every start."""
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
    """Start each word piece where MiniLM puts it (PCA to the tower's width), so that words never captioned
    in training lie near words of like meaning."""
    width = model.token_embedding.weight.shape[1]
    ordinary = tokenizer.vocab_size - 2
    pieces = [tokenizer.decoder[i].replace("</w>", "") for i in range(ordinary)]
    vectors = teacher_embeddings(pieces, cache)
    vectors = vectors - vectors.mean(0)
    basis = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -width:]
    placed = vectors @ basis
    model.token_embedding.weight[:ordinary] = placed / placed.std() * 0.02


def keep_plan(plan: Plan, path: Path) -> None:
    """One folder, one plan: resuming under other settings would mix two runs."""
    wanted = asdict(plan)
    if path.exists() and (found := json.loads(path.read_text())) != wanted:
        differ = {k: (found.get(k), v) for k, v in wanted.items() if found.get(k) != v}
        raise typer.BadParameter(f"{path.parent} holds a run of another plan {differ}; choose another --out")
    path.write_text(json.dumps(wanted, indent=1) + "\n")


def small_attention() -> None:
    """Spell attention out while training: torch's fused CPU kernel spends half of a step in its backward
    at 33 tokens (measured: 134 against 285 samples/s on one core)."""

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1).to(v.dtype) @ v

    F.scaled_dot_product_attention = attend


def fit(trainer: Trainer, every: int, save_every: int | None = None) -> None:
    """Run to the plan's last step, from the checkpoint if there is one; evaluate and save on the way.

    A row of the curve is written once: a run that was killed between two evaluations goes on from its
    checkpoint with the losses since then.
    """
    save_every = save_every or every
    out, steps, batch = trainer.out, trainer.plan.steps, trainer.plan.batch
    if (out / "checkpoint.safetensors").exists():
        trainer.resume()
        typer.echo(f"resumed at step {trainer.step}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns) as bar, (out / "curve.jsonl").open("a") as curve:
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
    """Train mini (or, with --declip, mini-declip): PYTHONPATH=recipes python -m embedded.clip.train --corpus runs/corpus"""
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
