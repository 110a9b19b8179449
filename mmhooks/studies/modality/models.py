"""Models of the modality study, where its options place them: CLIP, DeCLIP, and the embedders that measure similarity."""

from __future__ import annotations

from typing import Any

from mmhooks.studies.common.placement import Placement
from mmhooks.studies.modality.options import Options


def load_clip(options: Options) -> Any:
    """Loads ``--model``."""
    return _load(options, options.model, options.pretrained)


def load_declip(options: Options) -> Any:
    """Loads the DeCLIP model: the embedded one for mini, else the user's checkpoint; None if there is none.

    An official file is a ViT-B/32 whatever ``--model`` is; any other is a checkpoint of ``--model``'s class.
    """
    from mmhooks.models.clip.declip import is_declip

    name = options.declip
    if name == "auto":
        name = "mini-declip" if options.model == "mini" else ""
    if not name:
        return None
    if name == "mini-declip":
        return _load(options, name)
    return _load(options, "ViT-B-32" if is_declip(name) else options.model, name)


def similarity_embeddings(pairs: Any, options: Options) -> dict[str, Any]:
    """Embeds images and texts by models that are not studied, to measure similarity; cached by data and embedder."""
    from mmhooks.models.embedders import image_embedder, text_embedder

    place = Placement.of(options)
    how: Any = {"device": place.device, "dtype": place.dtype, "progress": not options.quiet}
    texts, images = text_embedder(options.text_embedder, **how), image_embedder(options.image_embedder, **how)
    return {"image": images(pairs), "text": texts(pairs)}


def _load(options: Options, name: str, pretrained: str | None = None) -> Any:
    import mmhooks as mm

    place = Placement.of(options)
    return mm.load(name, pretrained=pretrained, device=place.device, dtype=place.dtype)
