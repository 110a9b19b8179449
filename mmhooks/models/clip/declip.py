"""The official checkpoints of DeCLIP, read strictly into open_clip's own CLIP.

Released files hold ``{"model": …}`` beside the state of training; every key may start with ``module.``. The text tower
is under ``encode_text.``, its projection is a linear layer with a bias, and its vocabulary has a mask in front of the
start of the text, so that every special token is one number higher than OpenAI's. Blocks are QuickGELU's, pixels are
scaled by ImageNet's mean and standard deviation, and embeddings are 3,072 (88M) or 512 wide (YFCC15M).

Source: Li et al., "Supervision Exists Everywhere" (ICLR 2022), and its public code, Sense-GVT/DeCLIP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL.Image import Image
from torch import Tensor

from mmhooks.errors import DamagedFile, MMHooksError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TEXT = "encode_text."
_HIDDEN, _BOTTLENECK = 1024, 512  # of the heads that the image tower was trained with
_SHOWN = 8
Shapes = dict[str, tuple[int, ...]]


class DeclipTokenizer(SimpleTokenizer):
    """CLIP's word pieces with DeCLIP's special tokens: mask 49406, start 49407, end 49408.

    A text cannot contain the mask, as in the public code; ``<|startoftext|>`` and ``<|endoftext|>`` it can.

    >>> DeclipTokenizer()(["a cat"])[0, :5].tolist()
    [49407, 320, 2368, 49408, 0]
    """

    def __init__(self, context_length: int = 77) -> None:
        import regex

        super().__init__(context_length=context_length)
        special = ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = [*list(self.encoder)[:-2], "<|mask|>", *special]
        self.encoder = {piece: index for index, piece in enumerate(vocabulary)}
        self.decoder = dict(enumerate(vocabulary))
        self.cache = {token: token for token in special}
        self.vocab_size = len(vocabulary)
        self.all_special_ids = [self.encoder[token] for token in special]
        self.sot_token_id, self.eot_token_id = self.all_special_ids
        words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        self.pat = regex.compile("|".join([*map(regex.escape, special), words]), regex.IGNORECASE)


def declip_preprocess(size: int) -> Callable[[Image], Tensor]:
    """How DeCLIP was evaluated: the shorter side at 8/7 of ``size`` (256 for 224), the middle cut out, ImageNet's scale.

    >>> from PIL import Image
    >>> declip_preprocess(224)(Image.new("L", (300, 400))).shape
    torch.Size([3, 224, 224])
    """
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    resize = Resize(round(size * 256 / 224), interpolation=InterpolationMode.BILINEAR)
    return Compose([_to_rgb, resize, CenterCrop(size), ToTensor(), Normalize(MEAN, STD)])


def is_declip(path: str | Path) -> bool:
    """Whether a file is a checkpoint of DeCLIP's public code: its text tower is under ``encode_text.``.

    >>> is_declip("nowhere.pth.tar")
    False
    """
    if not Path(path).is_file():
        return False
    try:
        state = _state(torch.load(path, map_location="meta", weights_only=True))
    except Exception:  # not a checkpoint of torch's: whoever loads it says so
        return False
    return any(key.startswith(_TEXT) for key in state)


def load_declip(
    name: str, path: str | Path, *, precision: str = "fp32"
) -> tuple[Any, DeclipTokenizer, Callable[[Image], Tensor]]:
    """An official checkpoint as an open_clip ``CLIP``, with its tokenizer and its preprocessing.

    The embedding's width is the file's. Heads that only training used (SimSiam's projector and predictor, masked words)
    are checked where the file has them and not kept; so is what stands beside ``"model"``, such as the optimizer.

    Args:
        name: of the open_clip configuration; ``"ViT-B-32"`` for the released ViT.
        precision: open_clip's.

    Raises:
        DamagedFile: a key that is missing, surplus or of another shape; names it.
        MMHooksError: a configuration that is not a ViT with open_clip's own text tower.
    """
    import open_clip

    state = _state(torch.load(path, map_location="cpu", weights_only=True))
    config: dict[str, Any] = open_clip.get_model_config(name) or {}
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    foreign = {"timm_model_name", "hf_model_name"} & {*vision, *text} or config.get("custom_text")
    if foreign or not isinstance(vision.get("layers"), int):
        raise MMHooksError(
            f"{path}: expected a ViT with open_clip's own text tower for a checkpoint of DeCLIP, got {name!r}; the "
            'released ViT is "ViT-B-32"'
        )
    tokenizer = DeclipTokenizer(text.get("context_length", 77))
    model = open_clip.create_model(
        name,
        precision=precision,
        quick_gelu=True,
        embed_dim=_embed_dim(state, str(path)),
        text_cfg=text | {"vocab_size": tokenizer.vocab_size, "proj_bias": True},
    )
    towers = {_official(key): tuple(value.shape) for key, value in model.state_dict().items()}
    towers["logit_scale"] = (1,)
    check_layout(state, towers | _heads(state, towers), f"{path} as {name}")
    weights = {key.removeprefix(_TEXT): state[key] for key in towers}
    weights["logit_scale"] = weights["logit_scale"].squeeze(0)
    model.load_state_dict(weights)
    return model, tokenizer, declip_preprocess(model.visual.image_size[0])  # type: ignore[union-attr,index]


def check_layout(state: Mapping[str, Any], expected: Shapes, what: str) -> None:
    """Compares a checkpoint with the shapes that it must have.

    Raises:
        DamagedFile: names keys that are missing, surplus, or of another shape.

    >>> check_layout({"logit_scale": torch.ones(1)}, {"logit_scale": (1,)}, "a file")
    """
    missing = [key for key in expected if key not in state]
    surplus = [key for key in state if key not in expected]
    misshapen = [
        f"{key} {_shape(state[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in state and _shape(state[key]) != list(shape)
    ]
    kinds = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    faults = [f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
    if faults:
        raise DamagedFile(
            f"{what}: expected the layout of DeCLIP's released checkpoints, got {'; '.join(faults)}; take the file with "
            "the text encoder as it was released, and the configuration of its architecture"
        )


def _state(content: Any) -> dict[str, Any]:
    """The weights of a checkpoint without the prefix of data parallel training; empty if there are none."""
    state = content.get("model", content) if isinstance(content, Mapping) else {}
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return {}
    wrapped = all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}


def _embed_dim(state: Mapping[str, Any], what: str) -> int:
    """The width that most of the projections have: the one that differs is named when shapes are compared."""
    ends = {"visual.proj": 1, f"{_TEXT}text_projection.weight": 0, f"{_TEXT}text_projection.bias": 0}
    shapes = {key: _shape(state[key]) for key in ends if key in state}
    widths = Counter(shape[ends[key]] for key, shape in shapes.items() if len(shape) > ends[key])
    if not widths:
        raise DamagedFile(
            f"{what}: expected the projections {', '.join(ends)}, got none of them; take the file with the text encoder "
            "as it was released"
        )
    return widths.most_common(1)[0][0]


def _official(key: str) -> str:
    """The name in DeCLIP's files of what open_clip's CLIP calls ``key``."""
    return key if key == "logit_scale" or key.startswith("visual.") else _TEXT + key


def _heads(state: Mapping[str, Any], towers: Shapes) -> Shapes:
    """Shapes of those training heads of which the file has any part: each is there as a whole or not at all."""
    embed, width = towers[f"{_TEXT}text_projection.weight"]
    vocabulary = towers[f"{_TEXT}token_embedding.weight"][0]
    layers = {
        **_linear("linear1", embed, _HIDDEN), **_batch_norm("bn1", _HIDDEN),
        **_linear("linear2", _HIDDEN, _HIDDEN), **_batch_norm("bn2", _HIDDEN),
        **_linear("linear3", _HIDDEN, _HIDDEN), **_batch_norm("bn3", _HIDDEN),
    }  # fmt: skip
    bottleneck = {
        **_linear("linear1", _HIDDEN, _BOTTLENECK), **_batch_norm("bn1", _BOTTLENECK),
        **_linear("layer2", _BOTTLENECK, _HIDDEN),
    }  # fmt: skip
    heads = {"text_label_predictor": {"weight": (vocabulary, width), "bias": (vocabulary,)}}
    for of in ("", "_text", "_nn_text"):  # images; the optional tasks on texts
        heads |= {f"projector{of}": layers, f"predictor{of}": bottleneck}
    present = {key.split(".")[0] for key in state}
    return {f"{head}.{key}": shape for head in heads if head in present for key, shape in heads[head].items()}


def _linear(name: str, width: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _batch_norm(name: str, width: int) -> Shapes:
    parts: Shapes = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return parts | {f"{name}.num_batches_tracked": ()}


def _shape(value: Any) -> list[int]:
    return list(value.shape) if isinstance(value, Tensor) else [-1]  # no tensor has that


def _listed(keys: list[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _to_rgb(image: Image) -> Image:
    return image.convert("RGB")
