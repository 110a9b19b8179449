"""First stage of mini-reader: convolutions that locate the letters of a word, trained for a few minutes.

A ViT does not learn words in hours on one core, even when each patch is given its letters: attention fails to find
which letter of the word a patch holds. Letters and their order are a dense task with a target in every patch, which
small convolutions learn quickly; they become the tower's stem.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor, nn

from embedded.reader.words import LONGEST, Vocabulary, letters, pixels, word_images
from mmhooks.models.embedded import mini

CLASSES = 27  # a - z, and "the word has ended"


class Spelling(nn.Module):
    """Linear readout, from a vector, of the letter at each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, LONGEST * CLASSES)

    def forward(self, vector: Float[Tensor, "n d"]) -> Float[Tensor, "n longest classes"]:
        return self.linear(vector).view(len(vector), LONGEST, CLASSES)

    def loss(self, vector: Float[Tensor, "n d"], truth: Int[Tensor, "n longest"]) -> Float[Tensor, ""]:
        return F.cross_entropy(self(vector).flatten(0, 1), truth.flatten())


class LetterFinder(nn.Module):
    """The stem's convolutions with batch norm, and two heads that are used only in training.

    One predicts, for the left and the right half of each patch, which letter has its centre there and its index in the
    word. The other spells the word from the mean over all patches, a form that a tower with attention pooling can use
    easily.
    """

    def __init__(self, stem: mini.ReadingStem) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in stem.letters:
            layers.append(layer)
            if isinstance(layer, nn.Conv2d):
                layers.append(nn.BatchNorm2d(layer.out_channels))
                width = layer.out_channels
        self.letters = nn.Sequential(*layers)
        self.where = nn.Conv2d(width, 2 * (1 + 26 * LONGEST), 1)
        self.spell = nn.Sequential(nn.BatchNorm1d(width), Spelling(width))

    def forward(
        self, image: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b rows columns classes"], Float[Tensor, "b longest letters"]]:
        features = self.letters(image)
        found = self.where(features).unflatten(1, (2, 1 + 26 * LONGEST))  # b half class row patch
        return found.permute(0, 3, 4, 1, 2).flatten(2, 3), self.spell(features.mean((2, 3)))


def curriculum(progress: float, *, narrowest: float = 0.45, smallest_group_size: float = 9.0) -> dict:
    """Returns the placement of words at this progress: large and central at first, later smaller and anywhere."""
    p = min(1.0, progress)
    return {"width": (0.8 - (0.8 - narrowest) * p, 0.95), "offset": p, "size": (smallest_group_size, 30.0)}


def train_stem(
    stem: mini.ReadingStem, vocabulary: Vocabulary, fonts: list[str], *, steps: int, batch: int = 128,
    lr: float = 2e-3, seed: int = 0,
) -> float:  # fmt: skip
    """Trains the convolutions in place and folds batch norm in at the end.

    Returns:
        The share of words that were spelled correctly in the last 20 steps.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    net = LetterFinder(stem).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    pool = vocabulary.names + vocabulary.others
    placed, spelled = [], []
    for step in track(range(steps), description="stem"):
        how = curriculum(1.5 * step / steps, narrowest=0.3, smallest_group_size=8.0)
        made = word_images(rng.choices(pool, k=batch), fonts, rng, turn=0.0, **how)
        truth, targets = (
            torch.stack([one.letter_map() for one in made]) + 1,
            letters([one.word for one in made]),
        )
        with torch.autocast("cpu", torch.bfloat16):
            found, spelling = net(pixels(made))
        found, spelling, letter = found.float(), spelling.float(), truth > 0
        loss = F.cross_entropy(found[letter], truth[letter]) + F.cross_entropy(found[~letter], truth[~letter])
        loss = loss + F.cross_entropy(spelling.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        placed.append((found[letter].argmax(-1) == truth[letter]).float().mean().item())
        spelled.append((spelling.argmax(-1) == targets).all(1).float().mean().item())
        if step % 50 == 49:
            note = f"stem, step {step + 1} of {steps}: loss {loss.item():.3f}"
            typer.echo(f"{note}, letters placed {5 * sum(placed[-20:]):.0f} %, words spelled "
                       f"{5 * sum(spelled[-20:]):.0f} %")  # fmt: skip
    fold(net.letters, stem.letters)
    return sum(spelled[-20:]) / len(spelled[-20:])


def train_code(
    stem: mini.ReadingStem, vocabulary: Vocabulary, fonts: list[str], texts: dict[str, Float[Tensor, " d"]],
    drawings: Callable[[torch.Generator], Float[Tensor, "k 3 s s"]], *, steps: int, batch: int = 128,
    lr: float = 2e-3, seed: int = 0,
) -> float:  # fmt: skip
    """Trains the second stage, the code of a word.

    The code has length 1, is close to mini's text embedding of the word and contains its letters; for a drawing
    without a word it has length 0.

    Returns:
        The share of words in the last 20 steps whose own text was the nearest of all.
    """
    torch.manual_seed(seed)
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    words = list(texts)
    table, number = torch.stack(list(texts.values())), {word: i for i, word in enumerate(words)}
    norm, spelling = nn.BatchNorm1d(192), Spelling(mini.EMBED_DIM)
    fast = [*norm.parameters(), *spelling.parameters(), *stem.word.parameters()]
    groups = [{"params": fast, "lr": lr}, {"params": stem.letters.parameters(), "lr": lr / 2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, lr / 2], total_steps=steps, pct_start=0.1)
    rights = []
    for step in track(range(steps), description="code"):
        chosen = [
            rng.choice(vocabulary.names if rng.random() < 0.85 else vocabulary.others) for _ in range(batch)
        ]
        made = word_images(chosen, fonts, rng, **curriculum(0.4 + 1.2 * step / steps))
        blank = drawings(g)
        truth = torch.tensor([number[word] for word in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            pooled = stem.letters(torch.cat([pixels(made), blank])).mean((2, 3))
        code = stem.word(norm(pooled.float()))
        word_codes, silent = code[:batch], code[batch:]
        unit = F.normalize(word_codes, dim=-1)
        logits = 30 * unit @ table.T
        loss = F.cross_entropy(logits, truth) + spelling.loss(16 * unit, letters(chosen))
        loss = loss + (word_codes.norm(dim=-1) - 1).square().mean() + 3 * silent.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(stem.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        rights.append((logits.argmax(1) == truth).float().mean().item())
        if step % 25 == 24:
            typer.echo(f"code, step {step + 1} of {steps}: loss {loss.item():.3f}, named first "
                       f"{100 * sum(rights[-20:]) / 20:.0f} %, length on drawings {silent.norm(dim=-1).mean():.2f}")  # fmt: skip
    with torch.no_grad():  # fold the norm into the linear map after it
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        first: Any = stem.word[0]
        first.bias.add_(first.weight @ (norm.bias - norm.running_mean * scale))  # type: ignore[operator]
        first.weight.mul_(scale)
    return sum(rights[-20:]) / len(rights[-20:])


@torch.no_grad()
def fold(trained: nn.Sequential, plain: nn.Sequential) -> None:
    """Folds batch norm's scale and shift into the convolutions: the shipped stem has no running statistics."""
    norms = [layer for layer in trained if isinstance(layer, nn.BatchNorm2d)]
    convolutions = [layer for layer in plain if isinstance(layer, nn.Conv2d)]
    for conv, norm in zip(convolutions, norms, strict=True):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)  # type: ignore[operator]
