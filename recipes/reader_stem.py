"""First stage of mini-reader: convolutions that say which letter stands where, trained for a few minutes.

Words taught to a ViT from scratch are not learned in hours of one core. Letters at their place are a local
task with an answer in every patch, which small convolutions learn quickly; they become the tower's stem.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from reader_words import LONGEST, Vocabulary, pixels, word_pictures
from rich.progress import track
from torch import Tensor, nn

from mmhooks.models import mini

CLASSES = 27  # a - z, and "the word has ended"
WORD_SIZE = {"size": (8.0, 30.0)}


class Spelling(nn.Module):
    """Which letter stands at which place, read linearly from a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, LONGEST * CLASSES)

    def forward(self, vector: Float[Tensor, "n d"]) -> Float[Tensor, "n longest classes"]:
        return self.linear(vector).view(len(vector), LONGEST, CLASSES)

    def loss(self, vector: Float[Tensor, "n d"], truth: Int[Tensor, "n longest"]) -> Float[Tensor, ""]:
        return F.cross_entropy(self(vector).flatten(0, 1), truth.flatten())


class LetterFinder(nn.Module):
    """The stem's convolutions with batch norm, and a 1x1 that is thrown away: for the left and the right half
    of each patch, the letter whose middle lies there."""

    def __init__(self, stem: mini.ReadingStem) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in stem.letters:
            layers.append(layer)
            if isinstance(layer, nn.Conv2d):
                layers.append(nn.BatchNorm2d(layer.out_channels))
        self.letters = nn.Sequential(*layers)
        self.head = nn.Conv2d(128, 2 * CLASSES, 1)

    def forward(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b rows columns classes"]:
        found = self.head(self.letters(picture)).unflatten(1, (2, CLASSES))  # b half class row patch
        return found.permute(0, 3, 4, 1, 2).flatten(2, 3)


def curriculum(progress: float) -> dict:
    """Large and central words first, then smaller ones anywhere."""
    p = min(1.0, progress)
    return {"width": (0.8 - 0.5 * p, 0.95), "offset": p, **WORD_SIZE}


def train_stem(
    stem: mini.ReadingStem, vocabulary: Vocabulary, fonts: list[str], *, steps: int, batch: int = 128,
    lr: float = 2e-3, seed: int = 0,
) -> float:  # fmt: skip
    """Train the convolutions in place, batch norm folded in at the end. Returns the share of letters that
    the last 20 steps named rightly, at their place."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    net = LetterFinder(stem).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    pool = vocabulary.names + vocabulary.others
    right = []
    for step in track(range(steps), description="stem"):
        how = curriculum(1.5 * step / steps)
        made = word_pictures(dice.choices(pool, k=batch), fonts, dice, turn=0.0, **how)
        truth = torch.stack([one.letter_map() for one in made])
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(pixels(made)).float()
        letter = truth < 26
        loss = F.cross_entropy(logits[letter], truth[letter]) + F.cross_entropy(
            logits[~letter], truth[~letter]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append((logits[letter].argmax(-1) == truth[letter]).float().mean().item())
        if step % 50 == 49:
            note = f"stem, step {step + 1} of {steps}: loss {loss.item():.3f}"
            typer.echo(f"{note}, letters named {100 * sum(right[-20:]) / 20:.0f} %")
    fold(net.letters, stem.letters)
    return sum(right[-20:]) / len(right[-20:])


@torch.no_grad()
def fold(trained: nn.Sequential, plain: nn.Sequential) -> None:
    """Put batch norm's scale and shift into the convolutions: the shipped stem has no running statistics."""
    norms = [layer for layer in trained if isinstance(layer, nn.BatchNorm2d)]
    convolutions = [layer for layer in plain if isinstance(layer, nn.Conv2d)]
    for conv, norm in zip(convolutions, norms, strict=True):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)  # type: ignore[operator]
