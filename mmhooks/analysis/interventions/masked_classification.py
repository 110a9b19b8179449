"""Zero-masked classification: how much a group of features contributes to a class (seed paper, section 3.1).

Features of a sample are set to zero, and the sample is compared with class labels whose features are never masked. The
paper does not say in which space it compares; both readings are implemented:

- ``"decoded"``: ``f' -> W_dec f' + b -> softmax(s cos(., t_y))`` in the embedding space, ``t_y`` embeddings;
  ``"spliced"`` is the same with the head's reconstruction error kept, ``x + (f' - f) W_dec``: what
  ``model.hooks(mask=...)`` gives by default (``"decoded"``: of a head attached with ``error_term=False``);
- ``"latent"``: ``softmax(s cos(f', g(t_y)))`` in the head's own space; the only one for heads without a decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import from_draws
from mmhooks.analysis.statistics.resampling import bootstrap_ratio, resampled_sums
from mmhooks.errors import MMHooksError, NoDecoder, ShapeMismatch
from mmhooks.heads.base import Head
from mmhooks.hooks.features import FeatureSet, as_feature_set
from mmhooks.models.clip.embed_texts import embed_texts
from mmhooks.utils.indexing import as_indices

SPACES = ("decoded", "spliced", "latent")


class Masked:
    """Samples ``x`` under any mask of the head's features; encoded once, so that a mask only costs its columns.

    Args:
        head: any :class:`mmhooks.heads.Head`.
        x: raw embeddings (normalized here if the head expects it), one row per sample.

    Raises:
        ShapeMismatch, NotFinite: the head cannot read ``x``.

    >>> from mmhooks.heads import TopKSAE
    >>> samples = Masked(TopKSAE(8, 32, 4), torch.randn(5, 8))
    >>> samples.vectors(FeatureSet([0, 1], 32)).shape, samples.vectors(None, "latent").shape
    (torch.Size([5, 8]), torch.Size([5, 32]))
    """

    @torch.no_grad()
    def __init__(self, head: Head, x: Float[Tensor, "n d"]) -> None:
        head.check_reconstructs("masked classification")
        self.head, self.x = head, x
        self.latents: Float[Tensor, "n k"] = head.encode(head.prepare(x))
        _, self._scale, self._shift = head.scaled(x)
        weight: Any = getattr(head, "W_dec", None)
        self._directions: Any = weight.detach() if head.has_decoder else None
        self._reconstruction = self._to_input_scale(head.decode(self.latents)) if head.has_decoder else None

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def vectors(self, mask: Any = None, space: str = "decoded") -> Float[Tensor, "n _"]:
        """Sets the features of ``mask`` (a FeatureSet, indices or a bool mask) to zero; returns the samples in ``space``.

        Raises:
            WrongHead: ``mask`` belongs to another head.
            NoDecoder: the head has no decoder, and ``space`` is ``"decoded"`` or ``"spliced"``.
        """
        index = torch.empty(0, dtype=torch.long) if mask is None else self._chosen(mask).indices
        if space not in SPACES:
            raise MMHooksError(f"space: expected one of {', '.join(map(repr, SPACES))}, got {space!r}")
        if space == "latent":
            return self.latents.index_fill(1, index, 0.0)
        if self._reconstruction is None:
            raise NoDecoder(
                f"space {space!r}: expected a head with a decoder, got {self.head.name!r} "
                f"({self.head.id}) without; use space='latent', or fit a "
                "decoder first (NCL.fit_decoder)"
            )
        start = self._reconstruction if space == "decoded" else self.x
        if not len(index):
            return start
        change = self.latents[:, index] @ self._directions[index]
        return start - (change if self._scale is None else self._scale * change)

    def removed_share(self, mask: Any) -> float:
        """Computes the share of the samples' summed activations that the mask removes."""
        total = float(self.latents.sum())
        return float(self.latents[:, self._chosen(mask).indices].sum()) / total if total else math.nan

    def _chosen(self, features: Any) -> FeatureSet:
        return as_feature_set(features, self.head.n_features, head=self.head.id)

    def _to_input_scale(self, v: Tensor) -> Tensor:
        v = v if self._scale is None else v * self._scale
        return v if self._shift is None else v + self._shift


@dataclass(frozen=True)
class CosineLabels:
    """Classifier by label vectors: ``softmax(scale * cos(x, label))``.

    Args:
        labels: one row per class, in the space of the samples; never masked.
        scale: the factor on the cosine; the model's logit scale by default in the recipes.

    >>> CosineLabels(torch.eye(2), 10.0)(torch.tensor([[3.0, 0.0]])).round(decimals=3)
    tensor([[1., 0.]], dtype=torch.float64)
    """

    labels: Float[Tensor, "c d"]
    scale: float

    def __call__(self, x: Float[Tensor, "n d2"]) -> Float[Tensor, "n c"]:
        """Computes probabilities; a vector of zeros is equally near to every label. In float64: a cosine times a scale
        of 100 would lose what an edit changed."""
        if x.shape[-1] != self.labels.shape[-1]:
            raise ShapeMismatch(
                f"samples: expected width {self.labels.shape[-1]}, as the labels have, got {x.shape[-1]}"
            )
        return (
            self.scale * normalize(x.double(), dim=-1) @ normalize(self.labels.double(), dim=-1).T
        ).softmax(-1)


@dataclass(frozen=True)
class Probe:
    """Classifier by logistic regression on unit vectors, made by :func:`fit_probe`."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]

    def __call__(self, x: Float[Tensor, "n d2"]) -> Float[Tensor, "n c"]:
        if x.shape[-1] != self.weight.shape[-1]:
            raise ShapeMismatch(
                f"probe: expected vectors of width {self.weight.shape[-1]}, got {x.shape[-1]}"
            )
        return (normalize(x.double(), dim=-1) @ self.weight.T + self.bias).softmax(-1)


def centroids(x: Float[Tensor, "n d"], y: Int[Tensor, " n2"], n_classes: int = 2) -> Float[Tensor, "c d"]:
    """Computes the mean unit vector of each class, as labels of the same modality as the samples.

    Raises:
        ShapeMismatch: not one label per sample, or a class has no sample.

    >>> centroids(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 1, 1]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    _check_labels(x, y, n_classes)
    unit = normalize(x, dim=-1)
    return torch.stack([unit[y == c].mean(0) for c in range(n_classes)])


def fit_probe(
    x: Float[Tensor, "n d"], y: Int[Tensor, " n2"], *, n_classes: int = 2, c: float = 10.0
) -> Probe:
    """Fits logistic regression with balanced classes on the unit vectors of ``x`` (scikit-learn, L2).

    Fit it on other samples than those it classifies.

    Args:
        c: inverse strength of the L2 penalty.

    Raises:
        ShapeMismatch: not one label per sample, or a class has no sample.
    """
    from sklearn.linear_model import LogisticRegression

    _check_labels(x, y, n_classes)
    check_finite(x, "samples of a probe")
    unit = normalize(x.double(), dim=-1).numpy()
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(unit, y.numpy())
    weight, bias = torch.from_numpy(np.asarray(model.coef_)), torch.from_numpy(np.asarray(model.intercept_))
    if n_classes == 2:  # one row for the second class: half of it to each side
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return Probe(weight, bias)


@dataclass(frozen=True)
class Classified(Result):
    """Classification results of samples with known classes.

    Attributes:
        accuracy, probability: over all samples, the share classified correctly, and mean probability of the true class.
        by_class: the same per class, ``{name: (accuracy, probability)}``.
        own: per sample, the probability of the true class. right: whether it was classified correctly, as 0 or 1.
    """

    accuracy: Estimate
    balanced: Estimate
    probability: Estimate
    by_class: dict[str, tuple[Estimate, Estimate]]
    own: Float[Tensor, " n"] = field(repr=False)
    right: Float[Tensor, " n"] = field(repr=False)

    def table(self) -> Records:
        rows = {"all": (self.accuracy, self.probability), **self.by_class}
        return Records(
            {"class": name, **a.columns("accuracy"), "mean p": p.value} for name, (a, p) in rows.items()
        )


def classified(
    probabilities: Float[Tensor, "n c"],
    y: Int[Tensor, " n2"],
    names: Sequence[str],
    *,
    clusters: Int[Tensor, " n3"] | None = None,
    seed: int = 0,
) -> Classified:
    """Computes accuracy and mean probability of the true class, with bootstrap intervals over clusters of samples.

    ``balanced`` is the mean of the classes' accuracies (chance: one over their number). A tie of two classes counts as
    half correct.

    Raises:
        ShapeMismatch: not one label per sample, or a label outside the classes.

    >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    >>> classified(p, torch.tensor([0, 1, 1]), ("woman", "man")).accuracy.value
    0.6666666666666666
    """
    if len(y) != len(probabilities) or probabilities.shape[1] != len(names):
        raise ShapeMismatch(
            f"expected probabilities of shape {(len(y), len(names))}, labels by classes, got {tuple(probabilities.shape)}"
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(names):
        raise ShapeMismatch(f"labels: expected 0..{len(names) - 1}, got {int(y.min())}..{int(y.max())}")
    probabilities = probabilities.double()
    own = probabilities.gather(1, y[:, None])[:, 0]
    best = probabilities >= probabilities.amax(1, keepdim=True)
    right = best.gather(1, y[:, None])[:, 0].double() / best.sum(1)
    estimates: dict[str, tuple[Estimate, Estimate]] = {}
    for c, name in enumerate(names):
        of = y == c
        some = None if clusters is None else clusters[of]
        estimates[name] = (
            bootstrap_ratio(right[of], None, some, seed=seed),
            bootstrap_ratio(own[of], None, some, seed=seed),
        )
    return Classified(
        bootstrap_ratio(right, None, clusters, seed=seed),
        _balanced(right, y, len(names), clusters, seed),
        bootstrap_ratio(own, None, clusters, seed=seed),
        estimates,
        own,
        right,
    )


def _balanced(
    right: Float[Tensor, " n"],
    y: Int[Tensor, " n2"],
    n_classes: int,
    clusters: Int[Tensor, " n3"] | None,
    seed: int,
) -> Estimate:
    """Computes the mean accuracy of the classes present, all over the same resampled clusters."""
    here = torch.nn.functional.one_hot(y, n_classes).double()
    here = here[:, here.any(0)]
    value = float(((right[:, None] * here).sum(0) / here.sum(0)).mean()) if len(y) else math.nan
    if len(y) < 2 or (clusters is not None and len(clusters.unique()) < 2):
        return Estimate(value, math.nan, math.nan, len(y))
    sums = resampled_sums(torch.cat([right[:, None] * here, here], dim=1), clusters, seed=seed)
    hits, counts = sums.chunk(2, dim=1)
    known = (counts > 0).all(1)  # a resample may lack a class
    if not bool(known.any()):
        return Estimate(value, math.nan, math.nan, len(y))
    return from_draws(value, (hits[known] / counts[known]).mean(1), len(y))


def single_ablations(
    samples: Masked,
    features: Any,
    labels: CosineLabels,
    *,
    space: str = "decoded",
) -> Float[Tensor, "n m c"]:
    """Computes the probabilities of every sample with one feature at zero, for each of ``features`` (indices in their
    order, or a bool mask), in closed form without decoding again.

    With ``v' = v - s f_k w_k`` the cosine to a label needs ``v·t``, ``w_k·t``, ``v·w_k`` and ``|w_k|`` only.

    >>> from mmhooks.heads import TopKSAE
    >>> samples, labels = Masked(TopKSAE(8, 32, 4), torch.randn(5, 8)), CosineLabels(torch.randn(2, 8), 10.0)
    >>> one = labels(samples.vectors(FeatureSet([3], 32)))
    >>> torch.allclose(single_ablations(samples, [3], labels)[:, 0], one, atol=1e-6)
    True
    """
    n = samples.head.n_features
    index = features.indices if isinstance(features, FeatureSet) else as_indices(features, n, "features")
    target = normalize(labels.labels.double(), dim=-1)
    v = samples.vectors(None, space).double()
    f = samples.latents[:, index].double()
    if space == "latent":  # w_k is the k-th coordinate axis, the step is f_k
        step, along = f, target[:, index].T
        squared = (v.square().sum(1, keepdim=True) - f.square()).clamp_min(0)
    else:
        w = samples._directions[index].double()
        step = f if samples._scale is None else f * samples._scale.double()
        along = w @ target.T
        squared = v.square().sum(1, keepdim=True) - 2 * step * (v @ w.T) + step.square() * w.square().sum(1)
    dots = (v @ target.T)[:, None] - step[..., None] * along
    length = squared.clamp_min(0).sqrt().clamp_min(1e-12)
    return (labels.scale * dots / length[..., None]).softmax(-1)


def _check_labels(x: Tensor, y: Tensor, n_classes: int) -> None:
    if len(x) != len(y):
        raise ShapeMismatch(f"expected one label per sample, got {len(x)} samples but {len(y)} labels")
    empty = [c for c in range(n_classes) if not bool((y == c).any())]
    if empty:
        raise ShapeMismatch(
            f"expected at least one sample of every class, got no sample of class {empty} among {len(x)}"
        )


def prompt_labels(
    model: Any, words: Sequence[Sequence[str]], templates: Sequence[str] = ("{}",)
) -> Float[Tensor, "c d"]:
    """Computes label embeddings from prompts: per class the mean unit embedding of its words in all templates.

    Args:
        model: a hooked CLIP, with its tokenizer.
        words: one list per class, e.g. ``[["woman", "girl"], ["man", "boy"]]``.
        templates: each with one ``{}``.
    """
    rows = []
    for own in words:
        prompts = [template.format(word) for template in templates for word in own]
        rows.append(embed_texts(model, prompts).mean(0))
    return normalize(torch.stack(rows), dim=-1)
