"""Zero-shot accuracy before and after mean-ablations, over a data set that is read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmhooks.analysis.decomposition.contributions import decompose_batch
from mmhooks.analysis.decomposition.dataset import MeanDecomposition, check_means
from mmhooks.analysis.decomposition.origin import origin_of
from mmhooks.analysis.interventions.mean_ablation import (
    Parts,
    SiteMeans,
    ablate_direct,
    ablation_sites,
    check_sites,
    mean_edits,
    paper_parts,
)
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import wilson
from mmhooks.errors import DataError, ShapeMismatch
from mmhooks.models.clip.inputs import Model, Vectors, check_batch, check_directions, check_model
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import rate_bar

if TYPE_CHECKING:
    Means, Live = MeanDecomposition, Mapping[str, Tensor]
    Images, Labels = Tensor | Iterable[Any], Tensor | None
else:
    Means = Live = Images = Labels = Any  # checked where they are used, with a better message


@dataclass(frozen=True)
class AblationResult(Result):
    """Zero-shot accuracy before and after every ablation, direct and live (None if it was not or cannot be run live)."""

    names: tuple[str, ...]
    before: Estimate
    direct: tuple[Estimate, ...]
    live: tuple[Estimate | None, ...]
    n: int

    def table(self) -> Records:
        """One row per ablation."""
        return Records(
            {
                "ablated": name,
                "before": self.before.value,
                "direct": direct.value,
                "direct interval": f"{direct.low:.3f}–{direct.high:.3f}",
                "live": "–" if live is None else live.value,
                "live interval": "–" if live is None else f"{live.low:.3f}–{live.high:.3f}",
                "n": self.n,
            }
            for name, direct, live in zip(self.names, self.direct, self.live, strict=True)
        )


@torch.no_grad()
def ablate(
    model: Model,
    inputs: Images,
    labels: Labels,
    classes: Vectors,
    means: Means,
    what: Sequence[Parts] | None = None,
    *,
    live_means: Live | None = None,
    normalize: bool = False,
    batch_size: int = 32,
    progress: bool = False,
) -> AblationResult:
    """Computes the zero-shot accuracy of images with class embeddings ``classes``, before and after each ablation.

    Args:
        inputs: pixels; or, for data that does not fit, an iterable of batches of pixels and labels, such as a
            ``DataLoader``, which is read once.
        labels: the class of each image; None if the batches bring them.
        means: means of direct contributions, ``mm.decompose(model, data)``; for a fair test, of other images than these.
            With ``class_token=True`` if ablations of it are among ``what``.
        what: default :func:`paper_parts`.
        live_means: from :func:`site_means` at the sites of all ablations; without them only direct ones are run.
        normalize: ablate contributions to the unit embedding, as the public code of the paper does; ``means`` must be
            those of ``mm.decompose(model, data, normalize=True)``.

    Raises:
        ShapeMismatch: not one label per image, a label outside the classes, a component does not exist, or means without
            the class token for an ablation of it.
        WrongOrigin: the means are not image means of this model, or not of ``normalize``.
        DataError: there is no image.
    """
    check_model(model)
    if labels is not None:
        check_batch(model, inputs, "image")
        _check_labels(labels, len(inputs), len(classes))
    means = check_means(means)
    kind = "unit" if normalize else "raw"
    means.origin.check(origin_of(model, "image", normalize), "means=", f"the images' {kind} contributions")
    check_directions(classes, means.embedding.shape[0], "classes")
    depth, n_heads = means.heads.shape[:2]
    chosen = paper_parts(depth, n_heads) if what is None else list(what)
    for one in chosen:
        one.check(depth, n_heads)
    if live_means is not None:
        check_sites(live_means, [s for one in chosen if one.has_live for s in ablation_sites(one)], "image")
        if isinstance(live_means, SiteMeans):
            live_means.origin.check(origin_of(model, "image", False), "live_means=", "this model")
    unit = torch.nn.functional.normalize(classes.to(model.device).float(), dim=1)

    def right(embedding: Tensor, own: Tensor) -> int:
        return int((embedding.float() @ unit.T).argmax(1).cpu().eq(own.cpu()).sum())

    before, direct, live, n = 0, [0] * len(chosen), [0] * len(chosen), 0
    has_live = [live_means is not None and one.has_live for one in chosen]
    class_token = any(one.of_class_token for one in chosen)
    with rate_bar(
        "ablating", None if labels is None else len(labels), unit="images", show=progress
    ) as advance:
        for pixels, own in labelled_batches(model, inputs, labels, batch_size, len(classes)):
            parts = decompose_batch(model, pixels, class_token=class_token)
            parts = parts.normalized() if normalize else parts
            before, n = before + right(parts.embedding, own), n + len(own)
            for i, one in enumerate(chosen):
                direct[i] += right(ablate_direct(parts, means, one), own)
                if has_live[i]:
                    assert live_means is not None
                    with evaluating(model.model), model.hooks(*mean_edits(one, live_means)):
                        live[i] += right(model.encode_image(model.to_input(pixels)), own)
            advance(len(own))
    if not n:
        raise DataError("ablate: expected at least one image with its label, got none")
    return AblationResult(
        tuple(one.name for one in chosen),
        wilson(before, n),
        tuple(wilson(hits, n) for hits in direct),
        tuple(wilson(hits, n) if there else None for hits, there in zip(live, has_live, strict=True)),
        n,
    )


def labelled_batches(
    model: Model, inputs: Any, labels: Tensor | None, batch_size: int, n_classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields pixels and labels, at most ``batch_size`` at a time.

    Raises:
        ShapeMismatch: not one label per image, a label outside the classes, or batches without labels.
    """
    given = [(inputs, labels)] if labels is not None else inputs
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise ShapeMismatch(
            f"labels: expected one per image, got None, and inputs {type(given).__name__} that bring none: give labels=, or "
            "batches of pixels and labels such as a DataLoader's"
        )
    for batch in given:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ShapeMismatch(f"expected batches (pixels, labels), got a {type(batch).__name__}")
        pixels, own = batch
        check_batch(model, pixels, "image")
        _check_labels(own, len(pixels), n_classes)
        yield from zip(pixels.split(batch_size), own.split(batch_size), strict=True)


def _check_labels(labels: Any, n: int, n_classes: int) -> None:
    whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    if whole and len(labels) == n and n and 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        return
    got = f"{len(labels)}" if whole else f"a {type(labels).__name__}"
    raise ShapeMismatch(
        f"labels: expected one from 0 to {n_classes - 1} for each of {n} images, got {got}"
        + (f" from {int(labels.min())} to {int(labels.max())}" if whole and len(labels) else "")
    )
