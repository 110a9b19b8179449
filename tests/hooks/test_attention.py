"""The pattern computed beside torch's fused attention: all of it, and some of its rows, under every form of mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmhooks.hooks.attention import softmax_scores

MASKS = {
    "none": None,
    "bool by row": torch.rand(2, 1, 6, 6, generator=torch.manual_seed(0)) > 0.4,
    "bool": torch.rand(6, 6, generator=torch.manual_seed(1)) > 0.4,
    "additive": torch.randn(2, 1, 6, 6, generator=torch.manual_seed(2)),
}
ROWS = (torch.tensor([5]), torch.tensor([1, 2]), torch.tensor([[5], [3]]))


@pytest.mark.parametrize(
    ("name", "causal"), [("none", False), ("none", True), *((n, False) for n in [*MASKS][1:])]
)
def test_against_the_fused_kernel(name, causal):
    """Two query heads share a key; the third query may attend to no key."""
    rng = torch.manual_seed(3)
    q, k, v = (torch.randn(2, heads, 6, 16, generator=rng) for heads in (8, 4, 4))
    mask = MASKS[name] if MASKS[name] is None else MASKS[name].clone()
    if mask is not None:
        mask[..., 2, :] = float("-inf") if mask.is_floating_point() else False
    pattern = softmax_scores(q, k, mask, causal)
    z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(pattern @ v.repeat_interleave(2, 1), z, atol=1e-6, rtol=1e-5)
    assert mask is None or not pattern[:, :, 2].any()
    for rows in ROWS:
        each = rows.expand(2, -1)
        want = torch.stack([pattern[i][:, each[i]] for i in range(2)])
        torch.testing.assert_close(softmax_scores(q, k, mask, causal, None, rows), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hidden_keys_weigh_nothing_in_half_precision(dtype):
    q = torch.randn(1, 2, 4, 8, generator=torch.manual_seed(4)).to(dtype)
    one = torch.eye(4, dtype=torch.bool)
    assert torch.equal(softmax_scores(q, q, one).float(), torch.eye(4).expand(1, 2, 4, 4))
