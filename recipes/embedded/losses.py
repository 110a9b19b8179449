"""Augmentation, captions and losses of the embedded models' training."""

from __future__ import annotations

import math
import random
import re

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from mmhooks.models.embedded import mini

_ONE_WAY = re.compile(r"\b(?:left|right|arrow|flag|letter|button|clock|input|symbols?|keycap|mark|sign)\b")
_TEMPLATES = (
    "{}",
    "a drawing of {}",
    "a picture of {}",
    "an icon of {}",
    "{} drawing",
    "a cartoon {}",
    "emoji of {}",
)


def caption(row: dict, rng: random.Random) -> str:
    """Draws a caption: the name, the name in a template, or the name followed by keywords."""
    roll = rng.random()
    if roll < 0.5 or (roll >= 0.75 and not row["keywords"]):
        return row["name"]
    if roll < 0.75:
        return rng.choice(_TEMPLATES).format(row["name"])
    words = rng.sample(row["keywords"], min(len(row["keywords"]), rng.randint(1, 3)))
    return ", ".join([row["name"], *words])


def may_flip(row: dict) -> bool:
    return not _ONE_WAY.search(row["name"])


def augment(
    rgba: UInt8[Tensor, "b s s 4"], flip: Bool[Tensor, " b"], g: torch.Generator
) -> Float[Tensor, "b 3 64 64"]:
    """Rotates, scales, shifts and mirrors each drawing, puts it on a random background, and shifts its colours."""
    b = len(rgba)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    pixels = rgba.permute(0, 3, 1, 2).float() / 255
    alpha = pixels[:, 3:]
    layers = torch.cat([pixels[:, :3] * alpha, alpha], 1)
    angle = (rand(b) - 0.5) * 2 * math.radians(15)
    scale = 0.85 + 0.45 * rand(b)
    stretch = 1 + 0.2 * (rand(b) - 0.5)
    mirror = torch.where(flip & (rand(b) < 0.5), -1.0, 1.0)
    shift = (rand(2, b) - 0.5) * 0.3
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([
        torch.stack([cos * mirror, -sin, shift[0]], -1),
        torch.stack([sin * mirror * stretch, cos * stretch, shift[1]], -1),
    ], 1)  # fmt: skip
    grid = F.affine_grid(theta, [b, 4, mini.IMAGE_SIZE, mini.IMAGE_SIZE], align_corners=False)
    layers = F.grid_sample(layers, grid, align_corners=False)
    colour, alpha = layers[:, :3], layers[:, 3:]
    # background: white for a third, plain colour, or a gradient between two colours
    one, two = (1 - 0.9 * rand(b, 3, 1, 1) ** 2 for _ in range(2))
    kind = rand(b, 1, 1, 1)
    ramp = torch.linspace(0, 1, mini.IMAGE_SIZE)
    ramp = torch.where(rand(b, 1, 1, 1) < 0.5, ramp.view(1, 1, 1, -1), ramp.view(1, 1, -1, 1))
    ground = torch.where(kind < 0.7, one, one + (two - one) * ramp)
    ground = torch.where(kind < 0.35, torch.ones(()), ground)
    out = colour + ground * (1 - alpha)
    # colours: saturation, contrast, brightness, and a slight cast
    grey = out.mean(1, keepdim=True)
    saturation = torch.where(rand(b, 1, 1, 1) < 0.05, torch.zeros(()), 0.6 + 0.7 * rand(b, 1, 1, 1))
    out = grey + (out - grey) * saturation
    out = (out - 0.5) * (0.75 + 0.4 * rand(b, 1, 1, 1)) + 0.5 + 0.16 * (rand(b, 1, 1, 1) - 0.5)
    out = out * (1 + 0.16 * (rand(b, 3, 1, 1) - 0.5))
    return out.clamp(0, 1).sub(0.5).div(0.5)


def plain(rgba: UInt8[Tensor, "b s s 4"]) -> Float[Tensor, "b 3 64 64"]:
    """Returns drawings as evaluation uses them: on white, uncropped, 64 x 64."""
    pixels = rgba.permute(0, 3, 1, 2).float() / 255
    flat = pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]
    size = (mini.IMAGE_SIZE, mini.IMAGE_SIZE)
    return F.interpolate(flat, size, mode="bicubic", antialias=True).clamp(0, 1).sub(0.5).div(0.5)


def contrastive(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    same: Bool[Tensor, "b b"],
) -> Float[Tensor, ""]:
    """Computes symmetric InfoNCE over unit vectors; all pairs of the same name are positives."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def relational(text: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """Computes the KL divergence from a sentence encoder's neighbourhoods of the batch's captions to ours."""
    ours, theirs = F.normalize(text, dim=-1), F.normalize(teacher, dim=-1)
    hole = torch.eye(len(text), dtype=torch.bool)
    ours = (ours @ ours.T / 0.1).masked_fill(hole, -1e4).log_softmax(-1)
    theirs = (theirs @ theirs.T / 0.1).masked_fill(hole, -1e4).log_softmax(-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


class SelfSupervision(nn.Module):
    """DeCLIP's two single-modality tasks: SimSiam between two views of an image, and masked words."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        d, wide = mini.EMBED_DIM, 512
        self.project = nn.Sequential(nn.Linear(d, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, d),
                                     nn.BatchNorm1d(d, affine=False))  # fmt: skip
        self.predict = nn.Sequential(nn.Linear(d, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, d))
        self.words = nn.Linear(192, vocabulary)

    def image_image(self, a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        za, zb = self.project(a), self.project(b)
        pa, pb = self.predict(za), self.predict(zb)
        return (
            -(F.cosine_similarity(pa, zb.detach()).mean() + F.cosine_similarity(pb, za.detach()).mean()) / 2
        )

    def text_text(
        self, hidden: Float[Tensor, "b l w"], tokens: Int[Tensor, "b l"], masked: Bool[Tensor, "b l"]
    ) -> Float[Tensor, ""]:
        return F.cross_entropy(self.words(hidden[masked].float()), tokens[masked])


def mask_words(
    tokens: Int[Tensor, "b l"], mask_id: int, g: torch.Generator
) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Replaces one word piece in five by the mask token, but not start, end and padding."""
    inner = (tokens != 0) & (tokens < mask_id - 2)
    masked = inner & (torch.rand(tokens.shape, generator=g) < 0.2)
    masked[:, 1] |= ~masked.any(1)
    return tokens.masked_fill(masked, mask_id), masked
