"""TextSpan: the texts whose directions span what an attention head writes into the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.decomposition.head_labels import HeadLabels
from mmhooks.analysis.decomposition.head_moments import HeadMoments
from mmhooks.analysis.inputs.checks import check_finite, check_numbers
from mmhooks.analysis.results import Records, Result
from mmhooks.errors import ShapeMismatch

Selection = Literal["unit", "paper"]
_ROUNDING = 1e-5  # a direction weaker than the strongest by this factor is rounding of fp32 activations
_SPENT = 1e-6  # a text with at most this fraction left lies in the span of the texts chosen before


@dataclass(frozen=True)
class TextSpan(Result):
    """Ranked texts of each attention head.

    Attributes:
        heads: names, in the order of the outputs.
        texts, indices: per head, the chosen texts in order, and their positions in the pool. Fewer than requested if a
            head varies in fewer directions.
        explained: per head, the share of its variance over the images that the first k texts span, for each k.
        variance: total variance of each head's output.
        rank: dimensions of each head's output that were used.
        mean: of each head's output; not saved.
        bases: per head, orthonormal rows that span its texts, in order; not saved.
        pool_id: a hash of the pool's texts in their order, as the same indices of another pool mean other texts.
    """

    heads: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    indices: tuple[tuple[int, ...], ...]
    explained: tuple[tuple[float, ...], ...]
    variance: tuple[float, ...]
    rank: tuple[int, ...]
    n_samples: int
    n_pool: int
    selection: Selection
    mean: Float[Tensor, "h d"] = field(repr=False, compare=False)
    bases: tuple[Float[Tensor, "k d"], ...] = field(repr=False, compare=False)
    pool_id: str = ""

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_json().items() if k not in ("mean", "bases")}

    def table(self, top: int = 5) -> Records:
        """One row per head: its variance, the share that all its texts span, and the first ``top`` texts."""
        return Records(
            {
                "head": name,
                "variance": variance,
                "explained": curve[-1] if curve else float("nan"),
                "texts": "; ".join(texts[:top]),
            }
            for name, variance, curve, texts in zip(
                self.heads, self.variance, self.explained, self.texts, strict=True
            )
        )

    def labels(self, *, model: str, pool: str = "", kinds: Sequence[str] | None = None) -> HeadLabels:
        """Only the texts, as labels that are saved in a small file for other studies.

        Args:
            model, pool: names of the model and of the pool, kept in the file.
            kinds: the kind of every text of the pool ("colour", "place", ...), as in ``TextPool.kinds``.
        """
        if kinds is not None and len(kinds) != self.n_pool:
            raise ShapeMismatch(
                f"kinds: expected one for each of the {self.n_pool} texts of the pool, got {len(kinds)}"
            )
        return HeadLabels(
            model=model,
            pool=pool,
            texts=dict(zip(self.heads, self.texts, strict=True)),
            kinds=None
            if kinds is None
            else {h: tuple(kinds[i] for i in own) for h, own in zip(self.heads, self.indices, strict=True)},
            info={"n_samples": self.n_samples, "n_pool": self.n_pool, "selection": self.selection},
        )

    def reconstruct(
        self, outputs: Float[Tensor, "n h d"], n_texts: int | None = None
    ) -> Float[Tensor, "n h d"]:
        """Projects outputs of the same heads onto their first ``n_texts`` texts; everything else is set to the mean.

        ``n_texts=0`` is mean-ablation.

        Raises:
            ShapeMismatch: the number of heads or the width differs.
        """
        if outputs.shape[1:] != self.mean.shape:
            raise ShapeMismatch(
                f"outputs: expected {self.mean.shape[0]} heads x {self.mean.shape[1]}, to which these texts belong, got "
                f"{outputs.shape[1]} x {outputs.shape[2]}"
            )
        mean = self.mean.to(outputs)
        rebuilt = []
        for i, basis in enumerate(self.bases):
            rows = basis[:n_texts].to(outputs)
            rebuilt.append(mean[i] + (outputs[:, i] - mean[i]) @ rows.T @ rows)
        return torch.stack(rebuilt, 1)


@torch.no_grad()
def text_span(
    head_outputs: Float[Tensor, "n d"] | Float[Tensor, "n h d"] | HeadMoments,
    text_embeddings: Float[Tensor, "t d2"],
    texts: Sequence[str],
    *,
    n_texts: int = 20,
    rank: int = 80,
    selection: Selection = "unit",
    heads: Sequence[str] | None = None,
) -> TextSpan:
    """Finds texts that span the output of attention heads (Gandelsman et al. 2024, algorithm 1).

    Texts are projected onto the leading ``rank`` right singular vectors of a head's outputs. Then, ``n_texts``
    times, the text along which the centred outputs vary most is chosen, and its direction is removed from the
    outputs and from the other texts. The variance along t is ``tᵀ Σ t``, so outputs are read only once, for their
    covariance Σ, and each step costs ``O(t rank²)`` instead of ``O(n t d)``.

    Args:
        head_outputs: what each head writes into the raw image embedding, one row per image, of one or several heads;
            or their :class:`~mmhooks.analysis.decomposition.head_moments.HeadMoments`, for data that does not fit.
        text_embeddings: of the pool, in the same space.
        texts: the pool, in the same order.
        selection: "unit" measures the spread along each text's direction; "paper" that of the inner products with the
            projected text, which favours texts with a long projection onto the head's space.
        heads: names for tables; default "0", "1", ...

    Raises:
        ShapeMismatch: widths or counts differ, or ``n_texts`` or ``rank`` is out of range.
        NotFinite: NaN or infinity in either.

    >>> outputs = torch.tensor([[2.0, 0.1, 0.0], [-2.0, 0.0, 0.1], [2.0, -0.1, 0.0], [-2.0, 0.0, -0.1]])
    >>> text_span(outputs, torch.eye(3), ["left or right", "up or down", "near or far"], n_texts=1).texts
    (('left or right',),)
    """
    moments = _moments(head_outputs)
    _check(moments, text_embeddings, texts, n_texts, rank, selection, heads)
    state = moments.compute()
    mean, covariance = state["mean"], state["covariance"]
    pool = text_embeddings.detach().to(mean)
    found = [_span(m, c, pool, n_texts, rank, selection) for m, c in zip(mean, covariance, strict=True)]
    return TextSpan(
        heads=tuple(heads or map(str, range(len(mean)))),
        texts=tuple(tuple(texts[i] for i in f.indices) for f in found),
        indices=tuple(tuple(f.indices) for f in found),
        explained=tuple(tuple(f.explained) for f in found),
        variance=tuple(float(c.trace()) for c in covariance),
        rank=tuple(f.rank for f in found),
        n_samples=int(moments.n_samples),
        n_pool=len(texts),
        selection=selection,
        mean=mean.float(),
        bases=tuple(f.basis.float() for f in found),
        pool_id=blake2b("\0".join(texts).encode(), digest_size=10).hexdigest(),
    )


class _Span(NamedTuple):
    indices: list[int]
    explained: list[float]
    basis: Tensor
    rank: int


def _span(
    mean: Float[Tensor, " d"],
    covariance: Float[Tensor, "d d"],
    texts: Float[Tensor, "t d"],
    n_texts: int,
    rank: int,
    selection: Selection,
) -> _Span:
    """Chooses the texts of one head; all steps use the coordinates of its leading singular vectors."""
    space = leading_space(mean, covariance, rank)
    left, inner = texts @ space, space.T @ covariance @ space
    total, outside = covariance.trace(), covariance.trace() - inner.trace()
    start = left.square().sum(1)
    indices, explained, directions = [], [], []
    for _ in range(min(n_texts, space.shape[1])):
        square = left.square().sum(1)
        spread = ((left @ inner) * left).sum(1)
        if selection == "unit":
            spread = spread / square
        spread[square <= start * _SPENT**2] = -torch.inf
        best = int(spread.argmax())
        if not spread[best] > total * _ROUNDING**2 * (square[best] if selection == "paper" else 1):
            break  # no variance or no text is left
        u = normalize(left[best], dim=0)
        across = inner @ u
        cross = torch.outer(across, u)
        inner = inner - cross - cross.T + (u @ across) * torch.outer(u, u)
        left = left - torch.outer(left @ u, u)
        indices.append(best)
        explained.append(float(1 - (inner.trace() + outside) / total))
        directions.append(space @ u)
    basis = torch.stack(directions) if directions else mean.new_zeros(0, len(mean))
    return _Span(indices, explained, basis, space.shape[1])


def leading_space(
    mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"], rank: int
) -> Float[Tensor, "d r"]:
    """Computes the right singular vectors of the uncentred outputs, strongest first: at most ``rank``, without those that
    are only rounding (an attention head of width w has at most w + 1)."""
    values, vectors = torch.linalg.eigh(covariance + torch.outer(mean, mean))
    keep = values > values[-1].clamp_min(0) * _ROUNDING**2
    return vectors[:, keep].flip(1)[:, :rank]


def _moments(head_outputs: Tensor | HeadMoments) -> HeadMoments:
    if isinstance(head_outputs, HeadMoments):
        return head_outputs
    several = isinstance(head_outputs, Tensor) and head_outputs.ndim == 3
    check_numbers(head_outputs, "head outputs", ndim=3 if several else 2)
    outputs = head_outputs if several else head_outputs[:, None]
    moments = HeadMoments(outputs.shape[1], outputs.shape[2]).to(outputs.device)
    moments.update(outputs)
    return moments


def _check(
    moments: HeadMoments,
    embeddings: Tensor,
    texts: Sequence[str],
    n_texts: int,
    rank: int,
    selection: str,
    heads: Sequence[str] | None,
) -> None:
    check_numbers(embeddings, "text embeddings")
    if embeddings.shape[1] != moments.dim:
        raise ShapeMismatch(
            f"text embeddings: expected width {moments.dim}, as the head outputs have, got {embeddings.shape[1]}: both must "
            "lie in the joint space, after the model's projections"
        )
    if len(texts) != len(embeddings):
        raise ShapeMismatch(
            f"expected one embedding per text, got {len(texts)} texts but {len(embeddings)} text embeddings"
        )
    if not 1 <= n_texts <= len(texts) or rank < 1:
        raise ShapeMismatch(
            f"expected n_texts in 1..{len(texts)} (the pool) and rank of at least 1, got {n_texts} and {rank}"
        )
    if selection not in ("unit", "paper"):
        raise ShapeMismatch(f'selection: expected "unit" or "paper", got {selection!r}')
    if int(moments.n_samples) < 2:
        raise ShapeMismatch(
            f"head outputs: expected at least 2 images, got {int(moments.n_samples)}, which have no spread"
        )
    if heads is not None and len(heads) != moments.heads:
        raise ShapeMismatch(f"heads: expected one name for each of {moments.heads} heads, got {len(heads)}")
    check_finite(embeddings, "text embeddings")
