"""How alike the samples are that activate a feature: EmbedSim and WinRate (seed paper, equations 5 and 6)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.analysis.checks import check_rows, unit_rows
from mmhooks.analysis.passes import ActivationStore, Side, is_table
from mmhooks.analysis.similarity import (
    EmbedSimResult,
    Samples,
    SimKind,
    WinKind,
    WinRateResult,
    check_kind,
    check_sizes,
    embed_sim_of,
    mean_cosine,
    random_pool,
    random_samples,
    win_rate_of,
)
from mmhooks.analysis.stored import stored_samples
from mmhooks.analysis.top import top_activating
from mmhooks.errors import ShapeMismatch
from mmhooks.heads.base import Head

__all__ = ["EmbedSimResult", "WinRateResult", "embed_sim", "mean_cosine", "random_samples", "win_rate"]


@torch.no_grad()
def embed_sim(
    latents: Float[Tensor, "samples n"] | ActivationStore,
    embeddings: Float[Tensor, "samples2 d"] | str | None = None,
    *,
    m: int = 20,
    kind: SimKind = "primary",
    pool: int | None = None,
    min_samples: int = 2,
    eps: float = 1e-3,
    seed: int = 0,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
) -> EmbedSimResult:
    """EmbedSim: cosine of the ``m`` samples that activate a feature most, against random samples.

    ``primary`` is ``(S+ - S-) / |S-|`` with S- the mean cosine of all pairs in one random pool; ``difference``
    is ``S+ - S-``; ``paper`` the mean over pairs of ``(S+_ij - S-_ij) / S-_ij`` with m random samples of each
    feature's own, heavy-tailed where S- comes near zero. All three are in the result.

    Args:
        latents: activations, one row a sample; of signed ones give the absolute value. Or a store, whose
            ``side`` is read in one pass with bounded memory.
        embeddings: of the same samples, by another model; brought to unit norm here. With a store also the
            name of a site; default the model's own ``<side>.embed``.
        pool: size of the random pool; default all samples.
        min_samples: a feature with fewer activating samples is NaN (at least 2; fewer than m are used as they are).
        head, site: with a store, as in :func:`mmhooks.analysis.mds.mds`.

    Raises:
        ShapeMismatch: rows differ, or numbers out of range. NotFinite: NaN in either.

    >>> x = torch.eye(4)[[0, 0, 1, 2]]; latents = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    >>> embed_sim(latents, x, m=2).s_plus
    tensor([1.])
    """
    check_kind("EmbedSim", kind, ("primary", "difference", "paper"))
    samples = _samples(latents, embeddings, m, pool, min_samples, seed, head, side, site)
    return embed_sim_of(samples, kind=kind, min_samples=min_samples, eps=eps, seed=seed)


@torch.no_grad()
def win_rate(
    latents: Float[Tensor, "samples n"] | ActivationStore,
    embeddings: Float[Tensor, "samples2 d"] | str | None = None,
    *,
    m: int = 20,
    kind: WinKind = "expectation",
    pool: int = 2048,
    min_samples: int = 2,
    seed: int = 0,
    head: Head | None = None,
    side: Side = "image",
    site: str | None = None,
) -> WinRateResult:
    """WinRate: how often two top samples of a feature are more alike than two random samples.

    ``expectation`` is P(S+ > S-) with S- over all pairs of a random pool of ``pool`` samples; ``paper`` compares
    each pair with one pair of random samples (equation 6), m drawn for each feature by ``seed``. One half is chance.
    Arguments and errors as in :func:`embed_sim`.

    >>> x = torch.eye(4)[[0, 0, 1, 2]]; latents = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    >>> round(win_rate(latents, x, m=2).estimate.value, 3)
    0.833
    """
    check_kind("WinRate", kind, ("expectation", "paper"))
    samples = _samples(latents, embeddings, m, pool, min_samples, seed, head, side, site)
    return win_rate_of(samples, kind=kind, min_samples=min_samples, seed=seed)


def _samples(
    latents: Tensor | ActivationStore,
    embeddings: Tensor | str | None,
    m: int,
    pool: int | None,
    min_samples: int,
    seed: int,
    head: Head | None,
    side: Side,
    site: str | None,
) -> Samples:
    if not is_table(latents):
        return stored_samples(
            latents, side, head, site, embeddings, m=m, pool=pool, min_samples=min_samples, seed=seed
        )
    if not isinstance(embeddings, Tensor):
        raise ShapeMismatch(f"latents as a tensor need embeddings as one, came {type(embeddings).__name__}")
    check_rows(latents, embeddings)
    n = len(latents)
    check_sizes(m, min_samples, n)
    unit = unit_rows(embeddings.cpu()).float()
    drawn = random_pool(n, pool, seed)
    return Samples(
        unit,
        top_activating(latents.detach(), m),
        drawn,
        mean_cosine(unit[drawn]),
        len(drawn),
        lambda features: random_samples(n, m, features, seed),
    )
