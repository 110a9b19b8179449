"""Synthetic backgrounds: photo-like clouds of colour, patterns, and scenes of land and water, reproducible by seed."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Kind = Literal["photo-like", "patterned", "land", "water"]


def draw_background(kind: Kind, size: int, seed: int) -> Image.Image:
    """An RGB image of ``size`` x ``size``, reproducible by seed."""
    rng = np.random.default_rng([seed, BACKGROUNDS.index(kind)])
    made = {"photo-like": photo_like, "patterned": patterned, "land": land, "water": water}[kind](size, rng)
    return Image.fromarray((255 * made.clip(0, 1)).astype(np.uint8))


BACKGROUNDS: tuple[Kind, ...] = ("photo-like", "patterned", "land", "water")


def clouds(size: int, rng: np.random.Generator, *, octaves: int = 5, falloff: float = 0.55) -> np.ndarray:
    """Smooth noise in [0, 1]: the sum of random grids, each twice as fine and ``falloff`` times as strong as the last."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        cells = min(2 ** (octave + 1), size)
        grid = Image.fromarray(rng.random((cells, cells)).astype(np.float32), mode="F")
        total += falloff**octave * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    return (total - total.min()) / (np.ptp(total) + 1e-9)


def photo_like(size: int, rng: np.random.Generator) -> np.ndarray:
    """Three colours mixed by clouds, lit from one side, with grain: resembles a photograph's low frequencies."""
    colours = rng.random((3, 3)) * 0.8 + 0.1
    first, second = (clouds(size, rng)[..., None] for _ in range(2))
    image = colours[0] * first + colours[1] * (1 - first)
    image = image * (1 - 0.6 * second) + colours[2] * 0.6 * second
    slope = np.linspace(-0.15, 0.15, size)
    light = slope[:, None] * rng.uniform(-1, 1) + slope[None] * rng.uniform(-1, 1)
    return image + light[..., None] + rng.normal(0, 0.02, (size, size, 1))


def patterned(size: int, rng: np.random.Generator) -> np.ndarray:
    """Stripes, checks, dots or rings in two colours, at any angle."""
    colours = rng.random((2, 3))
    y, x = np.mgrid[:size, :size] / size
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.08, 0.25)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / period, (y * np.cos(angle) - x * np.sin(angle)) / period
    which = rng.integers(4)
    if which == 0:
        mask = u % 1 < 0.5
    elif which == 1:
        mask = (u % 1 < 0.5) ^ (v % 1 < 0.5)
    elif which == 2:
        mask = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08
    else:
        mask = np.hypot(x - rng.random(), y - rng.random()) / period % 1 < 0.5
    return np.where(mask[..., None], colours[0], colours[1])


def land(size: int, rng: np.random.Generator) -> np.ndarray:
    """Sky, rows of hills, grass, sand or earth, and trees."""
    image = _sky(size, rng)
    greens = [(0.35, 0.6, 0.25), (0.25, 0.5, 0.2), (0.55, 0.65, 0.3), (0.75, 0.65, 0.4), (0.55, 0.4, 0.25)]
    y, x = np.mgrid[:size, :size] / size
    horizon = rng.uniform(0.25, 0.45)
    for depth in range(3):
        base = np.array(greens[rng.integers(len(greens))]) * rng.uniform(0.8, 1.15)
        line = horizon + 0.18 * depth + 0.06 * np.sin(x[0] * rng.uniform(4, 12) + rng.uniform(0, 6))
        texture = 0.12 * (clouds(size, rng, octaves=6, falloff=0.8)[..., None] - 0.5)
        image = np.where((y > line[None])[..., None], base + texture, image)
    for _ in range(rng.integers(1, 5)):
        at, foot, height = rng.random(), rng.uniform(0.5, 0.8), rng.uniform(0.15, 0.35)
        trunk = (abs(x - at) < 0.015) & (y < foot) & (y > foot - height)
        crown = ((x - at) / 0.1) ** 2 + ((y - foot + height) / (0.6 * height)) ** 2 < 1
        image = np.where(trunk[..., None], (0.4, 0.26, 0.13), image)
        image = np.where(crown[..., None], np.array((0.13, 0.42, 0.16)) * rng.uniform(0.8, 1.2), image)
    return image


def water(size: int, rng: np.random.Generator) -> np.ndarray:
    """Sky over a sea with waves that gets darker towards the viewer."""
    image = _sky(size, rng)
    y, x = np.mgrid[:size, :size] / size
    horizon = rng.uniform(0.1, 0.4)
    blue = np.array(((0.1, 0.4, 0.7), (0.1, 0.55, 0.65), (0.15, 0.3, 0.6))[rng.integers(3)])
    near = (y - horizon) / (1 - horizon)
    waves = np.sin(
        (60 / (near.clip(0) + 0.35)) * near + 2 * np.sin(x * rng.uniform(5, 20) + rng.uniform(0, 6))
    )
    sea = blue * (1.15 - 0.45 * near[..., None]) + 0.1 * (waves[..., None] > 0.6)
    return np.where((y > horizon)[..., None], sea + 0.03 * (clouds(size, rng)[..., None] - 0.5), image)


def _sky(size: int, rng: np.random.Generator) -> np.ndarray:
    colours = [(0.55, 0.78, 0.95), (0.75, 0.85, 0.92), (0.95, 0.8, 0.65)]
    base = np.array(colours[rng.integers(len(colours))])
    return base + 0.25 * (clouds(size, rng)[..., None] - 0.4) * np.ones(3)


def paste_on(drawing: Image.Image, background: Image.Image, *, scale: float, at: tuple[float, float]) -> tuple[
    Image.Image, np.ndarray
]:  # fmt: skip
    """Pastes ``drawing`` (RGBA) on ``background`` at ``scale`` of its width and a position in [0, 1]²; also returns the
    exact mask."""
    size = background.width
    side = max(1, round(scale * size))
    small = drawing.convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", background.size)
    layer.paste(small, (round(at[0] * (size - side)), round(at[1] * (size - side))))
    image = Image.alpha_composite(background.convert("RGBA"), layer).convert("RGB")
    return image, np.asarray(layer)[..., 3] > 127
