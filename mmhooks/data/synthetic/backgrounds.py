"""Backgrounds drawn from a seed: cloudy colours as in a photograph, patterns, and scenes of land and of water."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Ground = Literal["photo-like", "patterned", "land", "water"]


def ground(kind: Ground, size: int, seed: int) -> Image.Image:
    """An RGB picture ``size`` x ``size``; equal seeds give equal pictures."""
    draw = np.random.default_rng([seed, GROUNDS.index(kind)])
    made = {"photo-like": photo_like, "patterned": patterned, "land": land, "water": water}[kind](size, draw)
    return Image.fromarray((255 * made.clip(0, 1)).astype(np.uint8))


GROUNDS: tuple[Ground, ...] = ("photo-like", "patterned", "land", "water")


def clouds(size: int, draw: np.random.Generator, *, octaves: int = 5, falloff: float = 0.55) -> np.ndarray:
    """Smooth noise in [0, 1]: random grids, each twice as fine and ``falloff`` as strong as the last one."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        cells = min(2 ** (octave + 1), size)
        grid = Image.fromarray(draw.random((cells, cells)).astype(np.float32), mode="F")
        total += falloff**octave * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    return (total - total.min()) / (np.ptp(total) + 1e-9)


def photo_like(size: int, draw: np.random.Generator) -> np.ndarray:
    """Three colours mixed by clouds, lit from one side, with grain: the low frequencies of a photograph."""
    colours = draw.random((3, 3)) * 0.8 + 0.1
    first, second = (clouds(size, draw)[..., None] for _ in range(2))
    picture = colours[0] * first + colours[1] * (1 - first)
    picture = picture * (1 - 0.6 * second) + colours[2] * 0.6 * second
    slope = np.linspace(-0.15, 0.15, size)
    light = slope[:, None] * draw.uniform(-1, 1) + slope[None] * draw.uniform(-1, 1)
    return picture + light[..., None] + draw.normal(0, 0.02, (size, size, 1))


def patterned(size: int, draw: np.random.Generator) -> np.ndarray:
    """Stripes, checks, dots or rings in two colours, at any angle."""
    colours = draw.random((2, 3))
    y, x = np.mgrid[:size, :size] / size
    angle, period = draw.uniform(0, np.pi), draw.uniform(0.08, 0.25)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / period, (y * np.cos(angle) - x * np.sin(angle)) / period
    which = draw.integers(4)
    if which == 0:
        mask = u % 1 < 0.5
    elif which == 1:
        mask = (u % 1 < 0.5) ^ (v % 1 < 0.5)
    elif which == 2:
        mask = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08
    else:
        mask = np.hypot(x - draw.random(), y - draw.random()) / period % 1 < 0.5
    return np.where(mask[..., None], colours[0], colours[1])


def land(size: int, draw: np.random.Generator) -> np.ndarray:
    """Sky, hills one before the other, grass, sand or earth, and trees."""
    picture = _sky(size, draw)
    greens = [(0.35, 0.6, 0.25), (0.25, 0.5, 0.2), (0.55, 0.65, 0.3), (0.75, 0.65, 0.4), (0.55, 0.4, 0.25)]
    y, x = np.mgrid[:size, :size] / size
    horizon = draw.uniform(0.25, 0.45)
    for depth in range(3):
        base = np.array(greens[draw.integers(len(greens))]) * draw.uniform(0.8, 1.15)
        line = horizon + 0.18 * depth + 0.06 * np.sin(x[0] * draw.uniform(4, 12) + draw.uniform(0, 6))
        texture = 0.12 * (clouds(size, draw, octaves=6, falloff=0.8)[..., None] - 0.5)
        picture = np.where((y > line[None])[..., None], base + texture, picture)
    for _ in range(draw.integers(1, 5)):
        at, foot, height = draw.random(), draw.uniform(0.5, 0.8), draw.uniform(0.15, 0.35)
        trunk = (abs(x - at) < 0.015) & (y < foot) & (y > foot - height)
        crown = ((x - at) / 0.1) ** 2 + ((y - foot + height) / (0.6 * height)) ** 2 < 1
        picture = np.where(trunk[..., None], (0.4, 0.26, 0.13), picture)
        picture = np.where(crown[..., None], np.array((0.13, 0.42, 0.16)) * draw.uniform(0.8, 1.2), picture)
    return picture


def water(size: int, draw: np.random.Generator) -> np.ndarray:
    """Sky over a sea with waves, that grows darker towards the spectator."""
    picture = _sky(size, draw)
    y, x = np.mgrid[:size, :size] / size
    horizon = draw.uniform(0.1, 0.4)
    blue = np.array(((0.1, 0.4, 0.7), (0.1, 0.55, 0.65), (0.15, 0.3, 0.6))[draw.integers(3)])
    near = (y - horizon) / (1 - horizon)
    waves = np.sin(
        (60 / (near.clip(0) + 0.35)) * near + 2 * np.sin(x * draw.uniform(5, 20) + draw.uniform(0, 6))
    )
    sea = blue * (1.15 - 0.45 * near[..., None]) + 0.1 * (waves[..., None] > 0.6)
    return np.where((y > horizon)[..., None], sea + 0.03 * (clouds(size, draw)[..., None] - 0.5), picture)


def _sky(size: int, draw: np.random.Generator) -> np.ndarray:
    colours = [(0.55, 0.78, 0.95), (0.75, 0.85, 0.92), (0.95, 0.8, 0.65)]
    base = np.array(colours[draw.integers(len(colours))])
    return base + 0.25 * (clouds(size, draw)[..., None] - 0.4) * np.ones(3)


def put_on(drawing: Image.Image, background: Image.Image, *, scale: float, at: tuple[float, float]) -> tuple[
    Image.Image, np.ndarray
]:  # fmt: skip
    """``drawing`` (RGBA) on ``background``, ``scale`` of its width, at a place in [0, 1]²; and its exact mask."""
    size = background.width
    side = max(1, round(scale * size))
    small = drawing.convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
    layer = Image.new("RGBA", background.size)
    layer.paste(small, (round(at[0] * (size - side)), round(at[1] * (size - side))))
    picture = Image.alpha_composite(background.convert("RGBA"), layer).convert("RGB")
    return picture, np.asarray(layer)[..., 3] > 127
