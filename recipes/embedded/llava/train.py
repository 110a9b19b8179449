"""Train `mini-llava`: a Llama of 3.8 M parameters that sees through mini-reader's frozen tower. Resumable, seeded.

    PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules --out runs/corpus
    PYTHONPATH=recipes python -m embedded.llava.train --corpus runs/corpus --out runs/llava  # stopped at step 800
    PYTHONPATH=recipes python -m embedded.llava.train --corpus runs/corpus --out runs/llava-2 --start llava --steps 320 \\
        --lr 1.2e-3 --warmup 10 --ema 0.98 --seed 1 --every 80

Loss on answers only. Pictures go through the frozen tower in every step, each time turned, coloured and written on
anew: the tower is a fifth of a step's work, and no picture is seen twice. `curve.jsonl` keeps the loss and, on held-out
pictures, how many answers are right to the letter. Fonts to install: `reader_words.py`.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from embedded import losses
from embedded.checkpoints import starting_point
from embedded.clip.train import Trainer, fit, keep_plan, teacher_embeddings
from embedded.llava.evaluate import exam, right
from embedded.llava.lessons import EXTRA_WORDS, Curriculum, Lesson
from embedded.llava.tokenizer import save_tokenizer, spelled, tokenizer_of
from embedded.reader.words import FONTS, Vocabulary, Written, font_paths, place, word_picture, write
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import objects
from mmhooks.models.embedded import mini_llava

# Lessons of a step with a picture: kind -> number, and of a step without.
SEEING = {"describe": 22, "act": 30, "describe with word": 2, "act with word": 4, "read": 4, "act on word": 14,
          "comply": 3, "refuse": 3}  # fmt: skip
BLIND = {"comply": 12, "refuse": 6}


@dataclass(frozen=True)
class LlavaPlan:
    steps: int = 1700
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 100
    word_lr: float = 0.6
    ema: float = 0.997
    width: int = 256
    layers: int = 4
    seed: int = 0
    start: str = ""  # name of a run beside this one, to go on from its average under a new schedule
    batch: int = sum(SEEING.values()) + sum(BLIND.values())

    def lr_at(self, step: int) -> float:
        ramp = min(1.0, (step + 1) / self.warmup)
        return self.lr * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))


class Speaker(nn.Module):
    """What learns: projector and Llama. The output layer is the word table (tied)."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.multi_modal_projector = llava.model.multi_modal_projector
        self.language_model = llava.model.language_model

    @property
    def words(self) -> nn.Embedding:
        return self.language_model.embed_tokens  # type: ignore[return-value]

    def forward(self, ids: Tensor, answer: Tensor, features: Tensor | None, image_id: int) -> Tensor:
        """Logits of every token of the answers, from the place before it."""
        x = self.words(ids)
        if features is not None:
            seen = self.multi_modal_projector(features).to(x.dtype)
            x = x.masked_scatter((ids == image_id)[..., None], seen)
        hidden = self.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
        return hidden[:, :-1][answer[:, 1:]] @ self.words.weight.T


class LlavaTrainer(Trainer):
    plan: LlavaPlan  # type: ignore[assignment]

    def __init__(self, corpus: Corpus, plan: LlavaPlan, out: Path) -> None:
        self.corpus, self.plan, self.out, self.step = corpus, plan, out, 0
        torch.manual_seed(plan.seed)
        vocabulary = Vocabulary.of(corpus)
        others = random.Random("others").sample(vocabulary.others, 300)
        self.course = Curriculum.of(corpus, [*vocabulary.names * 3, *EXTRA_WORDS * 6, *others])
        self.tokenizer = tokenizer_of(self.course)
        self.fonts = font_paths(FONTS)
        self.llava = self.fresh()
        self.tower: Any = self.llava.model.vision_tower
        self.model, self.extra = Speaker(self.llava), nn.Identity()
        self.go_on() if plan.start else self.start()
        self.weights = {
            rows: torch.tensor(self.course.weights(getattr(self.course, rows))) for rows in ("seen", "usable")
        }
        self.optimizer = torch.optim.AdamW(self._groups(), lr=plan.lr, betas=(0.9, 0.98), fused=True)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.started = starting_point(asdict(plan), [self.model, self.extra], corpus.rows, corpus.rgba)

    def fresh(self, *, patch_dropout: float = 0.0) -> Any:
        plan = mini_llava.config(width=self.plan.width, layers=self.plan.layers, vocabulary=len(self.tokenizer),
                                 image_token=self.image_id)  # fmt: skip
        plan._attn_implementation = (
            "eager"  # torch's fused attention is slow backward on CPUs (see embedded.clip.train)
        )
        return mini_llava.build(plan)

    @property
    def image_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<image>")

    @torch.no_grad()
    def start(self) -> None:
        """Word pieces start where MiniLM puts them (PCA to the width): a word never asked for lies near its like."""
        table = self.model.words.weight
        vectors = teacher_embeddings(spelled(self.tokenizer), self.out.parent / "llava-words.safetensors")
        vectors = vectors - vectors.mean(0)
        placed = vectors @ torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -table.shape[1] :]
        table.copy_(placed / placed.std() * 0.02)

    def go_on(self) -> None:
        found = load_file(self.out.parent / self.plan.start / "checkpoint.safetensors")
        part = {k.removeprefix("average."): v for k, v in found.items() if k.startswith("average.")}
        self.model.load_state_dict(part)

    def _groups(self) -> list[dict]:
        decay, plain, words = [], [], []
        for name, p in self.model.named_parameters():
            (words if name.endswith("embed_tokens.weight") else decay if p.ndim > 1 else plain).append(p)
        return [{"params": decay, "weight_decay": self.plan.weight_decay, "share": 1.0},
                {"params": plain, "weight_decay": 0.0, "share": 1.0},
                {"params": words, "weight_decay": 0.0, "share": self.plan.word_lr}]  # fmt: skip

    # -- one step --------------------------------------------------------------------------------------
    def run_step(self) -> float:
        plan = self.plan
        seed = plan.seed * 1_000_003 + self.step
        g, dice = torch.Generator().manual_seed(seed), random.Random(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(self.step) * group["share"]
        seeing, blind = (
            self._lessons(SEEING, g, dice, seeing=True),
            self._lessons(BLIND, g, dice, seeing=False),
        )
        with torch.autocast("cpu", torch.bfloat16):
            losses_of = [
                self.loss_of(seeing, self.features(self._pictures(seeing, g, dice))),
                self.loss_of(blind, None),
            ]
        loss = torch.cat(losses_of).mean()
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
            keep = min(plan.ema, (1 + self.step) / (10 + self.step))
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        return loss.item()

    def _lessons(
        self, wanted: dict[str, int], g: torch.Generator, dice: random.Random, *, seeing: bool
    ) -> list[Lesson]:
        made = []
        for kind, n in wanted.items():
            rows: list[int | None] = [None] * n
            if seeing:
                pool = "usable" if kind in ("act", "act with word", "comply", "refuse") else "seen"
                picks = torch.multinomial(self.weights[pool], n, generator=g).tolist()
                rows = [getattr(self.course, pool)[i] for i in picks]
                if kind in ("describe", "act"):
                    behind = torch.randint(len(self.course.seen), (n,), generator=g).tolist()
                    made += [replace(self.course.lesson(kind, row, dice), behind=self.course.seen[b] if k % 3 == 0 else None)
                             for k, (row, b) in enumerate(zip(rows, behind, strict=True))]  # fmt: skip
                    continue
                if kind in ("read", "act on word"):  # half of these words stand alone
                    rows = [row if dice.random() < 0.5 else None for row in rows]
            made += [self.course.lesson(kind, row, dice) for row in rows]
        return made

    def _pictures(
        self, lessons: list[Lesson], g: torch.Generator, dice: random.Random
    ) -> Float[Tensor, "b 3 s s"]:
        """Drawings turned and coloured, one on another, words over them or alone; from -1 to 1."""
        rows = [lesson.row or 0 if lesson.behind is None else lesson.behind for lesson in lessons]
        flip = torch.tensor([losses.may_flip(self.corpus.rows[i]) for i in rows])
        pictures = losses.augment(self.corpus.rgba[rows], flip, g)
        for k, lesson in enumerate(lessons):
            if lesson.behind is not None:
                size = dice.uniform(0.5, 0.8)
                free = (1 - size) / 2
                centre = (0.5 + dice.uniform(-free, free), 0.5 + dice.uniform(-free, free))
                thing = objects.to_layers(self.corpus.rgba[lesson.row])
                pictures[k] = (
                    objects.draw_into((pictures[k] + 1) / 2, thing, objects.Placement(size * 0.98, centre))
                    * 2
                    - 1
                )
            if lesson.word is not None:
                pictures[k] = self._written(pictures[k], lesson, dice).picture.mul(2).sub(1)
        return pictures

    def _written(self, drawing: Tensor, lesson: Lesson, dice: random.Random) -> Written:
        assert lesson.word is not None
        font = dice.choice(self.fonts)
        if lesson.row is None:
            return word_picture(lesson.word, font, dice, width=(0.5, 0.95))
        return write(
            (drawing + 1) / 2, lesson.word, place(lesson.word, font, dice, width=(0.5, 0.95), plate=0.6)
        )

    @torch.no_grad()
    def features(self, pictures: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b t d"]:
        return self.tower(pictures, output_hidden_states=True).hidden_states[-1]

    def loss_of(self, lessons: list[Lesson], features: Tensor | None) -> Float[Tensor, " tokens"]:
        ids, answer = self.encode(lessons)
        logits = self.model(ids, answer, features, self.image_id)
        return F.cross_entropy(logits.float(), ids[:, 1:][answer[:, 1:]], reduction="none")

    def encode(self, lessons: list[Lesson]) -> tuple[Tensor, Tensor]:
        """Token ids, padded on the right, and which of them belong to the answer (its end included)."""
        from mmhooks.models.vlm.llava import IMAGE_PREFIX, PROMPT

        rows, marks = [], []
        for lesson in lessons:
            sight = IMAGE_PREFIX.replace("<image>", "<image>" * mini_llava.TOKENS) if lesson.sees else ""
            prompt = self.tokenizer(PROMPT.format(sight=sight, request=lesson.request))["input_ids"]
            said = self.tokenizer(" " + lesson.answer + "</s>", add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor(prompt + said))
            marks.append(torch.tensor([False] * len(prompt) + [True] * len(said)))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True, padding_value=0), pad(marks, batch_first=True, padding_value=False)

    # -- what it learned -----------------------------------------------------------------------------
    def judge(self) -> Any:
        """The running average in the whole LLaVA, in evaluation mode: what ships."""
        llava = self.fresh()
        missing, strange = llava.model.load_state_dict(self.average, strict=False)
        if strange or any(not key.startswith("vision_tower.") for key in missing):
            raise ValueError(f"the speaker does not fit: missing {missing}, strange {strange}")
        return llava.eval()

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Share of answers right to the letter under greedy decoding, by kind of exam paper."""
        judge = Speaker(self.judge())
        return {name: right(self, judge, paper) for name, paper in exam(self).items()}


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    out: Annotated[Path, typer.Option(help="checkpoints, tokenizer and curve")] = Path("runs/llava"),
    steps: int = LlavaPlan.steps,
    lr: float = LlavaPlan.lr,
    width: int = LlavaPlan.width,
    layers: int = LlavaPlan.layers,
    start: Annotated[str, typer.Option(help="go on from the average of this run, beside --out")] = "",
    warmup: int = LlavaPlan.warmup,
    ema: float = LlavaPlan.ema,
    seed: int = 0,
    threads: int = 1,
    every: Annotated[int, typer.Option(help="steps between evaluations and checkpoints")] = 200,
) -> None:
    """Train mini-llava: PYTHONPATH=recipes python -m embedded.llava.train --corpus runs/corpus --out runs/llava"""
    torch.set_num_threads(threads)
    plan = LlavaPlan(
        steps=steps, lr=lr, width=width, layers=layers, seed=seed, start=start, warmup=warmup, ema=ema
    )
    out.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, out / "plan.json")  # type: ignore[arg-type]
    trainer = LlavaTrainer(Corpus(corpus), plan, out)
    save_tokenizer(trainer.tokenizer, out)
    fit(trainer, every)


if __name__ == "__main__":
    typer.run(main)
