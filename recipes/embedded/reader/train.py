"""Trains `mini-reader`, a mini that also reads words in images: resumable, seeded, on CPU cores.

    PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules --out runs/corpus
    PYTHONPATH=recipes python -m embedded.reader.train --corpus runs/corpus --out runs/reader
    PYTHONPATH=recipes python -m embedded.reader.train --corpus runs/corpus --out runs/reader-2 --start reader --first 0 \\
        --ramp 1 --lr 4e-4 --steps 220 --batch 144 --words-a-step 64 --seed 1
    PYTHONPATH=recipes python -m embedded.reader.train --corpus runs/corpus --out runs/reader-control --control

Starts from mini's weights and the stem of `embedded.reader.stem`. At first only the image side learns to read, against
mini's texts. Then each step is one contrastive loss over drawings (half of their patches dropped), drawings with a word
on them, and words without a drawing (no patch with ink dropped). Letters are also predicted directly, by one linear map
for image and text embeddings; the text side sees every word of the vocabulary, the image side never a held-out one.
`--control` is the same plan without any word.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedded import losses
from embedded.checkpoints import read_part
from embedded.clip.train import Plan, Trainer, fit
from embedded.reader.evaluate import SMALL, embed_texts, make_test_images, read_right
from embedded.reader.stem import Spelling, curriculum, train_code, train_stem
from embedded.reader.words import (
    FONTS,
    PROMPT,
    Vocabulary,
    Written,
    both_caption,
    font_paths,
    letters,
    pixels,
    place,
    unseen_fonts,
    word_caption,
    word_images,
    write,
)
from embedded.training import keep_plan, small_attention
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import words
from mmhooks.models.embedded import mini
from mmhooks.utils.assets import ASSETS, asset


@dataclass(frozen=True)
class ReaderPlan(Plan):
    """Of each batch of drawings, ``overlays`` carry a word; ``words`` images of words are added."""

    steps: int = 390
    first: int = 60  # steps of reading only, against the texts of mini
    batch: int = 96
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.99
    words: int = 96
    overlays: float = 0.15
    spelling: float = 1.0
    spelled: int = 64  # words whose spelling is predicted from the text tower only
    made_up: float = 0.05  # share of the word images that show random letters
    stem_steps: int = 800
    ramp: int = 250  # steps until words have any size and position
    code_steps: int = 700
    gain: float = 0.15  # of the orthogonal map through which letters enter the patch embedding
    say_gain: float = 4.0  # the same for the code of the word
    start: str = "mini"  # or the name of a finished sibling run, to continue from its average
    word_lr: float = 1.0
    word_init: bool = False

    def without_words(self) -> ReaderPlan:
        return ReaderPlan(**(self.__dict__ | {"words": 0, "overlays": 0.0, "spelling": 0.0}))


class KeepInk(nn.Module):
    """Patch dropout that keeps letters: first the patches that ``wanted`` marks, then others at random.

    A dropped patch is a dropped letter, and images without dropout would double the cost of a step.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.wanted: Bool[Tensor, "b patches"] | None = None

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b kept d"]:
        if not self.training:
            return tokens
        wanted = self.wanted
        if wanted is None or wanted.shape != (len(tokens), tokens.shape[1] - 1):
            raise ValueError(
                f"expected wanted patches for tokens {tuple(tokens.shape)}, got {wanted}; set them first"
            )
        keep = max(1, round(wanted.shape[1] * (1 - self.share)))
        chosen = (torch.rand(wanted.shape) + wanted).topk(keep, dim=1).indices
        kept = tokens[:, 1:].gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :1], kept], dim=1)


def _reading_weights(stem: mini.ReadingStem) -> dict[str, Tensor]:
    return {k: v for k, v in stem.state_dict().items() if k.startswith(("letters.", "word."))}


class ReaderTrainer(Trainer):
    plan: ReaderPlan

    def __init__(self, corpus: Corpus, plan: ReaderPlan, out: Path, fonts: list[str] | None = None) -> None:
        self.vocabulary = Vocabulary.of(corpus)
        self.fonts = fonts or font_paths(FONTS)
        self.known = set(self.vocabulary.all)
        super().__init__(corpus, plan, out)

    # -- what differs from mini ------------------------------------------------------------------------
    def build_model(self, *, patch_dropout: float = 0.0) -> Any:
        model: Any = mini.build(patch_dropout=patch_dropout, reads=True)
        if patch_dropout:
            model.visual.patch_dropout = KeepInk(patch_dropout)
        return model

    def build_auxiliary(self) -> nn.Module:
        return Spelling(mini.EMBED_DIM)

    def initialise(self) -> None:
        """Loads mini's weights and trains the stem's two stages, cached in the run's folder; or another run's average."""
        if self.plan.start != "mini":
            checkpoint = self.out.parent / self.plan.start / "checkpoint.safetensors"
            self.model.load_state_dict(read_part(checkpoint, "average")[1])
            self.extra.load_state_dict(read_part(checkpoint, "extra")[1])
            self._keep_texts()
            return
        weights = {k: v.float() for k, v in load_file(asset(ASSETS / "mini" / "model.safetensors")).items()}
        weights["visual.conv1.patch.weight"] = weights.pop("visual.conv1.weight")
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        if unexpected or any(not key.startswith("visual.conv1.") for key in missing):
            raise ValueError(f"mini's weights do not fit: missing {missing}, unexpected {unexpected}")
        self._keep_texts()
        stem, plan, out = self.model.visual.conv1, self.plan, self.out
        if not (out / "letters.safetensors").exists():
            every = Vocabulary.of(self.corpus, drawings=1)  # letters are learned from all words
            right = train_stem(stem, every, self.fonts, steps=plan.stem_steps, seed=plan.seed)
            typer.echo(f"letters: {100 * right:.0f} % of training words spelled without a fault")
            save_file(stem.letters.state_dict(), out / "letters.safetensors")
        stem.letters.load_state_dict(load_file(out / "letters.safetensors"))
        if not (out / "code.safetensors").exists():
            texts = {
                word: self.texts[self.text_ids[word]]
                for word in self.vocabulary.names + self.vocabulary.others
            }
            right = train_code(stem, self.vocabulary, self.fonts, texts, self._drawings, steps=plan.code_steps,
                               seed=plan.seed)  # fmt: skip
            typer.echo(f"code: {100 * right:.0f} % of training words named first among {len(texts)}")
            save_file(_reading_weights(stem), out / "code.safetensors")
        stem.load_state_dict(load_file(out / "code.safetensors"), strict=False)
        self.init_stem_maps(stem)

    def _drawings(self, g: torch.Generator) -> Float[Tensor, "k 3 s s"]:
        chosen = [self.train[i] for i in torch.randint(len(self.train), (32,), generator=g).tolist()]
        return losses.augment(self.corpus.rgba[chosen], torch.zeros(32, dtype=torch.bool), g)

    @torch.no_grad()
    def _keep_texts(self) -> None:
        """Embeds every name and word with mini's text tower: the targets of the image side at first."""
        texts = list(dict.fromkeys([*self.name_ids, *self.vocabulary.others]))
        self.text_ids = {text: i for i, text in enumerate(texts)}
        self.texts = embed_texts(self.model, self.tokenizer, texts)

    @torch.no_grad()
    def init_stem_maps(self, stem: Any) -> None:
        """Initialises the maps of letters and code into the patch embedding as orthogonal, which loses nothing.

        Maps that start from zero are driven by noise and scramble what they carry before the blocks learn to use it (a
        linear probe found 55 % of first letters in the stem, 27 % after two blocks). The mean of the letters over
        drawings is subtracted, so that drawings look to the blocks as before.
        """
        torch.manual_seed(self.plan.seed)
        for layer, gain in ((stem.mix, self.plan.gain), (stem.say, self.plan.say_gain)):
            shape = layer.weight.shape[:2]
            layer.weight.copy_(nn.init.orthogonal_(torch.empty(shape), gain).view_as(layer.weight))
            layer.bias.zero_()
        drawings = losses.plain(self.corpus.rgba[self.train[:: max(1, len(self.train) // 128)]])
        stem.mix.bias.copy_(-stem.mix(stem.letters(drawings)).mean((0, 2, 3)))

    def _loss(self, rgba, flip, ids, same, tokens, rows, rng, g) -> Float[Tensor, ""]:
        plan, model = self.plan, self.model
        if plan.words and self.step < plan.first:
            return self._read_alone(rgba[: plan.batch // 3], flip, rows, rng, g)
        drawings = losses.augment(rgba, flip, g)
        written = round(plan.overlays * len(rows))
        how = curriculum(self.step / plan.ramp)
        names = [row["name"] for row in rows]
        targets = [(losses.caption(row, rng), row["name"]) for row in rows]
        ink = torch.zeros(len(rows), 64, dtype=torch.bool)
        over = rng.choices(self.vocabulary.names, k=written)
        for i, word in enumerate(over):
            over_it = self._write(drawings[i], word, rng, how)
            drawings[i], ink[i] = over_it.image.mul(2).sub(1), over_it.patches()
            targets[i] = both_caption(names[i], word, rng)
        alone = self._words(rng)
        if alone:
            made = word_images(alone, self.fonts, rng, **how)
            drawings = torch.cat([drawings, pixels(made)])
            ink = torch.cat([ink, torch.stack([one.patches() for one in made])])
            targets += [word_caption(word, rng) for word in alone]
        spelled = rng.sample(self.vocabulary.all, plan.spelled) if plan.spelling else []
        captions, keys = [s[0] for s in targets], [s[1] for s in targets]
        model.visual.patch_dropout.wanted = ink
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(drawings).float()
            text = model.encode_text(self.tokenizer(captions + [PROMPT.format(w) for w in spelled])).float()
        text, prompted = text[: len(captions)], text[len(captions) :]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        key_ids = torch.tensor([number[key] for key in keys])
        loss = losses.contrastive(image, text, model.logit_scale.exp(), key_ids[:, None] == key_ids[None, :])
        if self.teacher is not None:
            bare = slice(written, len(rows))
            loss = loss + plan.relational * losses.relational(text[bare], self.teacher[ids[bare]])
        if plan.spelling:
            seen = torch.cat([image[:written], image[len(rows) :]])
            prompts = [i for i, key in enumerate(keys[len(rows) :]) if key != alone[i]]
            prompted = torch.cat([prompted, text[len(rows) :][prompts]])
            of_text = self._spelling_loss(prompted, spelled + [alone[i] for i in prompts])
            of_image = self._spelling_loss(seen, over + alone)
            loss = loss + plan.spelling * (of_image + of_text)
            self.note = f"(spelling of images {of_image.item():.3f}, of texts {of_text.item():.3f})"
        return loss

    def _read_alone(self, rgba, flip, rows, rng: random.Random, g: torch.Generator) -> Float[Tensor, ""]:
        """Loss of classifying words and a few drawings among all of mini's texts: cheap, without the text tower."""
        plan, model, few = self.plan, self.model, len(rgba)
        v, wanted = self.vocabulary, plan.words * 4 // 3
        chosen = [rng.choice(v.names if rng.random() < 0.85 else v.others) for _ in range(wanted)]
        made = word_images(chosen, self.fonts, rng, **curriculum(self.step / plan.ramp))
        ink = torch.stack([one.patches() for one in made])
        model.visual.patch_dropout.wanted = torch.cat([torch.zeros(few, 64, dtype=torch.bool), ink])
        shown = torch.cat([losses.augment(rgba, flip[:few], g), pixels(made)])
        truth = torch.tensor([self.text_ids[t] for t in [row["name"] for row in rows[:few]] + chosen])
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(shown).float()
        logits = model.logit_scale.exp() * F.normalize(image, dim=-1) @ self.texts.T
        naming, spelling = F.cross_entropy(logits, truth), self._spelling_loss(image[few:], chosen)
        right = (logits.argmax(1) == truth)[few:].float().mean().item()
        self.note = f"(spelling of images {spelling.item():.3f}, {100 * right:.0f} % named among all)"
        return naming + plan.spelling * spelling

    def _spelling_loss(self, vector: Float[Tensor, "n d"], targets: list[str]) -> Float[Tensor, ""]:
        return self.extra.loss(F.normalize(vector, dim=-1) * 16, letters(targets))

    def _words(self, rng: random.Random) -> list[str]:
        found, vocabulary = [], self.vocabulary
        for _ in range(self.plan.words):
            word = rng.choice(vocabulary.names if rng.random() < 0.85 else vocabulary.others)
            if rng.random() < self.plan.made_up:
                word = words.nonsense(word, rng, known=self.known)
            found.append(word)
        return found

    def _write(self, drawing, word: str, rng: random.Random, how: dict) -> Written:
        return write((drawing + 1) / 2, word, place(word, rng.choice(self.fonts), rng, plate=0.6, **how))

    # -- evaluation ----------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self) -> dict:
        """Measures retrieval, and reading in unseen fonts: taught words, held-out words, small taught words."""
        result: dict[str, Any] = super().evaluate()
        averaged_model, v = self.averaged_model(), self.vocabulary
        test_sets = [("unseen_fonts", v.names, {}), ("heldout_words", v.unseen_names, {}),
                  ("small", v.names, {"size": SMALL})]  # fmt: skip
        for seed, (name, pool, how) in enumerate(test_sets):
            test_images = make_test_images(pool, unseen_fonts(), 256, seed=seed, **how)
            right = read_right(averaged_model, self.tokenizer, test_images, pool)
            result[f"read_{name}"] = {k: r.float().mean().item() for k, r in right.items()} | {"n": 256}
        return result


def main(
    corpus: Annotated[Path, typer.Option(help="folder made by embedded.corpus")] = Path("runs/corpus"),
    out: Annotated[Path, typer.Option(help="checkpoints and curve")] = Path("runs/reader"),
    control: Annotated[bool, typer.Option(help="the same stem and plan without any word")] = False,
    steps: int = ReaderPlan.steps,
    batch: Annotated[int, typer.Option(help="drawings per step")] = ReaderPlan.batch,
    words_a_step: Annotated[int, typer.Option(help="word images per step")] = ReaderPlan.words,
    overlays: Annotated[
        float, typer.Option(help="share of drawings with a word on them")
    ] = ReaderPlan.overlays,
    spelling: Annotated[float, typer.Option(help="weight of naming letters")] = ReaderPlan.spelling,
    stem_steps: int = ReaderPlan.stem_steps,
    start: Annotated[
        str, typer.Option(help="mini, or a finished run next to --out to continue from")
    ] = "mini",
    first: Annotated[int, typer.Option(help="steps of reading only")] = ReaderPlan.first,
    ramp: Annotated[int, typer.Option(help="steps until words are small and anywhere")] = ReaderPlan.ramp,
    lr: float = ReaderPlan.lr,
    seed: int = 0,
    threads: int = 1,
    every: Annotated[int, typer.Option(help="steps between evaluations")] = 100,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 50,
) -> None:
    """Trains mini-reader: PYTHONPATH=recipes python -m embedded.reader.train --corpus runs/corpus --out runs/reader"""
    torch.set_num_threads(threads)
    small_attention()
    plan = ReaderPlan(steps=steps, batch=batch, words=words_a_step, overlays=overlays, spelling=spelling,
                      stem_steps=stem_steps, lr=lr, seed=seed, start=start, first=first, ramp=ramp)  # fmt: skip
    plan = plan.without_words() if control else plan
    out.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, out / "plan.json")
    fit(ReaderTrainer(Corpus(corpus), plan, out), every, save_every)


if __name__ == "__main__":
    typer.run(main)
