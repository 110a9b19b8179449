"""What an attack may leave behind in torch itself is put back, so that later tests start as usual."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    """An interrupt inside one of torch's own switches can leave it as it is: no Python code mends that."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)
