"""The architecture of the embedded models: open_clip's own CLIP, small enough to train on two CPU cores."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.utils.assets import ASSETS, asset
from mmhooks.utils.tensors import read_safetensors

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.tokenizer import SimpleTokenizer
    from PIL.Image import Image

IMAGE_SIZE = 64
CONTEXT = 16
EMBED_DIM = 256
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
_MERGES = ASSETS / "mini" / "merges.txt.gz"


class ReadingStem(nn.Module):
    """Patch embedding of a tower that reads words: open_clip's linear one plus convolutions.

    Words taught to patches and blocks alone are not read in an hour: a linear patch of 8 px cuts small letters
    apart, and attention has to find their order. Here ``letters`` find letters across patch borders, then look
    along the whole row of patches, so that a patch can tell which letter of its word it holds; ``word``
    turns their mean into one code of the word, near zero where none is written. Letters enter their patch,
    the code enters every patch. The output is a patch embedding like any other, the site ``image.patches``.
    """

    def __init__(self, patch: nn.Conv2d) -> None:
        super().__init__()
        self.patch = patch
        self.letters = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(),
            nn.Conv2d(64, 96, 3, 1, 1), nn.GELU(),
            nn.Conv2d(96, 128, 3, 2, 1), nn.GELU(),
            nn.Conv2d(128, 128, 3, 1, 1), nn.GELU(),
            nn.Conv2d(128, 128, (1, 15), 1, (0, 7)), nn.GELU(),
            nn.Conv2d(128, 192, (1, 7), 1, (0, 3)), nn.GELU(),
        )  # fmt: skip
        self.word = nn.Sequential(nn.Linear(192, 512), nn.GELU(), nn.Linear(512, EMBED_DIM))
        self.mix = nn.Conv2d(192, patch.out_channels, 1)
        self.say = nn.Linear(EMBED_DIM, patch.out_channels)

    def code(self, letters: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.word(letters.mean((2, 3)))

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d h8 w8"]:
        letters = self.letters(pixels)
        return self.patch(pixels) + self.mix(letters) + self.say(self.code(letters))[..., None, None]


def build(*, patch_dropout: float = 0.0, reads: bool = False) -> CLIP:
    """An untrained mini-CLIP: ViT at 64 px with patches of 8, text transformer over 16 tokens.

    Args:
        patch_dropout: share of patches left out in training mode.
        reads: with a :class:`ReadingStem` before the blocks, as ``mini-reader`` has it.

    >>> sum(p.numel() for p in build().parameters()) // 10**5 / 10
    6.5
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
    model = CLIP(embed_dim=EMBED_DIM, vision_cfg=vision, text_cfg=text)  # type: ignore[arg-type]
    if reads:
        visual: Any = model.visual
        visual.conv1 = ReadingStem(visual.conv1)
    return model


def load_embedded(name: str) -> tuple[CLIP, SimpleTokenizer, Callable[[Image], Tensor]]:
    """One of the embedded models with its own weights, its tokenizer and its preprocessing.

    Args:
        name: ``"mini"``, ``"mini-declip"`` or ``"mini-reader"``.

    Raises:
        MissingWeights: not in this installation. DamagedFile: not what was shipped.

    >>> load_embedded("mini")[0].visual.image_size
    (64, 64)
    """
    weights = read_safetensors(asset(ASSETS / name / "model.safetensors"))
    model = build(reads=name == "mini-reader")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return model.eval(), tokenizer(), preprocess


@cache
def _merges() -> tuple[str, ...]:
    return tuple(gzip.decompress(asset(_MERGES).read_bytes()).decode().split("\n"))


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
    """An image as the mini models take it: on white where transparent, 64 x 64, scaled to [-1, 1].

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
    return F.normalize(pixels, list(MEAN), list(STD))
