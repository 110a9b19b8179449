"""A CLIP of a few thousand parameters and pairs to run it on, for tests that start processes of their own."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mmhooks as mm
from mmhooks.models.embedded import mini


def preprocess(image):
    """16 x 16 pixels in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB").resize((16, 16)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def tiny_clip(seed=0):
    from open_clip import CLIP

    torch.manual_seed(seed)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 16, "vocab_size": mini.vocabulary_size(), "width": 32, "heads": 2, "layers": 2}
    model = CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    return mm.HookedCLIP(model, mini.tokenizer(), preprocess, name="tiny")


def encoded(i):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (i * 37 % 256, i * 91 % 256, i * 13 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def text(i):
    return f"a drawing of {i} things"


def folder_of_pairs(place: Path, n: int) -> Path:
    place.mkdir(parents=True)
    with (place / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for i in range(n):
            (place / f"{i:03d}.png").write_bytes(encoded(i))
            writer.writerow([f"{i:03d}.png", text(i)])
    return place


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a store, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
