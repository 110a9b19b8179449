"""Zero-shot classifiers: one direction per class, the mean of its name in many prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.errors import MMHooksError
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.models.clip.inputs import Model, Texts
from mmhooks.utils.progress import track

Template = str | Callable[[str], str]
if TYPE_CHECKING:
    Templates = Sequence[Template]
else:
    Templates = Any  # checked below, with a better message

_CLASSES = 16  # embedded together


def imagenet_templates() -> list[Template]:
    """Lists the 80 prompts that were chosen for ImageNet (Radford et al. 2021), as open_clip ships them.

    >>> len(imagenet_templates()), imagenet_templates()[0]("dog")
    (80, 'a bad photo of a dog.')
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return list(OPENAI_IMAGENET_TEMPLATES)


def imagenet_names() -> list[str]:
    """Lists the names of ImageNet's 1,000 classes, in the order of its labels, as open_clip ships them.

    >>> imagenet_names()[:2]
    ['tench', 'goldfish']
    """
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def zero_shot_classifier(
    model: Model, names: Texts, templates: Templates | None = None, *, progress: bool = False
) -> Float[Tensor, "c d"]:
    """Makes one unit vector per class: the mean of the unit embeddings of its name in every prompt.

    Args:
        templates: prompts, with ``{}`` in place of the name or functions of it; default :func:`imagenet_templates`.

    Raises:
        MMHooksError: no name, no template, or one without ``{}``.

    Source: Radford et al. 2021, Section 3.1.4.

    >>> zero_shot_classifier(mm.load("mini"), ["dog", "cat"]).shape     # doctest: +SKIP
    torch.Size([2, 256])
    """
    prompts = imagenet_templates() if templates is None else list(templates)
    bad = [t for t in prompts if not callable(t) and "{}" not in t]
    if isinstance(templates, str) or not prompts or bad:
        raise MMHooksError(
            f"templates: expected a list of prompts with {{}} in place of the name, got {bad[0] if bad else templates!r}"
        )
    if isinstance(names, str) or not len(names):
        raise MMHooksError(f"names: expected a list of at least one class, got {names!r}")
    rows = []
    starts = range(0, len(names), _CLASSES)
    for start in track(starts, len(starts), "classes", show=progress):
        some = names[start : start + _CLASSES]
        texts = [t(name) if callable(t) else t.replace("{}", name) for name in some for t in prompts]
        rows.append(embed_texts(model, texts).view(len(some), len(prompts), -1).mean(1))
    return normalize(torch.cat(rows), dim=1)
