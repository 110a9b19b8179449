"""Starts that other seeds find again: clusters of the data, and what several trainings agree on."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import mmhooks as mm
from mmhooks.errors import MMHooksError, ShapeMismatch
from mmhooks.heads.sae.consensus import consensus
from mmhooks.heads.training.clusters import cluster_directions
from mmhooks.heads.training.ncl_objective import NCLObjective
from mmhooks.heads.training.sae_objective import SAEObjective


def planted(rows: int, n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors around ``n`` far apart directions, and these."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[:n]
    of = torch.arange(rows) % n
    length = 1 + torch.rand(rows, 1, generator=generator)
    return length * atoms[of] + 0.05 * torch.randn(rows, d, generator=generator), atoms


def test_clusters_find_planted_directions_the_heaviest_first() -> None:
    x, atoms = planted(600, 6, 16, 0)
    weight = torch.where(torch.arange(600) % 6 == 4, 9.0, 1.0)  # rows of direction 4 count more
    rows = cluster_directions(x, weight, 6, restarts=4, seed=3)
    cosine = rows @ atoms.T
    assert sorted(cosine.argmax(1).tolist()) == list(range(6)) and bool((cosine.amax(1) > 0.99).all())
    assert int(cosine[0].argmax()) == 4
    assert torch.equal(rows, cluster_directions(x, weight, 6, restarts=4, seed=3))
    # A direction does not depend on the length of one row, nor does a row of zeros have one.
    with_zero = torch.cat([x, torch.zeros(1, 16)])
    assert torch.allclose(
        rows, cluster_directions(with_zero, torch.cat([weight, torch.ones(1)]), 6, restarts=4, seed=3)
    )
    with pytest.raises(MMHooksError, match="as many training vectors as features, got 5 for 6"):
        cluster_directions(x[:5], weight[:5], 6, restarts=1, seed=0)


def test_seeds_started_at_clusters_share_more_features_than_seeds_started_at_random() -> None:
    image, _ = planted(1200, 12, 16, 0)
    text = image.roll(1, 0)

    def trained(seed: int, init: str) -> mm.TopKSAE:
        sae = mm.TopKSAE(16, 12, 2, seed=seed)
        objective = SAEObjective(init=init, init_seed=seed)  # type: ignore[arg-type]
        mm.train_head(sae, image, text, epochs=2, seed=seed, objective=objective, progress=False)
        return sae

    shared = {
        init: mm.stability(trained(0, init), trained(1, init)).matched.value
        for init in ("clusters", "random")
    }
    assert shared["clusters"] > 0.9 > shared["random"]


def test_consensus_finds_the_rows_that_all_heads_have() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = normalize(torch.randn(6, 32, generator=generator), dim=1)
    heads = []
    for seed in range(4):
        head = mm.TopKSAE(32, 10, 2, seed=seed)  # four rows of its own
        with torch.no_grad():
            head.W_dec[torch.randperm(10, generator=generator)[:6]] = normalize(
                shared + 0.03 * torch.randn(6, 32, generator=generator), dim=1
            )
        heads.append(head)
    rows, agreement = consensus(heads, 6)
    cosine = rows @ shared.T
    assert sorted(cosine.argmax(1).tolist()) == list(range(6)) and bool((cosine.amax(1) > 0.98).all())
    # Nearer to the truth than the heads that were averaged.
    assert float(cosine.amax(1).mean()) > float((heads[0].W_dec.detach() @ shared.T).amax(0).mean())
    assert bool((agreement > 0.95).all()) and bool((consensus(heads, 10)[1][6:] < 0.8).all())
    with pytest.raises(MMHooksError, match="at least two heads"):
        consensus(heads[:1], 3)
    with pytest.raises(ShapeMismatch, match="equal shape with at least 11 features"):
        consensus(heads, 11)


def test_ncl_started_at_clusters_has_a_unit_for_every_cluster_of_pairs() -> None:
    x, atoms = planted(600, 6, 16, 1)
    image, text = x + 3, x - 3  # a gap between the modalities, which no unit should tell
    ncl = mm.NCL(16, 6, hidden=8, normalize_input=False)
    NCLObjective(init="clusters").start(ncl, image, text)
    for side in (image, text):
        fired = ncl.encode(side) > 0
        share = torch.stack([fired[torch.arange(600) % 6 == of].float().mean(0) for of in range(6)])
        assert sorted(share.argmax(0).tolist()) == list(range(6))
    with pytest.raises(MMHooksError, match="a hidden unit for each of 6 features, got 4; pass hidden=6"):
        NCLObjective(init="clusters").start(mm.NCL(16, 6, hidden=4), image, text)
