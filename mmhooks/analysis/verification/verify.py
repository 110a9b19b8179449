"""``mm.verify``: whether hooks, sites and weights of a model are what they should be, as a report that can be sent back."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmhooks.analysis.decomposition.decompose import decompose
from mmhooks.analysis.verification.check import Check, close, equal_bits
from mmhooks.analysis.verification.published import FILE, fetch_bytes, published_checks, published_of
from mmhooks.analysis.verification.site_checks import (
    capture_checks,
    edit_checks,
    groups_of,
    idle_checks,
    read,
    some_blocks,
)
from mmhooks.analysis.verification.subject import Subject, subject_of
from mmhooks.analysis.verification.sums import stream_sums
from mmhooks.errors import MMHooksError, NoDigest, NoExactSum
from mmhooks.hooks.dispatch import registry
from mmhooks.models.clip.model import HookedCLIP
from mmhooks.models.diffusion.model import HookedDiffusion, load_diffusion
from mmhooks.models.provenance import weights_hash
from mmhooks.models.zoo import load
from mmhooks.utils.assets import EMBEDDED
from mmhooks.utils.files import write_text
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import track

_PACKAGES = (
    "mmhooks",
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "open_clip_torch",
    "timm",
    "pillow",
)


@dataclass(frozen=True)
class Verification:
    """What was checked of one model.

    Attributes:
        model: its name, class, type, device, digest of its weights, and revision where it is known.
        inputs: in words, by tower.
        checks: every one.
    """

    model: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]
    checks: list[Check]
    seconds: float

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        counts = {
            "passed": sum(c.passed is True for c in self.checks),
            "failed": len(self.failed),
            "not checked": sum(c.passed is None for c in self.checks),
        }
        return {"verified": not self.failed, "counts": counts, **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Writes :meth:`to_json`."""
        return write_text(path, json.dumps(self.to_json(), indent=1, default=str))


def verify(
    model: str | Any,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    pictures: Sequence[str | Path] = (),
    published: str | Path = FILE,
    every_block: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    cache_dir: str | Path | None = None,
    fetch: Callable[[str], bytes] = fetch_bytes,
    progress: bool = False,
) -> Verification:
    """Checks a model: hooks change no bit, captures are what plain hooks see, layers add up, edits act where they should,
    and the weights give the numbers that were published of them.

    Args:
        model: a name, which is loaded (and downloaded): ``"hf:…"``, ``"timm:…"``, an embedded one, an open_clip name and
            tag, ``"ViT-B-32/openai"``, or ``"diffusers:…"``; or a hooked model, whose ``name`` says which numbers are known.
        inputs: by tower, instead of random images and fixed texts: needed for sounds and videos.
        pictures: files of published pictures, instead of fetching them.
        published: a file of published numbers (docs/verify.md).
        every_block: edit every site of every block, not only of the first, middle and last one of each stack.
        device, dtype, cache_dir: of a model that is loaded.
        fetch: the bytes at an address.

    Raises:
        MissingWeights: a name that cannot be loaded. MMHooksError: a model without canonical sites.

    >>> report = verify("mini")                                                     # doctest: +SKIP
    >>> not report.failed                                                           # doctest: +SKIP
    True
    """
    start = time.perf_counter()
    hooked = (
        load_named(model, device=device, dtype=dtype, cache_dir=cache_dir)
        if isinstance(model, str)
        else model
    )
    subject = subject_of(hooked, inputs)
    name = model if isinstance(model, str) else hooked.name
    known = published_of(name, published)
    if not subject.model.places.sites.canonical:
        raise MMHooksError(
            f"verify: expected a model of a known family, got {type(hooked.model).__name__}, without sites"
        )
    with evaluating(subject.model.model):
        checks = [
            *_all_checks(subject, every_block, progress),
            *published_checks(hooked, known, pictures, fetch),
        ]
    return Verification(
        _described(name, hooked), subject.inputs, _versions(), checks, time.perf_counter() - start
    )


def load_named(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """A hooked model by the name that ``mmhooks verify`` takes.

    Raises:
        MissingWeights: no such model, or it cannot be fetched.

    >>> load_named("mini")
    HookedCLIP(mini, heads: none)
    """
    if name == "mini-sd" or name.startswith("diffusers:"):
        options = {"cache_dir": str(cache_dir)} if cache_dir else {}
        return load_diffusion(
            name.removeprefix("diffusers:"), device=device, dtype=dtype or torch.float32, **options
        )
    tag = None
    if ":" not in name and name not in EMBEDDED and "/" in name:
        name, _, tag = name.rpartition("/")
    return load(name, pretrained=tag, device=device, dtype=dtype, cache_dir=cache_dir)


def _all_checks(subject: Subject, every_block: bool, progress: bool) -> Iterator[Check]:
    names = list(subject.model.places.sites.canonical)
    groups = groups_of(names)
    edited = groups if every_block else some_blocks(groups)
    clean, installed = subject.run(), len(registry)
    for output, value in subject.run().items():
        yield equal_bits("a second run = the first", output, value, clean[output])
    yield from idle_checks(subject, clean)
    steps: list[Callable[[], Iterable[Check]]] = [
        *(lambda group=group: capture_checks(subject, group) for group in groups),
        lambda: stream_sums(names, lambda wanted: read(subject, wanted)),
        *(lambda group=group: edit_checks(subject, group, clean) for group in edited),
        lambda: _embedding_checks(subject),
    ]
    for step in track(steps, len(steps), f"verifying {subject.model.name or 'the model'}", show=progress):
        try:
            yield from step()
        except MMHooksError as fault:  # the report says it, beside everything that could be checked
            yield Check(
                "sites run without an error", "", "no error", type(fault).__name__, None, False, str(fault)
            )
    for output, value in subject.run().items():
        yield equal_bits("output after everything = plain output", output, value, clean[output])
    left = len(registry) - installed
    yield Check("nothing stays installed", "", 0, left, 0.0, left == 0)


def _embedding_checks(subject: Subject) -> Iterator[Check]:
    """That attention heads and MLPs add up to the embedding, where the architecture makes it such a sum."""
    model = subject.model
    if not isinstance(model, HookedCLIP):
        return
    what = "decomposition adds up to the embedding"
    for tower, given in subject.given.items():
        if tower not in ("image", "text"):
            continue
        try:
            found = decompose(model, given) if tower == "image" else decompose(model, texts=given)
        except NoExactSum as fault:
            yield Check(what, tower, None, None, None, None, str(fault))
            continue
        want = subject.run()[tower]
        yield close(what, tower, found.total.to(want), want, summed=True)


def _described(name: str, hooked: Any) -> dict[str, Any]:
    inner = hooked.pipe.unet if isinstance(hooked, HookedDiffusion) else hooked.model
    try:
        weights = weights_hash(hooked.model)
    except NoDigest as fault:
        weights = f"unknown: {fault}"
    config = getattr(inner, "config", None)
    return {
        "name": name,
        "class": type(getattr(hooked, "pipe", hooked.model)).__name__,
        "hooked": type(hooked).__name__,
        "parameters": sum(p.numel() for p in hooked.model.parameters()),
        "dtype": str(hooked.dtype).removeprefix("torch."),
        "device": _device(hooked.device),
        "attention": getattr(config, "_attn_implementation", None),
        "revision": getattr(config, "_commit_hash", None),
        "weights": weights,
    }


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
