"""SpLiCE: embeddings as sparse non-negative sums of text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmhooks.analysis.decomposition.lasso import nonnegative_lasso
from mmhooks.analysis.inputs.checks import check_finite
from mmhooks.analysis.results import Estimate, Records, Result
from mmhooks.analysis.statistics.intervals import bootstrap
from mmhooks.data.sparse_rows import SparseRows
from mmhooks.errors import DataError, ShapeMismatch, WrongOrigin
from mmhooks.utils.indexing import as_places, one_place


@dataclass(frozen=True)
class SparseTextCode(Result):
    """Sparse text weights of each embedding.

    Attributes:
        codes: weights, largest first; indices are positions in the pool.
        cosine: between the centred embedding and its reconstruction from texts. l0: number of texts used.
        gap: certified upper bound on the distance of each solution's objective from the optimum.
        dictionary: centred unit embeddings of the texts; not saved. mean: of the unit embeddings, subtracted from them
            and added back by :meth:`recompose`; not saved.
    """

    texts: tuple[str, ...]
    codes: SparseRows
    cosine: Float[Tensor, " n"]
    l0: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]
    penalty: float
    dictionary: Float[Tensor, "t d"] = field(repr=False, compare=False)
    mean: Float[Tensor, " d"] = field(repr=False, compare=False)
    tolerance: float = 1e-6

    @property
    def settled(self) -> Bool[Tensor, " n"]:
        """Rows whose gap is within the tolerance; a warning was given if not all are."""
        return self.gap <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {
            "penalty": self.penalty,
            "cosine": self.cosine.tolist(),
            "l0": self.l0.tolist(),
            "worst_gap": float(self.gap.max()) if len(self.gap) else 0.0,
            "unsettled": (~self.settled).nonzero().flatten().tolist(),
            "texts": [
                [[text, round(w, 6)] for text, w in self.top(i, k=None)] for i in range(len(self.cosine))
            ],
        }

    def top(self, row: Any, k: int | None = 10) -> list[tuple[str, float]]:
        """The texts of one embedding with the largest weights.

        Raises:
            ShapeMismatch: ``row`` is not one of the rows.
        """
        place = one_place(row, len(self.cosine), "rows")
        pairs = zip(self.codes.indices[place].tolist(), self.codes.values[place].tolist(), strict=True)
        return [(self.texts[i], w) for i, w in pairs if w > 0][:k]

    def top_of(self, rows: Any, k: int = 10) -> list[tuple[str, float]]:
        """The texts with the largest mean weight over a group of rows (numbers or a bool mask), such as a class.

        Raises:
            ShapeMismatch: there is no row.
        """
        chosen = as_places(rows, len(self.cosine), "rows").tolist()
        if not chosen:
            raise ShapeMismatch("rows: expected at least one, got none")
        mean = torch.zeros(len(self.texts))
        indices, values = self.codes.indices[chosen], self.codes.values[chosen]
        mean.index_add_(0, indices.flatten().long(), values.flatten().float() / len(chosen))
        best = mean.topk(min(k, len(mean)))
        return [
            (self.texts[i], w)
            for i, w in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if w > 0
        ]

    def reconstruct(self) -> Float[Tensor, "n d"]:
        """Reconstructs the centred embeddings from texts; not of unit norm."""
        return torch.einsum(
            "nk,nkd->nd", self.codes.values.float(), self.dictionary[self.codes.indices.long()]
        )

    def recompose(self) -> Float[Tensor, "n d"]:
        """Makes unit embeddings from the texts: the reconstruction at unit length, plus the mean, at unit length again.

        They lie where the embeddings lay, so they can be compared with any text, as in SpLiCE's zero-shot accuracy. An
        embedding without texts becomes the mean.
        """
        return self._with_mean(self.codes.values.float())

    def intervene(self, concepts: Any) -> Float[Tensor, "n d"]:
        """:meth:`recompose` without some texts, whose weights become 0 (SpLiCE, Section 5.3).

        Args:
            concepts: a list of texts of the pool, their positions, or a bool mask of the pool.

        Raises:
            ShapeMismatch: a position is not in the pool. DataError: a text is not in the pool, there is none, or no
                embedding uses any of them.
        """
        chosen = self._positions(concepts)
        values = self.codes.values.float()
        gone = torch.isin(self.codes.indices.long(), chosen)
        if not bool((values[gone] > 0).any()):
            named = ", ".join(repr(self.texts[i]) for i in chosen.tolist()[:5]) or "none"
            raise DataError(
                f"intervene: expected concepts that an embedding is written in, got {named}, without weight in all "
                f"{len(values)} of them: see top_of(range(n)), or use a smaller penalty (now {self.penalty:g})"
            )
        return self._with_mean(values.masked_fill(gone, 0.0))

    def _with_mean(self, weights: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        rebuilt = torch.einsum("nk,nkd->nd", weights, self.dictionary[self.codes.indices.long()])
        return normalize(normalize(rebuilt, dim=1) + self.mean, dim=1)

    def _positions(self, concepts: Any) -> Int[Tensor, " m"]:
        names = [concepts] if isinstance(concepts, str) else concepts
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            return as_places(concepts, len(self.texts), "concepts of the pool")
        missing = [name for name in names if name not in set(self.texts)]
        if missing:
            raise DataError(f"intervene: expected texts of the pool, got {missing[:3]}, which are not in it")
        return torch.tensor([i for i, text in enumerate(self.texts) if text in set(names)], dtype=torch.long)

    def table(self) -> Records:
        rows: dict[str, Estimate] = {"cosine": bootstrap(self.cosine), "L0": bootstrap(self.l0)}
        return Records({"measure": k} | e.columns() for k, e in rows.items())


@torch.no_grad()
def sparse_text_code(
    embeddings: Float[Tensor, "n d"],
    text_embeddings: Float[Tensor, "t d2"],
    texts: Sequence[str],
    *,
    penalty: float | None = None,
    l1_penalty: float | None = None,
    mean: Float[Tensor, " d3"] | None = None,
    text_mean: Float[Tensor, " d4"] | None = None,
    tolerance: float = 1e-6,
) -> SparseTextCode:
    """Writes each embedding as a sparse non-negative sum of texts (SpLiCE, Bhalla et al. 2024).

    Both sides are normalized, centred by the mean of their own modality (which closes the modality gap) and normalized
    again. Weights minimise ``½‖wC - z‖² + penalty · Σw``, ``w >= 0``.

    Args:
        penalty: texts with a cosine below this are never used; default 0.2.
        l1_penalty: the same in the scale of SpLiCE's code, instead of ``penalty``, which is half of it: its ADMM minimises
            ``‖wC - z‖² + l1_penalty · Σw``, and to scikit-learn's ``Lasso``, whose objective is ours over the width d,
            it gives ``alpha = l1_penalty / (2 d)``, which is ``penalty / d``. Its default is 0.01.
        mean: mean of unit embeddings, if ``embeddings`` are few or not of one kind; zeros for a direction. Default:
            their own mean. ``text_mean``: likewise; default: that of the pool.
        tolerance: of the objective, certified by the duality gap.

    Raises:
        ShapeMismatch: widths or counts differ, the penalty is not above 0, both penalties are given, or one embedding
            comes without ``mean``.
        NotFinite: NaN or infinity in either. WrongOrigin: a mean is too long to be that of unit embeddings.

    >>> pool = torch.eye(3); eye = torch.zeros(3)
    >>> code = sparse_text_code(torch.tensor([[2.0, 1.0, 0.0]]), pool, ["a", "b", "c"], mean=eye, text_mean=eye)
    >>> [text for text, weight in code.top(0)]
    ['a', 'b']
    """
    n, d = embeddings.shape
    widths = {text_embeddings.shape[1], d, *(len(m) for m in (mean, text_mean) if m is not None)}
    if len(widths) > 1 or len(texts) != len(text_embeddings):
        raise ShapeMismatch(
            f"expected one text embedding per text, all of one width, got embeddings of width {d} and text embeddings "
            f"of shape {tuple(text_embeddings.shape)} for {len(texts)} texts"
            + ("" if len(widths) == 1 else f"; widths {sorted(widths)} (means included) must agree")
        )
    if penalty is not None and l1_penalty is not None:
        raise ShapeMismatch(
            f"expected penalty= or l1_penalty=, one of them, got both, {penalty} and {l1_penalty}"
        )
    if l1_penalty is not None:
        penalty = l1_penalty / 2
    penalty = 0.2 if penalty is None else penalty
    if penalty <= 0:
        raise ShapeMismatch(
            f"penalty: expected a number above 0, got {penalty}: without one every text would be used"
        )
    if mean is None and n < 2:
        raise ShapeMismatch(
            f"expected at least 2 embeddings to centre by their mean, got {n}: give mean= (of unit embeddings of this "
            "modality, or zeros)"
        )
    check_finite(embeddings, "embeddings")
    check_finite(text_embeddings, "text embeddings")
    for name, given in (("mean=", mean), ("text_mean=", text_mean)):
        if given is not None:
            _check_unit_mean(given, name)
    dictionary = centred(text_embeddings, text_mean)
    own = (
        normalize(embeddings.detach().cpu().float(), dim=1).mean(0)
        if mean is None
        else mean.detach().cpu().float()
    )
    target = centred(embeddings, own)
    solved = nonnegative_lasso(target, dictionary, penalty, tolerance=tolerance)
    rebuilt = torch.einsum("nk,nkd->nd", solved.values, dictionary[solved.indices])
    return SparseTextCode(
        texts=tuple(texts),
        codes=SparseRows(solved.values, solved.indices, len(texts)),
        cosine=torch.nn.functional.cosine_similarity(rebuilt, target, dim=1),
        l0=(solved.values > 0).sum(1).float(),
        gap=solved.gap,
        penalty=penalty,
        dictionary=dictionary,
        mean=own,
        tolerance=tolerance,
    )


def _check_unit_mean(mean: Float[Tensor, " d"], name: str) -> None:
    check_finite(mean[None], name)
    norm = float(mean.float().norm())
    if norm > 1.001:  # rounding of half precision
        raise WrongOrigin(
            f"{name}: expected the mean of unit embeddings, got a norm of {norm:.4g}, above 1, as that of raw ones; give "
            "normalize(embeddings, dim=1).mean(0)"
        )


def centred(x: Float[Tensor, "n d"], mean: Float[Tensor, " d2"] | None = None) -> Float[Tensor, "n d"]:
    """Normalizes rows, subtracts their mean (or ``mean``), and normalizes again."""
    unit = normalize(x.detach().cpu().float(), dim=1)
    return normalize(unit - (unit.mean(0) if mean is None else mean.detach().cpu().float()), dim=1)
