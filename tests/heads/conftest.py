"""Small paired clouds with a modality gap, and the heads that are tested on them."""

from __future__ import annotations

import pytest
import torch


def paired_clouds(n: int, d: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs built from a few shared directions, each modality with an offset of its own; not normalised."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(24, d, generator=torch.Generator().manual_seed(99))
    code = torch.rand(n, 24, generator=g) * (torch.rand(n, 24, generator=g) < 0.15)
    shift = torch.randn(2, d, generator=torch.Generator().manual_seed(98))
    noise = 0.05 * torch.randn(2, n, d, generator=g)
    return code @ basis + shift[0] + noise[0], code @ basis + shift[1] + noise[1]


@pytest.fixture(scope="session")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    return paired_clouds(600)


@pytest.fixture(scope="session")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    return paired_clouds(200, seed=1)
