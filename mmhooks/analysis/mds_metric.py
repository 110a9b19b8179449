"""Modality Dominance Score, streaming: sums and counts, never two dense tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.checks import check_numbers, check_pair, check_shapes
from mmhooks.analysis.entries import Latents, check_latents, count, sums
from mmhooks.data.rows import SparseRows
from mmhooks.errors import MMHooksError

if TYPE_CHECKING:
    from mmhooks.analysis.mds import MDSResult

Kind = Literal["relu", "abs", "paper"]
CACHE_BYTES = 2**20
KINDS: tuple[Kind, ...] = ("relu", "abs", "paper")
_SUMS = ("ratio_sum", "ratio_square_sum", "image_sum", "text_sum", "shuffled_sum")
_COUNTS = ("counts", "image_counts", "text_counts", "shuffled_counts")


class MDS(Metric):
    """The score of every feature, over batches of pairs: ``update(image, text)``, then ``compute()`` for
    the tensors or :meth:`result` for everything.

    Equal to :func:`mmhooks.analysis.mds.mds` on all pairs at once, in any order of batches and over any
    number of processes. Only the shuffled control differs: a stream shuffles texts within each batch, so
    batches should be large (a batch of one pair adds nothing to it).

    Args:
        n_features: width of the latents.
        kind, head, data, min_fires, seed: as in :func:`mmhooks.analysis.mds.mds`.

    >>> metric = MDS(3)
    >>> metric.update(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    >>> metric.compute()["R"]
    tensor([0.5000, 0.7500,    nan], dtype=torch.float64)
    """

    # The states, which torchmetrics sets by name.
    ratio_sum: Tensor
    ratio_square_sum: Tensor
    image_sum: Tensor
    text_sum: Tensor
    shuffled_sum: Tensor
    counts: Tensor
    image_counts: Tensor
    text_counts: Tensor
    shuffled_counts: Tensor
    n_pairs: Tensor
    kind: Kind

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        n_features: int,
        *,
        kind: Kind = "relu",
        head: str = "",
        data: str = "",
        min_fires: int = 20,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if kind not in KINDS:
            raise MMHooksError(f"kind of MDS must be one of {', '.join(KINDS)}, came {kind!r}")
        self.n_features, self.kind, self.head, self.data = n_features, kind, head, data
        self.min_fires, self.seed = min_fires, seed
        for name in _SUMS:
            self.add_state(name, torch.zeros(n_features, dtype=torch.float64), dist_reduce_fx="sum")
        for name in _COUNTS:
            self.add_state(name, torch.zeros(n_features, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("n_pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, image: Latents, text: Latents, *, start: int | None = None) -> None:
        """Adds the latents of a batch of pairs, dense or sparse; sparse ones cost their entries.

        Args:
            start: number of the first pair, which also seeds the shuffled control; default how many pairs
                this metric has seen. Processes that share a stream give it, so that they shuffle as one does.

        Raises:
            ShapeMismatch: sides of different shape, or a width other than ``n_features``.
            NotFinite: NaN or infinity in either.
        """
        start = int(self.n_pairs) if start is None else start
        if isinstance(image, SparseRows) != isinstance(text, SparseRows):
            image, text = (x.dense() if isinstance(x, SparseRows) else x for x in (image, text))
        if isinstance(image, SparseRows) and isinstance(text, SparseRows):
            check_shapes(image.shape, text.shape)
            check_latents(image, self.n_features, "image latents", start=start)
            check_latents(text, self.n_features, "text latents", start=start)
        elif isinstance(image, Tensor) and isinstance(text, Tensor):
            check_pair(image, text, start=start)
            check_latents(image[:0], self.n_features)
        else:
            for side, given in (("image", image), ("text", text)):
                check_numbers(given, f"{side} latents")
        if len(image) == 0:
            return
        generator = torch.Generator().manual_seed(self.seed + start)
        device = image.values.device if isinstance(image, SparseRows) else image.device
        order = _no_fixed_point(len(image), generator).to(device) if len(image) > 1 else None
        if isinstance(image, SparseRows) and isinstance(text, SparseRows):
            self._add_sparse(image, text, order)
        elif isinstance(image, Tensor) and isinstance(text, Tensor):
            self._add_dense(image, text, order)
        self.n_pairs = self.n_pairs + len(image)

    def _add_dense(self, image: Tensor, text: Tensor, order: Tensor | None) -> None:
        # Runs of rows that stay in the processor's cache: several times faster than whole tables.
        size = max(1, CACHE_BYTES // (4 * self.n_features))
        for begin in range(0, len(image), size):
            rows = slice(begin, begin + size)
            a_i, a_t = (activation(x[rows], self.kind) for x in (image, text))
            ratio, counted = _ratio(a_i, a_t)
            self.ratio_sum += _sum(ratio)
            self.ratio_square_sum += _sum(ratio.square())
            self.counts += _count(counted)
            self.image_sum += _sum(a_i)
            self.text_sum += _sum(a_t)
            self.image_counts += _count(a_i != 0)
            self.text_counts += _count(a_t != 0)
            if order is not None:
                ratio, counted = _ratio(a_i, activation(text[order[rows]], self.kind))
                self.shuffled_sum += _sum(ratio)
                self.shuffled_counts += _count(counted)

    def _add_sparse(self, image: SparseRows, text: SparseRows, order: Tensor | None) -> None:
        n, device = self.n_features, self.counts.device
        image, text = (_activated(x, self.kind) for x in (image, text))
        image_counts = count(image.indices, image.active, n)
        text_counts = count(text.indices, text.active, n)
        ratio, squares, counted = _sparse_ratio(image, text)
        self.ratio_sum += ratio.to(device)
        self.ratio_square_sum += squares.to(device)
        self.counts += (counted + text_counts).to(device)
        self.image_sum += sums(image.indices, image.values, n).to(device)
        self.text_sum += sums(text.indices, text.values, n).to(device)
        self.image_counts += image_counts.to(device)
        self.text_counts += text_counts.to(device)
        if order is not None:
            ratio, _, counted = _sparse_ratio(image, text[order])
            self.shuffled_sum += ratio.to(device)
            self.shuffled_counts += (counted + text_counts).to(device)

    def compute(self) -> dict[str, Tensor]:
        """``R``, ``ratio_of_means`` and ``counts`` of every feature, with the sums that they come from."""
        sums = {name: getattr(self, name).reshape(-1).clone() for name in (*_SUMS, *_COUNTS, "n_pairs")}
        means = divide(self.image_sum, self.image_sum + self.text_sum)
        return {"R": divide(self.ratio_sum, self.counts), "ratio_of_means": means, **sums}

    def result(self) -> MDSResult:
        """The whole :class:`~mmhooks.analysis.mds.MDSResult`, groups included, of everything so far."""
        from mmhooks.analysis.mds import result_of

        # Through compute(), which is where torchmetrics adds up the processes.
        return result_of(self, {name: torch.atleast_1d(value) for name, value in self.compute().items()})


def divide(a: Float[Tensor, " n"], b: Shaped[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``a / b``, NaN where ``b`` is 0."""
    return torch.where(b != 0, a / torch.where(b != 0, b, 1), torch.nan)


def activation(z: Float[Tensor, "b n"], kind: Kind) -> Float[Tensor, "b n"]:
    """What is compared between modalities, at least in single precision: ReLU(z), |z|, or z itself."""
    z = z.detach()
    z = z if z.dtype == torch.float64 else z.float()
    return z.relu() if kind == "relu" else z.abs() if kind == "abs" else z


def _ratio(a_i: Tensor, a_t: Tensor) -> tuple[Tensor, Tensor]:
    # The paper's own form has signed activations, whose ratio has heavy tails; nothing is clipped.
    total = a_i + a_t
    counted = total != 0
    return torch.where(counted, a_i / torch.where(counted, total, 1), 0), counted


def _activated(batch: SparseRows, kind: Kind) -> SparseRows:
    return SparseRows(activation(batch.values, kind), batch.indices.long(), batch.n_features)


def _sparse_ratio(image: SparseRows, text: SparseRows) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ``a_I / (a_I + a_T)`` and of its square, and the pairs counted beyond those where text fires.

    Where only the text fires the ratio is 0, so only the image's entries are visited, each with the text's
    activation of the same pair and feature.
    """
    n = image.n_features
    beside = _at(image.indices, text)
    active, total = image.active, image.values + beside
    counted = active & (total != 0)
    ratio = torch.where(counted, image.values / torch.where(counted, total, 1), 0)
    # A pair where both fire is among the text's already; with signed values their sum may be 0.
    extra = counted.double() - (active & (beside != 0)).double()
    return (
        sums(image.indices, ratio, n),
        sums(image.indices, ratio.square(), n),
        sums(image.indices, extra, n).round().long(),
    )


def _at(indices: Tensor, batch: SparseRows) -> Tensor:
    """The activations of ``batch`` at other places: row i at the features ``indices[i]``."""
    size = max(1, CACHE_BYTES // (4 * batch.n_features))
    table = batch.values.new_zeros(min(size, len(batch)), batch.n_features)
    found = torch.empty(indices.shape, dtype=batch.values.dtype, device=batch.values.device)
    for begin in range(0, len(batch), size):
        rows = slice(begin, begin + size)
        part = table[: len(batch.values[rows])]
        part.scatter_add_(1, batch.indices[rows], batch.values[rows])
        torch.gather(part, 1, indices[rows], out=found[rows])
        part.scatter_(1, batch.indices[rows], 0.0)
    return found


def _sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64)


def _count(x: Tensor) -> Tensor:
    return x.float().sum(0).long()  # exact below 2^24 rows, and runs are far shorter


def _no_fixed_point(n: int, generator: torch.Generator) -> Tensor:
    """A random cyclic order: no text stays with its own picture, as it would for one pair in a permutation."""
    order = torch.randperm(n, generator=generator)
    shuffled = torch.empty_like(order)
    shuffled[order] = order.roll(1)
    return shuffled
