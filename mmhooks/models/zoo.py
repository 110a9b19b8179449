"""Loading by name: the embedded models, any open_clip name and tag, and heads from wherever they are."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhooks.errors import MissingWeights, MMHooksError
from mmhooks.models.foreign_code import no_foreign_code
from mmhooks.utils.assets import ASSETS, asset

if TYPE_CHECKING:
    import torch

    from mmhooks.heads.base import Head
    from mmhooks.models.clip import HookedCLIP

EMBEDDED = ("mini", "mini-declip", "mini-reader")
PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16", "amp_bfloat16")


def load(
    name: str = "mini",
    *,
    pretrained: str | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> HookedCLIP:
    """A hooked CLIP by name, in evaluation mode, with its tokenizer and preprocessing.

    Args:
        name: ``"mini"``, ``"mini-declip"`` or ``"mini-reader"`` (embedded, no network), or any name of
            ``open_clip.list_models()``, or ``"hf-hub:…"``.
        pretrained: for open_clip names, a tag of ``open_clip.list_pretrained()`` or the path of a local
            checkpoint. None gives random weights, which open_clip itself warns about.
        precision: open_clip's: ``"fp32"``; ``"bf16"``, ``"fp16"`` (weights of linear and convolution layers);
            ``"pure_bf16"``, ``"pure_fp16"`` (all weights); ``"amp"``, ``"amp_bf16"`` (weights in fp32, run under
            ``torch.autocast``, which is how ``encode_image`` and ``encode_text`` of the hooked model run then).
            The embedded models are stored in half precision and computed in fp32.
        cache_dir: where open_clip keeps downloads.

    Raises:
        MissingWeights: the tag cannot be fetched or the file is not there.
        MMHooksError: no such model or tag; the message names near ones.

    >>> model = load("mini")
    >>> model.encode_text(model.tokenizer(["a red panda"])).shape
    torch.Size([1, 256])
    """
    from mmhooks.models.clip import HookedCLIP
    from mmhooks.models.mini import load_embedded

    if precision not in PRECISIONS:  # open_clip would run fp32 without a word
        raise MMHooksError(f"expected precision= one of {', '.join(PRECISIONS)}, got {precision!r}")
    if name in EMBEDDED:
        if pretrained is not None or precision != "fp32":
            raise MMHooksError(
                f"{name!r} is embedded and computes in fp32: it takes no pretrained= or precision=, "
                f"came {pretrained!r} and {precision!r}; convert it with model.model.to(...) if you must"
            )
        model, tokenizer, preprocess = load_embedded(name)
    else:
        model, tokenizer, preprocess = _open_clip(name, pretrained, precision, cache_dir)
    model = model.to(device).eval()
    return HookedCLIP(
        model, tokenizer=tokenizer, preprocess=preprocess, name=name, autocast=_autocast(precision)
    )


def load_head(
    source: str | Path,
    *,
    subfolder: str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Head:
    """A sparse head from the package (``"mini/sae"``), a folder or file, or a Hugging Face Hub repository.

    The format is recognised by its files: our own, SAELens, sparsify, dictionary_learning, ViT-Prisma, MSAE and
    overcomplete (:data:`mmhooks.heads.formats.FORMATS`).

    Args:
        source: name, path, or ``owner/name`` on the Hub.
        subfolder: folder or file inside it, where it holds several heads.
        revision, cache_dir: of the Hub's copy.
        options: ``token`` of the Hub, and what a foreign file leaves open: ``name``, ``normalize_input`` (give raw
            vectors unit norm first), ``kind``, ``k``, ``threshold``.

    Raises:
        MissingWeights: nothing there; the message lists what was found and what is understood.
        MMHooksError: a known format whose contents do not fit; an option that is not known, or not of use there.

    >>> sae = load_head("mini/sae"); (sae.d_in, sae.n_features)
    (256, 1024)
    """
    from mmhooks.heads.base import Head
    from mmhooks.heads.formats import Options

    known = [*(f.name for f in fields(Options)), "token"]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise MMHooksError(
            f"load_head takes no {', '.join(unknown)}; beside a source it knows {', '.join(known)}"
        )
    embedded = str(source) in embedded_heads()
    path = ASSETS / source if embedded else Path(source)
    if revision is not None and path.exists():
        raise MMHooksError(
            f"{source} is on this machine, which has no revisions: expected no revision=, got {revision!r}; "
            "leave it out, or name a repository of the Hub"
        )
    if not path.exists() and (str(source).split("/")[0] in EMBEDDED or str(source).count("/") != 1):
        raise MissingWeights(
            f"no head at {str(source)!r}: embedded are {', '.join(embedded_heads())}; else give the path of a "
            "directory or file of weights, or a Hub id owner/name"
        )
    return Head.from_pretrained(
        path if embedded else source,
        subfolder=subfolder,
        device=device,
        revision=revision,
        cache_dir=cache_dir,
        **options,
    )


def embedded_heads() -> list[str]:
    """Names of the heads that ship with the package."""
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in ASSETS.glob("*/*/config.json"))


def card(name: str) -> dict[str, Any]:
    """What is known of an embedded model: data, licences, recipe, seed, held-out retrieval."""
    path = ASSETS / name / "card.json"
    if not path.is_file():
        raise MissingWeights(f"no card of {name!r}: embedded models are {', '.join(EMBEDDED)}")
    return json.loads(asset(path).read_text(encoding="utf-8"))


def _autocast(precision: str) -> torch.dtype | None:
    """What open_clip trains and evaluates a precision under; None: nothing."""
    import torch

    return {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}.get(precision)


def _open_clip(
    name: str, pretrained: str | None, precision: str, cache_dir: str | Path | None
) -> tuple[Any, Any, Any]:
    from difflib import get_close_matches

    import open_clip

    name = name.replace("/", "-") if not name.startswith(("hf-hub:", "local-dir:")) else name
    known = open_clip.list_models()
    if ":" not in name and name not in known:
        near = get_close_matches(name, [*known, *EMBEDDED], n=4, cutoff=0.5)
        raise MMHooksError(
            f"no model {name!r}: embedded are {', '.join(EMBEDDED)}; open_clip knows {len(known)}, "
            f"near matches: {', '.join(near) or 'none'}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name) if ":" not in name else []
    if pretrained and not Path(pretrained).exists() and ":" not in name and pretrained not in tags:
        raise MissingWeights(
            f"{name} has no tag {pretrained!r} and no such file exists; tags: {', '.join(tags) or 'none'}"
        )
    try:
        with no_foreign_code(name):
            model, _, preprocess = open_clip.create_model_and_transforms(
                name,
                pretrained=pretrained,
                precision=precision,
                cache_dir=str(cache_dir) if cache_dir else None,
            )
            tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError) as error:
        if pretrained is None and ":" not in name:
            raise
        raise MissingWeights(
            f"weights {pretrained or name!r} of {name} could not be had ({type(error).__name__}: {error}); "
            "without network give pretrained= the path of a downloaded checkpoint, or use mm.load('mini')"
        ) from error
    return model, tokenizer, preprocess
