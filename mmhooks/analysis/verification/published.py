"""Numbers that others published of a checkpoint, which identify its weights and its preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmhooks.analysis.verification.check import Check
from mmhooks.data.sources.images import open_image
from mmhooks.errors import DataError, MissingWeights
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.utils.json_files import check_fields, read_json

FILE = Path(__file__).with_name("published.json")
_LARGEST = 20_000_000  # bytes of a picture
_SECONDS = 30.0
_FIELDS: dict[str, Any] = {
    "models": list, "kind": str, "what": str, "source": str, "picture": dict, "texts": list, "values": list,
    "tolerance": (int, float),
}  # fmt: skip
_REMEDY = "docs/verify.md shows the format"


@dataclass(frozen=True)
class Published:
    """Numbers of one picture against texts.

    Attributes:
        models: names that ``mmhooks verify`` takes.
        kind: "probabilities", softmax over the texts, or "logits".
        what, source: in words, and where they stand.
        picture: ``name``, ``url`` and, where known, ``sha256`` of the file.
        tolerance: how far each number may be off; ours, for other kernels and ways to resize.
    """

    models: list[str]
    kind: str
    what: str
    source: str
    picture: dict[str, str]
    texts: list[str]
    values: list[float]
    tolerance: float


def published_of(name: str, file: str | Path = FILE) -> list[Published]:
    """The known numbers of a model.

    Raises:
        DataError: a file of another format.

    >>> [p.values for p in published_of("ViT-B-32/openai")]
    [[0.9927937, 0.00421068, 0.00299572]]
    """
    content = read_json(file, "a file of published numbers", {"published": list}, remedy=_REMEDY)
    for entry in content["published"]:
        check_fields(entry, _FIELDS, f"{file} is not a file of published numbers", remedy=_REMEDY)
        counts = len(entry["texts"]), len(entry["values"])
        if entry["kind"] not in ("probabilities", "logits") or counts[0] != counts[1]:
            raise DataError(
                f"{file}: expected kind probabilities or logits and a value for each text, got {entry['kind']!r} with "
                f"{counts[0]} texts and {counts[1]} values; {_REMEDY}"
            )
        check_fields(entry["picture"], {"name": str, "url": str}, f"{file}, picture", remedy=_REMEDY)
    found = [Published(**{name: entry[name] for name in _FIELDS}) for entry in content["published"]]
    return [one for one in found if name in one.models]


@torch.no_grad()
def published_checks(
    model: Any, known: Sequence[Published], pictures: Sequence[str | Path], fetch: Callable[[str], bytes]
) -> list[Check]:
    """Compares what a model says with the published numbers.

    Args:
        pictures: files of the user's, by the names of the published pictures; others are fetched.
        fetch: the bytes at an address.

    Raises:
        DataError: a picture that belongs to no published number.
    """
    by_name = {Path(path).name: Path(path) for path in pictures}
    strange = sorted(by_name.keys() - {one.picture["name"] for one in known})
    if strange:
        names = ", ".join(one.picture["name"] for one in known) or "none, as no number is known"
        raise DataError(
            f"--picture: expected a file named as a published picture of this model ({names}), got {strange[0]!r}"
        )
    if not known or not isinstance(model, HookedCLIP):
        return [Check("published number", "", None, None, None, None, "no published number known")]
    return [_checked(model, one, by_name.get(one.picture["name"]), fetch) for one in known]


def _checked(model: HookedCLIP, known: Published, path: Path | None, fetch: Callable[[str], bytes]) -> Check:
    try:
        content = fetch(known.picture["url"]) if path is None else path.read_bytes()
        image = open_image(content)
    except Exception as fault:  # of the network, the disk and the decoder
        name = known.picture["name"]
        note = f"{name} cannot be read ({type(fault).__name__}: {fault}); download it and give --picture .../{name}"
        return Check(known.what, name, known.values, None, known.tolerance, None, note)
    digest, wanted = hashlib.sha256(content).hexdigest(), known.picture.get("sha256")
    if wanted and digest != wanted:
        note = f"expected the picture with SHA-256 {wanted}, got {digest}"
        return Check(known.what, known.picture["name"], known.values, None, known.tolerance, None, note)
    got = _values(model, image, known)
    off = max(abs(a - b) for a, b in zip(got, known.values, strict=True))
    return Check(
        known.what,
        known.picture["name"],
        known.values,
        got,
        known.tolerance,
        off <= known.tolerance,
        known.source,
    )


def _values(model: HookedCLIP, image: Image.Image, known: Published) -> list[float]:
    if model.preprocess is None:
        raise MissingWeights("expected a model with its preprocessing, got one without; load it by name")
    pixels = model.to_input(model.preprocess(image)[None])
    vector = model.encode_image(pixels, normalize=True).float().cpu()[0]
    scale, bias = model.logit_scale.detach().float().exp().cpu(), getattr(model.model, "logit_bias", None)
    logits = scale * (embed_texts(model, known.texts) @ vector)
    logits = logits if bias is None else logits + bias.detach().float().cpu()  # type: ignore[union-attr]
    return (logits.softmax(0) if known.kind == "probabilities" else logits).flatten().tolist()


def fetch_bytes(url: str) -> bytes:
    """Downloads a small file.

    Raises:
        OSError: no network, no such file, or a file that is too large.
    """
    from urllib.request import urlopen

    if not url.startswith(("https://", "http://")):
        raise OSError(f"expected an address of the web, got {url!r}")
    with urlopen(url, timeout=_SECONDS) as answer:
        content = answer.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise OSError(f"expected at most {_LARGEST} bytes, got more")
    return content
