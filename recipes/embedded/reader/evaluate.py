"""Evaluates reading by a CLIP: rendered words among word prompts, and the effect of a written word on classification."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from embedded import losses
from embedded.reader.words import LONGEST, PROMPT, Written, pixels, word_images
from mmhooks.data.sources.drawings import Corpus
from mmhooks.data.synthetic import words

SMALL = (8.0, 11.0)  # pixels per em
CLASS_PROMPT = "a drawing of a {}"
CANDIDATES = 32


def make_test_images(pool: Sequence[str], fonts: list[str], n: int, *, seed: int, **how) -> list[Written]:
    """Renders ``n`` words of the pool in random fonts, with the arguments ``how`` of `place`."""
    rng = random.Random(f"exam {seed}")
    return word_images([rng.choice(pool) for _ in range(n)], fonts, rng, **how)


@torch.no_grad()
def embed_texts(model, tokenizer, texts: Sequence[str]) -> Float[Tensor, "n d"]:
    parts = [model.encode_text(tokenizer(list(texts[i : i + 256]))) for i in range(0, len(texts), 256)]
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def embed_images(model, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
    """Embeds images scaled to -1 ... 1."""
    parts = [model.encode_image(images[i : i + 256]) for i in range(0, len(images), 256)]
    return F.normalize(torch.cat(parts), dim=-1)


def read_right(
    model, tokenizer, test_images: list[Written], pool: Sequence[str]
) -> dict[str, Bool[Tensor, " n"]]:
    """Returns for each image whether its word is the best among 32 of the pool (31 others, drawn by its index), and
    whether it is the best of the whole pool."""
    text = embed_texts(model, tokenizer, [PROMPT.format(word) for word in pool])
    scores = embed_images(model, pixels(test_images)) @ text.T
    index = {word: i for i, word in enumerate(pool)}
    own = torch.tensor([index[one.word] for one in test_images])
    better = scores > scores.gather(1, own[:, None])
    among = []
    for i in range(len(test_images)):
        others = torch.randperm(len(pool) - 1, generator=torch.Generator().manual_seed(i))[: CANDIDATES - 1]
        among.append(~better[i, others + (others >= own[i])].any())
    return {"of_32": torch.stack(among), "of_all": ~better.any(1)}


# -- the typographic attack --------------------------------------------------------------------------
CONDITIONS = ("clean", "word", "nonsense", "noise", "blank")


@dataclass(frozen=True)
class Sample:
    """A drawing of A, the word B, the nonsense word, and the candidates of zero-shot: A, B and 30 others."""

    row: int
    a: str
    b: str
    nonsense: str
    candidates: tuple[str, ...]
    writing: words.TextStyle  # over the middle of the drawing
    strip: words.TextStyle  # in the strip beside it


def samples(
    corpus: Corpus, taught: Sequence[str], known: set[str], fonts: list[str], n: int,
    *, b_pool: Sequence[str] | None = None, seed: int = 0,
) -> list[Sample]:  # fmt: skip
    """Samples ``n`` held-out drawings whose name is a taught word, each with another word to write on it.

    Words B and candidates are names of the same held-out drawings, so that none stands out by its rarity;
    ``b_pool`` takes B from other words instead, and B is still among the candidates.
    """
    nameable = set(taught)
    rng = random.Random(f"attack {seed}")
    rows = [
        (i, row["name"])
        for i, row in enumerate(corpus.rows)
        if row["split"] in ("heldout_pictures", "unseen_style") and row["name"] in nameable
        and not row["toned"] and row["style"] != "game-icons"
    ]  # fmt: skip
    names = sorted({name for _, name in rows})
    if len(rows) < n or len(names) < CANDIDATES:
        raise ValueError(
            f"expected {n} held-out drawings of at least {CANDIDATES} names, got {len(rows)} of {len(names)}; lower n"
        )
    made = []
    for row, a in rng.sample(rows, n):
        b = rng.choice([word for word in b_pool or names if word != a and len(word) <= LONGEST])
        others = rng.sample([name for name in names if name not in (a, b)], CANDIDATES - 2)
        fake = words.nonsense(b, rng, known=known)
        font = rng.choice(fonts)
        size = min(words.largest_size(text, font, 54, 13, most=16.0) for text in (b, fake))
        plated = words.TextStyle(font, size, plate=words.WHITE)
        beside = words.TextStyle(font, size, centre=(0.5, 0.86), plate=words.WHITE)
        made.append(Sample(row, a, b, fake, (a, b, *others), plated, beside))
    return made


def attacked(
    corpus: Corpus, chosen: list[Sample], condition: str, *, strip: bool
) -> Float[Tensor, "n 3 64 64"]:
    """Renders the drawings under a condition, scaled to -1 ... 1.

    Args:
        strip: makes the drawing smaller and puts the word, or its control, beside it instead of over it.
    """
    drawings = losses.plain(corpus.rgba[[s.row for s in chosen]]).add(1).div(2)
    out = []
    for k, (image, sample) in enumerate(zip(drawings, chosen, strict=True)):
        base = words.add_strip(image, 0.28) if strip else image
        writing = sample.strip if strip else sample.writing
        match condition:
            case "clean":
                out.append(base)
            case "word":
                out.append(words.write(base, sample.b, writing))
            case "nonsense":
                out.append(words.write(base, sample.nonsense, writing))
            case "noise":
                out.append(words.noise_patch(base, sample.b, writing, seed=k))
            case "blank":
                out.append(words.blank_plate(base, sample.b, writing))
            case _:
                raise ValueError(f"expected one of {', '.join(CONDITIONS)}, got {condition!r}")
    return torch.stack(out).sub(0.5).div(0.5)


@dataclass(frozen=True)
class Classified:
    """Per sample: probability of A and of B among the candidates, and whether either is the best."""

    p_a: Float[Tensor, " n"]
    p_b: Float[Tensor, " n"]
    is_a: Bool[Tensor, " n"]
    is_b: Bool[Tensor, " n"]


def classify_drawings(model, tokenizer, images: Float[Tensor, "n 3 s s"], chosen: list[Sample]) -> Classified:
    """Classifies each image zero-shot among its own candidates, "a drawing of a ..."."""
    vocabulary = sorted({name for sample in chosen for name in sample.candidates})
    index = {name: i for i, name in enumerate(vocabulary)}
    text = embed_texts(model, tokenizer, [CLASS_PROMPT.format(name) for name in vocabulary])
    columns = torch.tensor([[index[name] for name in sample.candidates] for sample in chosen])
    logits = (embed_images(model, images) @ text.T).gather(1, columns)
    p = (model.logit_scale.detach().exp() * logits).softmax(1)
    best = p.argmax(1)
    return Classified(p[:, 0], p[:, 1], best == 0, best == 1)


def attack(model, tokenizer, corpus: Corpus, chosen: list[Sample]) -> Iterator[tuple[str, str, Classified]]:
    """Yields place, condition and outcome, for every condition over the drawing and beside it."""
    for strip in (False, True):
        for condition in CONDITIONS:
            images = attacked(corpus, chosen, condition, strip=strip)
            yield (
                "beside" if strip else "over",
                condition,
                classify_drawings(model, tokenizer, images, chosen),
            )
