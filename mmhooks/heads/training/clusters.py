"""Directions of the data to start a head from, so that other seeds start nearly alike and end with the same features.

A dictionary that starts at random rows ends in one of many minima. Cluster centres of the data are a start that hardly
depends on the seed (the idea of archetypal SAEs, Fel et al. 2025, whose atoms stay combinations of such centres; here
they only start there).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mmhooks.errors import MMHooksError
from mmhooks.heads.linalg import to_unit

MOST = 8_192
"""Rows that are clustered, or up to twice as many; evenly spaced ones of more."""
ROUNDS = 20
"""Of k-means: centres hardly move after these, and training moves them further anyway."""


def cluster_directions(
    x: Float[Tensor, "rows d"], weight: Float[Tensor, " rows"], n: int, *, restarts: int, seed: int
) -> Float[Tensor, "n d"]:
    """Clusters the directions of ``x`` by k-means and returns the unit mean of each cluster, the heaviest first.

    Args:
        x: centred vectors.
        weight: of each row's squared length; a direction counts by both, as in the loss of a reconstruction.
        restarts: k-means++ starts, of which the best is kept: more of them make seeds agree more.
        seed: of the starts.

    Raises:
        MMHooksError: fewer rows with a direction than clusters.

    >>> x = torch.tensor([[2.0, 0.0], [1.0, 0.1], [0.0, 3.0]])
    >>> cluster_directions(x, torch.ones(3), 2, restarts=1, seed=0).round().abs().tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    from sklearn.cluster import KMeans

    step = max(1, len(x) // MOST)
    x, weight = x[::step].detach().cpu().double(), weight[::step].detach().cpu().double()
    mass = weight * x.square().sum(1)
    x, mass = x[mass > 0], mass[mass > 0]
    if len(x) < n:
        raise MMHooksError(
            f"clusters: expected at least as many training vectors as features, got {len(x)} for {n}; use fewer features "
            "or another start"
        )
    mass = mass / mass.mean()
    unit = to_unit(x)
    means = KMeans(n, n_init=restarts, max_iter=ROUNDS, random_state=seed)  # type: ignore[arg-type]
    found = means.fit(unit.float().numpy(), sample_weight=mass.float().numpy())
    of = torch.from_numpy(found.labels_).long()
    centres = torch.zeros(n, x.shape[1], dtype=x.dtype).index_add_(0, of, mass[:, None] * unit)
    heaviest = torch.zeros(n, dtype=x.dtype).index_add_(0, of, mass).argsort(descending=True)
    return to_unit(centres[heaviest]).float()
