"""Modality Dominance Score, streaming: sums and counts, never two dense tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torchmetrics import Metric

from mmhooks.analysis.checks import check_pair
from mmhooks.errors import MMHooksError, ShapeMismatch

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

    def update(self, image: Float[Tensor, "b n"], text: Float[Tensor, "b2 n2"]) -> None:
        """Adds the latents of a batch of pairs.

        Raises:
            ShapeMismatch: sides of different shape, or a width other than ``n_features``.
            NotFinite: NaN or infinity in either.
        """
        seen = int(self.n_pairs)
        check_pair(image, text, start=seen)
        if image.shape[1] != self.n_features:
            raise ShapeMismatch(
                f"latents of {image.shape[1]} features, expected {self.n_features}: are they of another head?"
            )
        if len(image) == 0:
            return
        generator = torch.Generator().manual_seed(self.seed + seen)
        order = _no_fixed_point(len(image), generator).to(image.device) if len(image) > 1 else None
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
        self.n_pairs = self.n_pairs + len(image)

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
