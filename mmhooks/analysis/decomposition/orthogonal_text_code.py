"""Directions as signed sums of few texts, by orthogonal matching pursuit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sklearn.linear_model import orthogonal_mp
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.utils.indexing import one_place


@dataclass(frozen=True)
class OrthogonalTextCode(Result):
    """Signed text weights of each direction.

    Attributes:
        codes: weights, the largest in size first; indices are positions in the pool.
        cosine: between the direction and its reconstruction from texts.
        dictionary: the atoms, one per text; not saved.
    """

    texts: tuple[str, ...]
    codes: SparseRows
    cosine: Float[Tensor, " n"]
    dictionary: Float[Tensor, "t d"] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        rows = [[[text, round(w, 6)] for text, w in self.top(i, k=None)] for i in range(len(self.cosine))]
        return {"cosine": self.cosine.tolist(), "texts": rows}

    def top(self, row: Any, k: int | None = 10) -> list[tuple[str, float]]:
        """The texts of one direction with the largest weights, of either sign.

        Raises:
            ShapeMismatch: ``row`` is not one of the rows.
        """
        place = one_place(row, len(self.cosine), "rows")
        pairs = zip(self.codes.indices[place].tolist(), self.codes.values[place].tolist(), strict=True)
        return [(self.texts[i], w) for i, w in pairs if w][:k]

    def reconstruct(self) -> Float[Tensor, "n d"]:
        """Reconstructs the directions from their texts."""
        return torch.einsum("nk,nkd->nd", self.codes.values, self.dictionary[self.codes.indices])

    def table(self) -> Records:
        rows = {"cosine": self.cosine, "texts": (self.codes.values != 0).sum(1).float()}
        estimates = {name: bootstrap(values) for name, values in rows.items()}
        return Records({"measure": k} | e.columns() for k, e in estimates.items())


@torch.no_grad()
def orthogonal_text_code(
    directions: Float[Tensor, "n d"],
    text_embeddings: Float[Tensor, "t d2"],
    texts: Sequence[str],
    *,
    n_texts: int = 32,
    text_mean: Float[Tensor, " d3"] | None = None,
    scale: str = "texts",
) -> OrthogonalTextCode:
    """Writes each direction as a signed sum of at most ``n_texts`` texts, chosen greedily.

    Source: Gandelsman, Efros, Steinhardt 2024 ("Interpreting the Second-Order Effects of Neurons in CLIP"), Section 4.2,
    for the directions of neurons; solved by scikit-learn's ``orthogonal_mp``. Texts lie on both sides of a direction,
    unlike in ``mm.sparse_text_code``, whose weights are positive.

    Args:
        directions: such as ``mm.neuron_directions(...).direction``; taken as they are, not centred.
        text_mean: of unit embeddings of texts, subtracted from them; default: that of the pool.
        scale: what is brought to unit length after that. "texts": every text, so that the greedy choice is by cosine.
            "coordinates", as in the public code: every coordinate over the pool, which weighs down coordinates in
            which texts differ much and favours texts that are long then.

    Raises:
        ShapeMismatch: widths or counts differ, or ``n_texts`` is not from 1 to the width and the number of texts.
        NotFinite: NaN or infinity in either. MMHooksError: no such scale.

    >>> code = orthogonal_text_code(torch.tensor([[2.0, -1.0]]), torch.eye(2), ["a", "b"], text_mean=torch.zeros(2))
    >>> code.top(0)
    [('a', 2.0), ('b', -1.0)]
    """
    d, t = directions.shape[1], len(text_embeddings)
    widths = {d, text_embeddings.shape[1], *(() if text_mean is None else (len(text_mean),))}
    if len(widths) > 1 or len(texts) != t:
        raise ShapeMismatch(
            f"expected one text embedding per text, all of one width, got directions of width {d} and text embeddings of "
            f"shape {tuple(text_embeddings.shape)} for {len(texts)} texts"
        )
    if not 1 <= n_texts <= min(d, t):
        raise ShapeMismatch(
            f"n_texts: expected 1 to {min(d, t)}, the width and the number of texts, got {n_texts}"
        )
    if scale not in ("texts", "coordinates"):
        raise MMHooksError(f'scale: expected "texts" or "coordinates", got {scale!r}')
    check_finite(directions, "directions")
    check_finite(text_embeddings, "text embeddings")
    unit = normalize(text_embeddings.detach().cpu().double(), dim=1)
    moved = unit - (unit.mean(0) if text_mean is None else text_mean.detach().cpu().double())
    atoms = normalize(moved, dim=1 if scale == "texts" else 0)
    target = directions.detach().cpu().double()
    weights = torch.as_tensor(
        orthogonal_mp(atoms.T.numpy(), target.T.numpy(), n_nonzero_coefs=n_texts)
    ).reshape(t, -1)
    best = weights.T.abs().topk(n_texts, dim=1).indices
    codes = SparseRows(weights.T.gather(1, best).float(), best, t)
    rebuilt = (weights.T @ atoms).float()
    return OrthogonalTextCode(
        tuple(texts), codes, cosine_similarity(rebuilt, target.float(), dim=1), atoms.float()
    )
