"""Latents and embeddings of a few samples, with features that are dead or fire rarely."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

N, FEATURES, D, M = 40, 6, 5, 4


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    latents = torch.relu(torch.randn(N, FEATURES) - 0.5)
    latents[:, 2] = 0  # dead
    latents[:, 3] = 0
    latents[7, 3] = 1.0  # one sample: no pair
    latents[:, 4] = 0
    latents[[3, 9, 11], 4] = torch.tensor([1.0, 3.0, 2.0])  # fewer than m
    return latents, torch.randn(N, D) + 0.7
