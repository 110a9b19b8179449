"""Mean-ablation of neurons: of their second-order effects in the embedding, and live against what these predict.

"Interpreting the Second-Order Effects of Neurons in CLIP" (Gandelsman, Efros, Steinhardt 2024), Section 4.1 and the
public code's ``compute_ablations.py`` (:func:`ablate_neurons`). :func:`predict_ablations` tests the approximation
itself: frozen attention patterns and LayerNorms, no other path, against the model with the neuron at its mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.functional import normalize as unit_rows

from mmhooks.analysis.decomposition.dataset import Inputs, batches
from mmhooks.analysis.decomposition.neuron_directions import NeuronDirections, unit_effects
from mmhooks.analysis.decomposition.neuron_effects import neuron_paths, read_twice
from mmhooks.analysis.decomposition.origin import origin_of
from mmhooks.analysis.interventions.ablation_accuracy import labelled_batches
from mmhooks.analysis.interventions.mean_ablation import site_means
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap, paired_rates, wilson
from mmhooks.analysis.statistics.power import detectable_mean
from mmhooks.errors import DataError, ShapeMismatch
from mmhooks.hooks.edits import Mean
from mmhooks.models.clip.inputs import Model, Vectors, check_directions, check_model
from mmhooks.utils.modes import evaluating
from mmhooks.utils.progress import track

if TYPE_CHECKING:
    Images, Labels = Tensor | Iterable[Any], Tensor | None
else:
    Images = Labels = Any  # checked where they are used, with a better message

KINDS = ("all", "significant", "insignificant", "off their directions")


@dataclass(frozen=True)
class NeuronAblation(Result):
    """Zero-shot accuracy with second-order effects of a layer's neurons at their mean over other images.

    Attributes:
        before: with all effects. without: all of them at their mean; only those longer than the neuron's threshold on
            this image (significant); only the others (insignificant); or what lies off each neuron's direction.
        change: of each of these, its accuracy minus that before, over the same images.
        detectable: the smallest change that these images show with 80 % power, by the error of ``change``.
    """

    layer: int
    n_neurons: int
    before: Estimate
    without: dict[str, Estimate]
    change: dict[str, Estimate]
    detectable: dict[str, float]

    def table(self) -> Records:
        rows = {"nothing": self.before, **self.without}
        changes = {"nothing": "–"} | {
            k: f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for k, e in self.change.items()
        }
        return Records(
            {
                "ablated": k,
                **e.columns("accuracy"),
                "change": changes[k],
                "detectable": self.detectable.get(k, "–"),
            }
            for k, e in rows.items()
        )


@torch.no_grad()
def ablate_neurons(
    model: Model,
    inputs: Images,
    labels: Labels,
    classes: Vectors,
    found: NeuronDirections,
    *,
    directions: Vectors | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> NeuronAblation:
    """Computes zero-shot accuracy with the second-order effects of neurons mean-ablated in the unit embedding.

    Args:
        inputs, labels, classes: as in ``mm.ablate``.
        found: from ``mm.neuron_directions``; for a fair test, of other images than these.
        directions: keep what lies along these instead of ``found.direction``, such as
            ``mm.orthogonal_text_code(...).reconstruct()``. Not rescaled, as in the public code: a direction that texts
            rebuild in part gives back the square of that part.

    Raises:
        ShapeMismatch: not one label per image, a label outside the classes, or not one direction per neuron.
        WrongOrigin: the directions are not of this model. DataError: there is no image.
    """
    check_model(model)
    found.origin.check(origin_of(model, "image", True), "found=", "the images' unit embeddings")
    check_directions(classes, found.mean.shape[1], "classes")
    along = found.direction if directions is None else directions
    check_directions(along, found.mean.shape[1], "directions")
    if len(along) != len(found.neurons):
        raise ShapeMismatch(f"directions: expected one per neuron, {len(found.neurons)}, got {len(along)}")
    paths = neuron_paths(model, found.layer, list(found.neurons), shared=found.shared)
    device = model.device
    along, mean, threshold = (x.to(device).float() for x in (along, found.mean, found.threshold))
    classifier = unit_rows(classes.to(device).float(), dim=1)
    right: dict[str, list[Tensor]] = {kind: [] for kind in ("nothing", *KINDS)}
    batched = labelled_batches(model, inputs, labels, batch_size, len(classes))
    for pixels, own in track(batched, None, "ablating neurons", show=progress):
        reached = paths.reach(pixels)
        embedding = unit_rows(reached.embedding, dim=1)
        moved = unit_effects(paths, reached).vectors() - mean  # [b n e]
        significant = (moved.norm(dim=2) > threshold)[..., None].to(moved)
        kept = torch.einsum("bn,ne->be", torch.einsum("bne,ne->bn", moved, along), along)
        whole = moved.sum(1)
        removed = {
            "nothing": torch.zeros_like(whole),
            "all": whole,
            "significant": (moved * significant).sum(1),
            "insignificant": (moved * (1 - significant)).sum(1),
            "off their directions": whole - kept,
        }
        for kind, part in removed.items():
            guessed = ((embedding - part) @ classifier.T).argmax(1).cpu()
            right[kind].append(guessed.eq(own.cpu()))
    if not right["nothing"]:
        raise DataError("ablate_neurons: expected at least one image with its label, got none")
    hits = {kind: torch.cat(parts) for kind, parts in right.items()}
    rates = {kind: wilson(int(own.sum()), len(own)) for kind, own in hits.items()}
    changes = {kind: paired_rates(hits[kind], hits["nothing"]) for kind in KINDS}
    return NeuronAblation(
        layer=found.layer,
        n_neurons=len(found.neurons),
        before=rates["nothing"],
        without={kind: rates[kind] for kind in KINDS},
        change={kind: change for kind, (change, _) in changes.items()},
        detectable={
            kind: detectable_mean(error, change.n - 1)
            for kind, (change, error) in changes.items()
            if change.n
        },
    )


@dataclass(frozen=True)
class AblationPrediction(Result):
    """Live mean-ablations of single neurons against their prediction from frozen paths.

    Attributes:
        second: per neuron, share of the squares of the embedding's real changes that the second-order effects predict,
            1 minus what is left; below 0 where they make it worse. direct: likewise, what the neuron writes at the token
            that is read, without a later layer. both: of the sum.
        cosine: mean cosine over images of the real change with the one that second-order effects predict.
        size: root mean square of the real changes over that of the embeddings.
    """

    layer: int
    neurons: tuple[int, ...]
    n_samples: int
    second: Float[Tensor, " n"]
    direct: Float[Tensor, " n"]
    both: Float[Tensor, " n"]
    cosine: Float[Tensor, " n"]
    size: Float[Tensor, " n"]

    def table(self) -> Records:
        """Means over neurons, with bootstrap intervals over these."""
        rows = {
            "second-order effects": self.second,
            "direct effects": self.direct,
            "both": self.both,
            "cosine with second-order effects": self.cosine,
        }
        estimates = {name: bootstrap(values) for name, values in rows.items()}
        return Records({"predicted by": k} | e.columns() for k, e in estimates.items())


@torch.no_grad()
def predict_ablations(
    model: Model,
    images: Tensor | Inputs,
    *,
    layer: Any,
    neurons: Any,
    batch_size: int = 32,
    progress: bool = False,
) -> AblationPrediction:
    """Ablates neurons live, one at a time, to their mean at each token, and compares the change of the raw embedding with
    what their second-order and direct effects predict.

    Every neuron costs one more pass over the images.

    Args:
        images: pixels, a list of batches of them, or pairs; read twice.
        layer, neurons: as in :func:`~mmhooks.analysis.decomposition.neuron_effects.second_order_effects`.

    Raises:
        ShapeMismatch: a layer or neuron does not exist, or has no attention after it.
        NoExactSum: the blocks are not open_clip's own, or the tower pools by attention.
        DataError: there is no image, or an iterator was given, which can be read only once.

    >>> import mmhooks as mm
    >>> found = predict_ablations(mm.load("mini"), torch.randn(4, 3, 64, 64), layer=3, neurons=[0, 1])
    >>> found.both.shape
    torch.Size([2])
    """
    check_model(model)
    read_twice(images)
    paths = neuron_paths(model, layer, neurons)
    site = paths.site
    means = site_means(model, images, [site], batch_size=batch_size)[site]
    baseline = means.float()[..., list(paths.neurons)]
    width = len(paths.neurons)
    left = {kind: torch.zeros(width, dtype=torch.float64) for kind in ("second", "direct", "both", "nothing")}
    cosines, norms, seen = torch.zeros(width, dtype=torch.float64), 0.0, 0
    for pixels in track(batches(model, images, "image", batch_size, 0), None, "neurons, live", show=progress):
        reached = paths.reach(pixels, baseline)
        second = -torch.einsum("bnc,cne->bne", reached.second, paths.directions)
        direct = -torch.einsum("bnp,pne->bne", reached.direct, paths.direct_directions)
        for i, neuron in enumerate(paths.neurons):
            with evaluating(model.model), model.hooks(Mean([neuron], mean=means, at=site)):
                live = model.encode_image(model.to_input(pixels)).float() - reached.embedding
            predicted = {
                "second": second[:, i],
                "direct": direct[:, i],
                "both": second[:, i] + direct[:, i],
                "nothing": torch.zeros_like(live),
            }
            for kind, change in predicted.items():
                left[kind][i] += float((live - change).double().square().sum())
            cosines[i] += float(cosine_similarity(live, second[:, i], dim=1).double().sum())
        norms += float(reached.embedding.double().square().sum())
        seen += len(pixels)
    real = left["nothing"].clamp_min(1e-300)
    shares = {kind: (1 - left[kind] / real).float() for kind in ("second", "direct", "both")}
    return AblationPrediction(
        layer=paths.layer,
        neurons=paths.neurons,
        n_samples=seen,
        cosine=(cosines / seen).float(),
        size=(left["nothing"] / norms).sqrt().float(),
        **shares,
    )
