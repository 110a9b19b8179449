"""The architecture of the embedded models: open_clip's own CLIP, small enough to train on two CPU cores."""

from __future__ import annotations

import gzip
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.tokenizer import SimpleTokenizer
    from PIL.Image import Image

IMAGE_SIZE = 64
CONTEXT = 16
EMBED_DIM = 256
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
_MERGES = Path(__file__).parent.parent / "assets" / "mini" / "merges.txt.gz"


def build(*, patch_dropout: float = 0.0) -> CLIP:
    """An untrained mini-CLIP: ViT at 64 px with patches of 8, text transformer over 16 tokens.

    >>> sum(p.numel() for p in build().parameters()) // 10**5 / 10
    6.2
    """
    from open_clip import CLIP

    vision: dict[str, Any] = {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "width": 192,
        "layers": 6,
        "head_width": 32,
        "patch_dropout": patch_dropout,
    }
    text = {
        "context_length": CONTEXT,
        "vocab_size": vocabulary_size(),
        "width": 192,
        "heads": 6,
        "layers": 4,
    }
    return CLIP(embed_dim=EMBED_DIM, vision_cfg=vision, text_cfg=text)  # type: ignore[arg-type]


@cache
def _merges() -> tuple[str, ...]:
    return tuple(gzip.decompress(_MERGES.read_bytes()).decode().split("\n"))


def vocabulary_size() -> int:
    """Bytes, bytes that end a word, merges, start, end, and the mask that DeCLIP's training needs."""
    return 512 + len(_merges()) + 3


def mask_id() -> int:
    return vocabulary_size() - 1


def tokenizer() -> SimpleTokenizer:
    """open_clip's tokenizer with the merges that the corpus uses, in their order, and a context of 16 tokens.

    Words of the corpus are cut exactly as the whole vocabulary cuts them.

    >>> tokenizer()(["a red panda"]).shape
    torch.Size([1, 16])
    """
    from open_clip.tokenizer import SimpleTokenizer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merges.txt.gz"  # open_clip skips the first line and takes a path only
        file.write_bytes(gzip.compress("\n".join(["", *_merges()]).encode()))
        return SimpleTokenizer(bpe_path=str(file), context_length=CONTEXT)


def preprocess(image: Image) -> Float[Tensor, "3 64 64"]:
    """A picture as the mini models take it: on white where transparent, 64 x 64, scaled to [-1, 1].

    >>> from PIL import Image
    >>> preprocess(Image.new("RGBA", (72, 72))).unique()
    tensor([1.])
    """
    from PIL import Image
    from torchvision.transforms import functional as F

    if image.mode not in ("RGB", "L"):
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = F.pil_to_tensor(image).float() / 255
    return F.normalize(pixels, MEAN, STD)
