"""Trains `mini-llava`, a Llama of 3.8 M parameters on top of mini-reader's frozen image tower: resumable, seeded.

    PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules --out runs/corpus
    PYTHONPATH=recipes python -m embedded.llava.train --corpus runs/corpus --out runs/llava  # stopped at step 800
    PYTHONPATH=recipes python -m embedded.llava.train --corpus runs/corpus --out runs/llava-2 --start llava --steps 320 \\
        --lr 1.2e-3 --warmup 10 --ema 0.98 --seed 1 --every 80

The loss is on answers only. Images go through the frozen tower in every step, augmented and written on differently each
time: the tower is a fifth of a step's cost, and no image is seen twice. `curve.jsonl` records the loss and, on held-out
images, the share of exactly correct answers. Fonts to install: see `embedded.reader.words`.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float
from torch import Tensor, nn

from embedded import losses
from embedded.checkpoints import read_part, starting_point
from embedded.clip.train import Trainer, fit, teacher_embeddings
from embedded.llava.evaluate import evaluation_sets, exact_match_rate
from embedded.llava.examples import EXTRA_WORDS, Example, ExampleSource
from embedded.llava.tokenizer import save_tokenizer, token_texts, tokenizer_of
from embedded.reader.words import FONTS, Vocabulary, Written, font_paths, place, word_image, write
from embedded.training import cosine_rate, keep_plan, optimise, parameter_groups, update_average
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import objects
from mmhooks.models.embedded import mini_llava

# Number of examples of each kind per step, with an image and without.
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
    start: str = ""  # name of a sibling run, to continue from its average under a new schedule
    batch: int = sum(SEEING.values()) + sum(BLIND.values())

    def lr_at(self, step: int) -> float:
        return cosine_rate(self.lr, step, steps=self.steps, warmup=self.warmup)


class TrainableParts(nn.Module):
    """The trained parts: projector and Llama. The output layer is the token table (tied)."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.multi_modal_projector = llava.model.multi_modal_projector
        self.language_model = llava.model.language_model

    @property
    def words(self) -> nn.Embedding:
        return self.language_model.embed_tokens  # type: ignore[return-value]

    def forward(self, ids: Tensor, answer: Tensor, features: Tensor | None, image_id: int) -> Tensor:
        """Returns the logits of every token of the answers, from the position before it."""
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
        self.source = ExampleSource.of(corpus, [*vocabulary.names * 3, *EXTRA_WORDS * 6, *others])
        self.tokenizer = tokenizer_of(self.source)
        self.fonts = font_paths(FONTS)
        self.llava = self.build_model()
        self.tower: Any = self.llava.model.vision_tower
        self.model, self.extra = TrainableParts(self.llava), nn.Identity()
        self.load_start_average() if plan.start else self.initialise()
        self.weights = {
            rows: torch.tensor(self.source.weights(getattr(self.source, rows))) for rows in ("seen", "usable")
        }
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=plan.lr, betas=(0.9, 0.98), fused=True
        )
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.started = starting_point(asdict(plan), [self.model, self.extra], corpus.rows, corpus.rgba)

    def build_model(self, *, patch_dropout: float = 0.0) -> Any:
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
    def initialise(self) -> None:
        """Initialises word pieces with MiniLM's vectors (PCA to the width), so that similar words are close."""
        table = self.model.words.weight
        vectors = teacher_embeddings(token_texts(self.tokenizer), self.out.parent / "llava-words.safetensors")
        vectors = vectors - vectors.mean(0)
        placed = vectors @ torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -table.shape[1] :]
        table.copy_(placed / placed.std() * 0.02)

    def load_start_average(self) -> None:
        """Loads the running average of the run that this one starts from."""
        _, average = read_part(self.out.parent / self.plan.start / "checkpoint.safetensors", "average")
        self.model.load_state_dict(average)

    def _parameter_groups(self) -> list[dict]:
        return parameter_groups(
            self.model.named_parameters(), "embed_tokens.weight", weight_decay=self.plan.weight_decay,
            word_lr=self.plan.word_lr,
        )  # fmt: skip

    # -- one step --------------------------------------------------------------------------------------
    def run_step(self) -> float:
        plan = self.plan
        seed = plan.seed * 1_000_003 + self.step
        g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(self.step) * group["share"]
        seeing, blind = (
            self._examples(SEEING, g, rng, seeing=True),
            self._examples(BLIND, g, rng, seeing=False),
        )
        with torch.autocast("cpu", torch.bfloat16):
            losses_of = [
                self.loss_of(seeing, self.features(self._images(seeing, g, rng))),
                self.loss_of(blind, None),
            ]
        loss = torch.cat(losses_of).mean()
        optimise(loss, self.model.parameters(), self.optimizer, self.step)
        self.step += 1
        update_average(self.average, self.model.state_dict(), plan.ema, self.step)
        return loss.item()

    def _examples(
        self, wanted: dict[str, int], g: torch.Generator, rng: random.Random, *, seeing: bool
    ) -> list[Example]:
        made = []
        for kind, n in wanted.items():
            rows: list[int | None] = [None] * n
            if seeing:
                pool = "usable" if kind in ("act", "act with word", "comply", "refuse") else "seen"
                picks = torch.multinomial(self.weights[pool], n, generator=g).tolist()
                rows = [getattr(self.source, pool)[i] for i in picks]
                if kind in ("describe", "act"):
                    behind = torch.randint(len(self.source.seen), (n,), generator=g).tolist()
                    made += [replace(self.source.example(kind, row, rng), behind=self.source.seen[b] if k % 3 == 0 else None)
                             for k, (row, b) in enumerate(zip(rows, behind, strict=True))]  # fmt: skip
                    continue
                if kind in ("read", "act on word"):  # half of these words stand alone
                    rows = [row if rng.random() < 0.5 else None for row in rows]
            made += [self.source.example(kind, row, rng) for row in rows]
        return made

    def _images(
        self, examples: list[Example], g: torch.Generator, rng: random.Random
    ) -> Float[Tensor, "b 3 s s"]:
        """Renders augmented drawings, one on another, with words over them or without a drawing; from -1 to 1."""
        rows = [example.row or 0 if example.behind is None else example.behind for example in examples]
        flip = torch.tensor([losses.may_flip(self.corpus.rows[i]) for i in rows])
        images = losses.augment(self.corpus.rgba[rows], flip, g)
        for k, example in enumerate(examples):
            if example.behind is not None:
                size = rng.uniform(0.5, 0.8)
                free = (1 - size) / 2
                centre = (0.5 + rng.uniform(-free, free), 0.5 + rng.uniform(-free, free))
                thing = objects.to_layers(self.corpus.rgba[example.row])
                images[k] = (
                    objects.draw_into((images[k] + 1) / 2, thing, objects.Placement(size * 0.98, centre)) * 2
                    - 1
                )
            if example.word is not None:
                images[k] = self._written(images[k], example, rng).image.mul(2).sub(1)
        return images

    def _written(self, drawing: Tensor, example: Example, rng: random.Random) -> Written:
        assert example.word is not None
        font = rng.choice(self.fonts)
        if example.row is None:
            return word_image(example.word, font, rng, width=(0.5, 0.95))
        return write(
            (drawing + 1) / 2, example.word, place(example.word, font, rng, width=(0.5, 0.95), plate=0.6)
        )

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b t d"]:
        return self.tower(images, output_hidden_states=True).hidden_states[-1]

    def loss_of(self, examples: list[Example], features: Tensor | None) -> Float[Tensor, " tokens"]:
        ids, answer = self.encode(examples)
        logits = self.model(ids, answer, features, self.image_id)
        return F.cross_entropy(logits.float(), ids[:, 1:][answer[:, 1:]], reduction="none")

    def encode(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Returns token ids, padded on the right, and which of them belong to the answer (its end included)."""
        from mmhooks.models.vlm.model import IMAGE_PREFIX, PROMPT

        rows, marks = [], []
        for example in examples:
            sight = IMAGE_PREFIX.replace("<image>", "<image>" * mini_llava.TOKENS) if example.sees else ""
            prompt = self.tokenizer(PROMPT.format(sight=sight, request=example.request))["input_ids"]
            said = self.tokenizer(" " + example.answer + "</s>", add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor(prompt + said))
            marks.append(torch.tensor([False] * len(prompt) + [True] * len(said)))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True, padding_value=0), pad(marks, batch_first=True, padding_value=False)

    # -- evaluation ----------------------------------------------------------------------------------
    def averaged_model(self) -> Any:
        """Returns the running average as a whole LLaVA in evaluation mode, which is shipped."""
        llava = self.build_model()
        missing, unexpected = llava.model.load_state_dict(self.average, strict=False)
        if unexpected or any(not key.startswith("vision_tower.") for key in missing):
            raise ValueError(f"the running average does not fit: missing {missing}, unexpected {unexpected}")
        return llava.eval()

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Returns the share of exactly correct answers under greedy decoding, by evaluation set."""
        model = TrainableParts(self.averaged_model())
        return {
            name: exact_match_rate(self, model, examples) for name, examples in evaluation_sets(self).items()
        }


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    out: Annotated[Path, typer.Option(help="checkpoints, tokenizer and curve")] = Path("runs/llava"),
    steps: int = LlavaPlan.steps,
    lr: float = LlavaPlan.lr,
    width: int = LlavaPlan.width,
    layers: int = LlavaPlan.layers,
    start: Annotated[str, typer.Option(help="continue from the average of this run, next to --out")] = "",
    warmup: int = LlavaPlan.warmup,
    ema: float = LlavaPlan.ema,
    seed: int = 0,
    threads: int = 1,
    every: Annotated[int, typer.Option(help="steps between evaluations and checkpoints")] = 200,
) -> None:
    """Trains mini-llava: PYTHONPATH=recipes python -m embedded.llava.train --corpus runs/corpus --out runs/llava"""
    torch.set_num_threads(threads)
    plan = LlavaPlan(
        steps=steps, lr=lr, width=width, layers=layers, seed=seed, start=start, warmup=warmup, ema=ema
    )
    out.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, out / "plan.json")
    trainer = LlavaTrainer(Corpus(corpus), plan, out)
    save_tokenizer(trainer.tokenizer, out)
    fit(trainer, every)


if __name__ == "__main__":
    typer.run(main)
