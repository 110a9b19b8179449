"""Fidelity, streaming: the sums of :mod:`mmhooks.heads.fidelity` as a metric, and predictions before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, normalize
from torchmetrics import Metric

from mmhooks.analysis.intervals import bootstrap, wilson
from mmhooks.analysis.results import Estimate, plain
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.fidelity import Sums, sums


class FidelitySums(Metric):
    """Sums from which FVU, cosine, L0 and firing counts follow: ``update(x, f, x')``, then ``compute()``."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, d_in: int, n_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sizes = {"x_sum": (d_in,), "counts": (n_features,)}
        for name in Sums._fields:
            dtype = torch.long if name in ("n", "counts") else torch.float64
            self.add_state(name, torch.zeros(sizes.get(name, ()), dtype=dtype), dist_reduce_fx="sum")

    def update(
        self, x: Float[Tensor, "b d"], f: Float[Tensor, "b n"], back: Float[Tensor, "b d"] | None
    ) -> None:
        """Adds prepared vectors, their features and their reconstruction (None: the head has no decoder)."""
        for name, value in sums(x, f, back)._asdict().items():
            setattr(self, name, getattr(self, name) + value.to(getattr(self, name).device))

    def compute(self) -> Sums:
        return Sums(*(getattr(self, name) for name in Sums._fields))


@dataclass(frozen=True)
class Kept:
    """A choice among candidates by cosine, before and after reconstruction of the one who chooses.

    Attributes:
        before, after: share of queries whose right candidate is among the first k; k = 1 is accuracy.
        agreement: share of queries whose first choice is the same (it need not be right).
        kl: mean ``KL(before || after)`` of ``softmax(scale * cosine)``, in nats.
        candidates, n: how many to choose from, and how many choose.
    """

    before: dict[int, Estimate]
    after: dict[int, Estimate]
    agreement: Estimate
    kl: Estimate
    candidates: int
    n: int

    def to_json(self) -> dict[str, Any]:
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


class Choices(Metric):
    """Collects :class:`Kept` over batches of queries against fixed candidates.

    Args:
        candidates: ``[c, d]``, one label each; any with a query's label is right.
        scale: inverse temperature of the softmax.
        ks: those above the number of candidates are left out.
    """

    hits: Tensor
    same: Tensor
    n: Tensor
    kl: list[Tensor]

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        candidates: Float[Tensor, "c d"],
        labels: Int[Tensor, " c"],
        *,
        scale: float,
        ks: Sequence[int],
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.candidates, self.labels = normalize(candidates.float(), dim=1), labels
        self.scale, self.seed = scale, seed
        self.ks = [k for k in ks if k <= len(candidates)]
        self.add_state("hits", torch.zeros(2, len(self.ks), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("same", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("kl", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "b d"], back: Float[Tensor, "b2 d2"], labels: Int[Tensor, " b3"]
    ) -> None:
        """Queries before and after, and the label of each.

        Raises:
            ShapeMismatch: not as many of each.
        """
        if not len(x) == len(back) == len(labels):
            raise ShapeMismatch(f"{len(x)} queries, {len(back)} reconstructions and {len(labels)} labels")
        scores = [normalize(part.float(), dim=1) @ self.candidates.T for part in (x, back)]
        right = labels[:, None] == self.labels
        for hits, score in zip(self.hits, scores, strict=True):
            best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            rank = ((score >= best) & ~right).sum(1)  # a tie counts as before the right one
            hits += torch.stack([(rank < k).sum() for k in self.ks]).to(hits.device)
        before, after = ((self.scale * score).double().log_softmax(1) for score in scores)
        self.kl.append(kl_div(after, before, log_target=True, reduction="none").sum(1).cpu())
        self.same += (scores[0].argmax(1) == scores[1].argmax(1)).sum().to(self.same.device)
        self.n += len(x)

    def compute(self) -> dict[str, Tensor]:
        kl = self.kl if isinstance(self.kl, Tensor) else torch.cat([torch.empty(0).double(), *self.kl])
        return {"hits": self.hits, "same": self.same, "n": self.n, "kl": kl}

    def result(self) -> Kept:
        found = self.compute()
        n, counts = int(found["n"]), found["hits"].tolist()
        before, after = ({k: wilson(h, n) for k, h in zip(self.ks, row, strict=True)} for row in counts)
        kl = bootstrap(found["kl"], draws=500, seed=self.seed)
        return Kept(before, after, wilson(int(found["same"]), n), kl, len(self.candidates), n)
