"""Sparse autoencoders of several layers and sizes, trained in one pass over a store by token, and what they reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mmhooks as mm
from mmhooks.analysis.results import Estimate
from mmhooks.analysis.statistics.resampling import bootstrap_ratio
from mmhooks.heads import HeadJob, TopKSAE, reconstruction
from mmhooks.heads.training.sae_objective import SAEObjective


@dataclass(frozen=True)
class Candidate:
    """One autoencoder to choose from: where it reads, its features, and how many are active for a token."""

    site: str
    features: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.site}, n {self.features}, K {self.k}"


@dataclass(frozen=True)
class Plan:
    """How all candidates are trained."""

    epochs: int = 4
    batch_size: int = 512
    lr: float = 2e-3
    dead_after: float = 0.25  # epochs without activity, after which a feature is revived
    seed: int = 0


def train_all(
    store: mm.Store, candidates: Sequence[Candidate], plan: Plan, *, name: str, progress: bool = True
) -> dict[Candidate, TopKSAE]:
    """Trains the candidates in one pass over the store, each as :func:`mmhooks.train_head` alone would train it."""
    heads = {
        c: TopKSAE(store[c.site].shape[-1], c.features, c.k, name=name, seed=plan.seed) for c in candidates
    }
    jobs = [
        HeadJob(head, sites=[c.site], lr=plan.lr, objective=SAEObjective(dead_after=plan.dead_after))
        for c, head in heads.items()
    ]
    mm.train_heads(
        jobs, store, epochs=plan.epochs, batch_size=plan.batch_size, seed=plan.seed, progress=progress
    )
    return heads


def rows_of(store: mm.Store, site: str) -> Float[Tensor, "rows d"]:
    """All rows of a site in single precision."""
    found = store[site].span(0, len(store))
    assert isinstance(found, Tensor)  # sites of a model are dense
    return found.float()


def pair_of_rows(store: mm.Store) -> Int[Tensor, " rows"]:
    """The number of the pair to which each row belongs, in the order of the store."""
    starts = store.pairs.starts
    return torch.repeat_interleave(torch.arange(len(starts) - 1), torch.as_tensor(starts).diff())


@torch.no_grad()
def fvu(
    head: TopKSAE, rows: Float[Tensor, "rows d"], clusters: Int[Tensor, " rows"], *, seed: int = 0
) -> Estimate:
    """The variance that is left unexplained, with its interval over resampled clusters of rows.

    The mean that variance is taken about is that of all rows, in every resample.
    """
    back = torch.cat([head(part) for part in rows.split(4096)])
    error = (rows - back).double().square().sum(1)
    spread = (rows - rows.mean(0)).double().square().sum(1)
    return bootstrap_ratio(error, spread, clusters, seed=seed)


def measured(head: TopKSAE, rows: Float[Tensor, "rows d"], clusters: Int[Tensor, " rows"]) -> dict[str, Any]:
    """FVU with its interval, share of dead features, and active features a token, on rows the head was not trained on."""
    found = reconstruction(head, rows)
    return {
        "fvu": fvu(head, rows, clusters).to_json(),
        "cosine": found.cosine,
        "dead": found.dead,
        "l0": found.l0,
        "tokens": len(rows),
        "clusters": len(clusters.unique()),
    }
